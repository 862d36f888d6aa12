"""Data sets of the Hugging Face Hub: the real library, and a server that answers like the Hub.

Every read is a process of its own, as the library reads its environment when it starts.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

SCRIPT = """
import json, sys
from rlt_jax.data.tables import find_files, read_records
from rlt_jax.errors import UserError
for path in json.loads(sys.argv[1]):
    try:
        files = [str(file) for file in find_files(path)]
        records = [record for _, record in read_records(path)]
        print(json.dumps({"files": files, "records": records}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""
COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/convert/parquet": "c" * 40}
NAMES = (
    *("main/test.jsonl", "main/train-0.jsonl", "main/train-1.jsonl", "main/card.md"),
    *("main/more/train-2.jsonl", "main/more/deep/train-3.jsonl"),
    *("all.jsonl", "README.md"),
)
USER_TOKEN = "hf_of_a_user"


class Hub(NamedTuple):
    """A server that answers like the Hub.

    Attributes:
      url: its address.
      downloads: names of the files that were downloaded.
      requests: of any kind.
    """

    url: str
    downloads: list[str]
    requests: list[str]


def content(revision: str, name: str) -> bytes:
    record = {"revision": revision, "name": name}
    return json.dumps(record).encode() + b"\n"


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(path)
        path = path.removeprefix("/api").removeprefix("/datasets/")
        org, name, kind, rest = (*path.split("/", 3), "", "", "")[:4]
        repo = f"{org}/{name}"
        authorized = self.headers.get("Authorization") == f"Bearer {USER_TOKEN}"
        commits = {commit: name for name, commit in COMMITS.items()}
        is_public = repo in ("org/open", "org/gated")
        if not is_public and (repo, authorized) != ("org/private", True):
            self.answer(401, error="RepoNotFound")  # private, or there is none
        elif kind == "revision" and rest not in COMMITS:
            self.answer(404, error="RevisionNotFound")
        elif kind == "revision":
            info = {"id": repo, "sha": COMMITS[rest]}
            # Where libraries before the newest look for files.
            info["siblings"] = [{"rfilename": name} for name in NAMES]
            self.answer(200, json.dumps(info).encode())
        elif kind == "tree":
            files = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(content(commits[rest], name)),
                    "oid": hashlib.sha1(content(commits[rest], name)).hexdigest(),
                }
                for name in NAMES
            ]
            self.answer(200, json.dumps(files).encode())
        elif repo == "org/gated" and not authorized:
            self.answer(403, error="GatedRepo")
        else:
            commit, _, name = rest.partition("/")
            if self.command == "GET":
                self.hub.downloads.append(name)
            body = content(commits[commit], name)
            self.answer(200, body, f'"{hashlib.sha1(body).hexdigest()}"')

    def answer(
        self, status: int, body: bytes = b"", tag: str = "", error: str = ""
    ) -> None:
        headers = {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            "ETag": tag,
            "X-Repo-Commit": tag and urlsplit(self.path).path.split("/")[5],
            "X-Error-Code": error,
        }
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    handler = type("Handler", (_Handler,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", [], [])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield handler.hub
    server.shutdown()
    thread.join()
    server.server_close()


def read(hub: Hub, cache: Path, *paths: str, **environment: str) -> list[dict]:
    """What a new process finds under each path."""
    kept = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    kept = {k: v for k, v in kept.items() if not k.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(paths)],
        env=kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


OPEN = "hf://datasets/org/open"


def names(outcome: dict) -> list[str]:
    """The files of the data set that were read."""
    assert "records" in outcome, outcome
    return [record["name"] for record in outcome["records"]]


@pytest.mark.parametrize(
    ("inside", "wanted"),
    [
        ("/main/test.jsonl", ["main/test.jsonl"]),
        ("/main", ["main/test.jsonl", "main/train-0.jsonl", "main/train-1.jsonl"]),
        ("/main/", ["main/test.jsonl", "main/train-0.jsonl", "main/train-1.jsonl"]),
        ("/main/train-*.jsonl", ["main/train-0.jsonl", "main/train-1.jsonl"]),
        ("/main/train-[12].jsonl", ["main/train-1.jsonl"]),
        ("/*/*/train-*.jsonl", ["main/more/train-2.jsonl"]),
        ("/main/**/train-*.jsonl", [name for name in sorted(NAMES) if "train" in name]),
        ("", ["all.jsonl"]),
    ],
)
def test_what_a_path_names_is_downloaded_once_and_nothing_else(
    inside: str, wanted: list[str], hub: Hub, tmp_path: Path
) -> None:
    (found,) = read(hub, tmp_path, OPEN + inside)
    assert names(found) == wanted
    assert sorted(hub.downloads) == wanted
    # The check at the start and the reading are of one commit.
    assert len([path for path in hub.requests if "/revision/" in path]) == 1
    (again,) = read(hub, tmp_path, OPEN + inside)
    assert again == found and sorted(hub.downloads) == wanted
    before = len(hub.requests)
    (offline,) = read(hub, tmp_path, OPEN + inside, HF_HUB_OFFLINE="1")
    assert offline == found and len(hub.requests) == before


def test_a_revision_can_be_named(hub: Hub, tmp_path: Path) -> None:
    for revision in COMMITS:
        (found,) = read(hub, tmp_path, f"{OPEN}@{revision}/all.jsonl")
        assert found["records"] == [{"revision": revision, "name": "all.jsonl"}]


def test_private_data_sets_are_read_with_a_token(hub: Hub, tmp_path: Path) -> None:
    paths = [f"hf://datasets/org/{name}/all.jsonl" for name in ("private", "gated")]
    for outcome in read(hub, tmp_path, *paths):
        for part in ("org/", "HF_TOKEN", "`hf auth login`", "network"):
            assert part in outcome["error"]
    for outcome in read(hub, tmp_path, *paths, HF_TOKEN=USER_TOKEN):
        assert names(outcome) == ["all.jsonl"]


NOT_THERE = (
    ("hf://datasets/org/none/all.jsonl", ["Repository Not Found", "HF_TOKEN"]),
    (f"{OPEN}@v9/all.jsonl", ["Revision Not Found", "/v9"]),
    (f"{OPEN}/all.json", ["no such file", "/datasets/org/open/tree/main."]),
    (f"{OPEN}@v1/none", ["no such file", "/datasets/org/open/tree/v1."]),
    (f"{OPEN}/*.csv", ["no such file, folder or glob pattern"]),
    (f"{OPEN}/README.md", ["unknown file type '.md'"]),
    ("hf://org/open/all.jsonl", ["write hf://datasets/ORG/NAME[@REVISION]/PATH"]),
    ("hf://datasets/open", ["write hf://datasets/ORG/NAME[@REVISION]/PATH"]),
    (f"{OPEN}@/all.jsonl", ["write hf://datasets/ORG/NAME[@REVISION]/PATH"]),
    ("hf:datasets/org/open", ["write hf://datasets/ORG/NAME[@REVISION]/PATH"]),
    ("hf://datasets/org/not so/x.csv", ["org/not so", "alphanumeric"]),
)


def test_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    outcomes = read(hub, tmp_path, *(path for path, _ in NOT_THERE))
    for (path, parts), outcome in zip(NOT_THERE, outcomes, strict=True):
        assert path in outcome["error"] or path.endswith(".md")
        for part in parts:
            assert part in outcome["error"]


def test_without_a_network_the_cache_is_read(hub: Hub, tmp_path: Path) -> None:
    read(hub, tmp_path, f"{OPEN}/main/test.jsonl")
    paths = [f"{OPEN}/main/test.jsonl", "hf://datasets/org/gated/all.jsonl"]
    for broken in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        there, missing = read(hub, tmp_path, *paths, **broken)
        assert names(there) == ["main/test.jsonl"]
        assert missing["error"].startswith(f"{paths[1]!r} cannot be read: ")
        assert "Check the name and the network" in missing["error"]
