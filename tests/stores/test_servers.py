"""Stores behind servers on loopback: gs:// with faults, s3:// and hf://; the command."""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from rlt_jax import stores
from rlt_jax.data.tables import read_records
from rlt_jax.errors import StorageError, UserError
from tests.faults.conftest import CONFIG, ROOT
from tests.stages.conftest import SECTIONS
from tests.stores.servers import Bucket, gcs
from tests.stores.test_mirror import OnHost, content, run, write


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    gcsfs = pytest.importorskip("gcsfs")
    with gcs() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield bucket
        gcsfs.GCSFileSystem.clear_instance_cache()


def goes_on_elsewhere(url: str, on_host: OnHost) -> None:
    """Runs at a URL, and on another host from what is there; reads it as data, too."""
    with stores.workdir(url) as root:
        run(root, 2)
        left = content(root)
    on_host("other")
    with stores.workdir(url) as root:
        assert content(root).keys() == left.keys()
        run(root, 3)
    for path in ("rl/metrics.jsonl", "rl/*.jsonl", "**/metrics.jsonl", "rl"):
        rows = read_records(f"{url}/{path}")
        assert [r["step"] for _, r in rows if "step" in r] == [1, 2, 3], path
        if path == "rl/*.jsonl":
            break
    with pytest.raises(UserError, match="is not in the store"):
        stores.local(f"{url}/none.jsonl")


def test_gs(bucket: Bucket, on_host: OnHost) -> None:
    goes_on_elsewhere("gs://bucket/my/run", on_host)
    with (
        pytest.raises(UserError, match="gs://none/run: there is no such bucket"),
        stores.workdir("gs://none/run"),
    ):
        pytest.fail("it works")


def test_s3(monkeypatch: pytest.MonkeyPatch, on_host: OnHost) -> None:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {
            "ACCESS_KEY_ID": "a",
            "SECRET_ACCESS_KEY": "b",
            "DEFAULT_REGION": "us-east-1",
        }
        keys["ENDPOINT_URL"] = f"http://{host}:{port}"
        for name, value in keys.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        fsspec.filesystem("s3").mkdir("bucket")
        goes_on_elsewhere("s3://bucket/my/run", on_host)
    finally:
        server.stop()


def test_faults_that_pass(bucket: Bucket, on_host: OnHost) -> None:
    count = itertools.count()
    bucket.fault = lambda *_: 503 if next(count) % 5 == 3 else None
    with stores.workdir("gs://bucket/run") as root:
        write(root, {"rl/a.jsonl": "1\n"})
    bucket.fault = lambda *_: None
    on_host("other")
    with stores.workdir("gs://bucket/run") as root:
        assert content(root) == {"rl/a.jsonl": "1\n"}


def test_a_silent_server_is_left(
    bucket: Bucket, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "SILENCE", 0.2)
    monkeypatch.setattr(stores, "TRIES", 1)
    # gcsfs itself tries six times, and waits 31 seconds in between.
    at_once = SimpleNamespace(sleep=lambda _: asyncio.sleep(0))
    monkeypatch.setattr("gcsfs.retry.asyncio", at_once)
    bucket.fault = lambda *_: 2.0
    with (
        pytest.raises(StorageError, match="gs://bucket/run: .*is kept in"),
        stores.workdir("gs://bucket/run"),
    ):
        pytest.fail("it works")


def test_a_refusal(bucket: Bucket, on_host: OnHost) -> None:
    bucket.fault = lambda method, path: 403 if method == "POST" else None
    with (
        pytest.raises(UserError, match=r"gs://bucket/run: .*Forbidden.*rights"),
        stores.workdir("gs://bucket/run"),
    ):
        pytest.fail("it works")


class Hub(BaseHTTPRequestHandler):
    """A model on a Hugging Face Hub, with one file."""

    FILE = b'{"n": 1}\n'

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        entry = {"type": "file", "path": "a.jsonl", "size": len(self.FILE), "oid": "1"}
        body: bytes | Any = {"id": "me/model", "sha": "0" * 40, "siblings": []}
        if "/tree/" in self.path:
            body = [entry]
        if "/paths-info/" in self.path:
            body = [entry]
        if "/resolve/" in self.path:
            body = self.FILE
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        for name, value in (
            ("Content-Length", str(len(data))),
            ("Content-Type", "application/json"),
            ("ETag", '"1"'),
            ("X-Repo-Commit", "0" * 40),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def log_message(self, *args: object) -> None:
        pass


def test_hf(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = "from rlt_jax import stores; print(stores.local('hf://me/model'))"
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub")}
    try:
        result = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 0, result.stderr
    assert (Path(result.stdout.strip()) / "a.jsonl").read_bytes() == Hub.FILE


def command(bucket: Bucket, folder: Path, cache: str, before: str = "") -> Any:
    """Exit status and standard error of the command, with the cache of a host."""
    sft = {"seed": 0, **SECTIONS["sft"]}
    file = folder / "config.py"
    file.write_text(CONFIG % json.dumps(sft), encoding="utf-8")
    start = f"{before}\nfrom rlt_jax.main import cli\ncli()"
    result = subprocess.run(
        [sys.executable, "-c", start]
        + [f"--config={file}", "--workdir=gs://bucket/run"],
        env=os.environ
        | bucket.environment
        | {"XDG_CACHE_HOME": str(folder / cache), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return result.returncode, result.stderr


@pytest.mark.slow
def test_the_command(bucket: Bucket, tmp_path: Path) -> None:
    # The store fails for good after the first checkpoint.
    puts = itertools.count()
    bucket.fault = lambda method, path: (
        503 if "checkpoints%2F5" in path or next(puts) > 30 else None
    )
    impatient = "from rlt_jax import stores; stores.TRIES = 1"
    status, errors = command(bucket, tmp_path, "first", impatient)
    assert status == 75, errors
    assert "gs://bucket/run: " in errors and "is kept in" in errors
    assert "Traceback" not in errors
    bucket.fault = lambda *_: None
    status, errors = command(bucket, tmp_path, "second")
    assert status == 0, errors
    # On the first host the copy is behind now; all is complete.
    status, errors = command(bucket, tmp_path, "first")
    assert status == 0, errors
    assert "stage sft is complete" in errors
