"""Data and models at URLs are downloaded once, and read as those in folders."""

import json
from pathlib import Path

import pytest

from rlt_jax import stores
from rlt_jax.chat import _stage
from rlt_jax.data.tables import find_files, read_records
from rlt_jax.data.templates import load_template
from rlt_jax.data.tokenizer import SHIPPED, load_tokenizer
from rlt_jax.errors import UserError
from tests.stores.conftest import Memory
from tests.stores.test_mirror import OnHost

ROWS = {
    "a.jsonl": b'{"n": 1}\n',
    "b.jsonl": b'{"n": 2}\n',
    "deep/c.jsonl": b'{"n": 3}\n',
}


@pytest.fixture
def data(memory: Memory, on_host: OnHost) -> Memory:
    for name, content in ROWS.items():
        memory.put(f"/bucket/data/{name}", content)
    return memory


def numbers(path: str) -> list[int]:
    stores.local.cache_clear()
    return [row["n"] for _, row in read_records(path)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.jsonl", [1]),
        ("", [1, 2]),
        ("/", [1, 2]),
        ("*.jsonl", [1, 2]),
        ("[b-z].jsonl", [2]),
        ("**/*.jsonl", [1, 2, 3]),
        ("deep", [3]),
    ],
)
def test_files_folders_and_patterns(
    path: str, expected: list[int], data: Memory
) -> None:
    assert numbers(f"memory://bucket/data/{path}") == expected


def test_a_version_is_downloaded_once(data: Memory) -> None:
    def downloads() -> int:
        return [name for name, _ in data.calls].count("get_file")

    path = "memory://bucket/data/a.jsonl"
    assert (numbers(path), numbers(path), downloads()) == ([1], [1], 1)
    data.put("/bucket/data/a.jsonl", b'{"n": 4}\n')
    assert (numbers(path), numbers(path), downloads()) == ([4], [4], 2)


@pytest.mark.parametrize("path", ["x.jsonl", "x/*.jsonl", "none"])
def test_a_missing_object_is_one_message(path: str, data: Memory) -> None:
    with pytest.raises(UserError, match=f"memory://bucket/data/.*{path[-4:]}' is not"):
        find_files(f"memory://bucket/data/{path}")


def test_a_bad_row_is_named_by_the_path_of_its_object(data: Memory) -> None:
    data.put("/bucket/data/a.jsonl", b"{\n")
    ((_, row),) = read_records("memory://bucket/data/a.jsonl")
    assert "memory/bucket/data/" in str(row) and "a.jsonl, line 1" in str(row)


def test_tokenizers_and_templates(memory: Memory, on_host: OnHost) -> None:
    for file in SHIPPED["embedded"].iterdir():
        if file.is_file():
            memory.put(f"/bucket/model/{file.name}", file.read_bytes())
    ours = load_tokenizer("embedded")
    read = load_tokenizer("memory://bucket/model")
    assert read.vocab_size == ours.vocab_size
    assets = Path(stores.__file__).parent / "data" / "assets"
    (tiny,) = assets.rglob("tiny.json")
    memory.put("/bucket/tiny.json", tiny.read_bytes())
    assert load_template("memory://bucket/tiny.json") == load_template("tiny")


@pytest.mark.parametrize("model", ["rl", "rl/best"])
@pytest.mark.parametrize("workdir", ["memory://bucket/run", None])
def test_chat_reads_the_settings_of_a_stage_in_a_store(
    model: str, workdir: str | None, memory: Memory, on_host: OnHost
) -> None:
    settings = json.dumps({"students": [{"path": "{workdir}/warm"}]})
    memory.put("/bucket/run/rl/settings.json", settings.encode())
    memory.put("/bucket/run/rl/best/model.json", b"{}")
    name = model if workdir else f"memory://bucket/run/{model}"
    path, stage = _stage(name, workdir)
    assert stage == {"students": [{"path": "memory:///bucket/run/warm"}]}
    assert path.endswith(model)
    assert (Path(path) / "model.json").is_file() == (model == "rl/best")
