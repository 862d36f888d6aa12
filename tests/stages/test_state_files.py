"""Files that a run keeps of itself: lost, damaged, of another kind, in another place."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from rlt_jax.errors import UserError
from rlt_jax.stages import folder as folders
from rlt_jax.stages import lock, run_pipeline
from rlt_jax.stages.rl_config import RLConfig
from rlt_jax.stages.rl_journal import forget_later
from rlt_jax.training.metrics import read_jsonl

Section = Callable[[str], dict[str, Any]]


@pytest.fixture
def config(section: Section) -> ml_collections.ConfigDict:
    """Predictions that are graded, two for each of five questions, and compared."""
    first = section("evaluate") | {"predictions": "{workdir}/predictions.jsonl"}
    first["data"] = {"task": "file", "path": "{workdir}/questions.jsonl"}
    first["evaluate"]["batch_size"] = 3
    second = json.loads(json.dumps(first))
    second["evaluate"]["compare_with"] = "{workdir}/first"
    sections = {"first": first, "second": second}
    pipeline = {"seed": 0, "pipeline": ("first", "second")}
    return ml_collections.ConfigDict(pipeline | sections)


@pytest.fixture
def root(config: ml_collections.ConfigDict, tmp_path: Path) -> Path:
    """The workdir of a complete run."""
    root = tmp_path / "run"
    root.mkdir()
    predict(root)
    run_pipeline(config, root)
    return root


def predict(root: Path) -> None:
    """Five questions, for each a right answer and a wrong one."""
    rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(5)]
    asked = [row | {"solution": row["answer"]} for row in rows]
    answers = [[f"<solution>{n + x}</solution>" for x in (1, 2)] for n in range(5)]
    given = [
        {"question": row["question"], "completions": texts}
        for row, texts in zip(rows, answers, strict=True)
    ]
    for name, records in (("questions", asked), ("predictions", given)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (root / f"{name}.jsonl").write_text(text)


def ran(root: Path) -> list[str]:
    """When the stages were complete."""
    names = ("first", "second")
    return [json.loads((root / x / "done.json").read_text())["finished"] for x in names]


@pytest.mark.parametrize(
    "content", [None, "", '{"da', "{}", '{"date": 5}', '{"date": null}', "[1]"]
)
def test_the_date_of_a_run_can_be_lost(
    content: str | None, root: Path, config: ml_collections.ConfigDict
) -> None:
    before, date = ran(root), json.loads((root / "run.json").read_text())["date"]
    (root / "run.json").unlink()
    if content is not None:
        (root / "run.json").write_text(content)
    run_pipeline(config, root)
    assert ran(root) == before
    assert json.loads((root / "run.json").read_text())["date"] == date


def test_a_workdir_can_be_moved(
    root: Path,
    config: ml_collections.ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, link = ran(root), tmp_path / "link"
    link.symlink_to(root)
    monkeypatch.chdir(tmp_path)
    places = [link, Path("run"), Path("run/../run"), tmp_path / "moved"]
    places.append(tmp_path / "copy")
    root_now = root
    for place in places:
        if place.name == "moved":
            root.rename(place)
        if place.name == "copy":
            shutil.copytree(root_now, place)
        root_now = place
        run_pipeline(config, place)
        assert ran(place) == before
    # What has changed is told nevertheless.
    config.first.evaluate.batch_size = 4
    with pytest.raises(UserError, match="evaluate.batch_size was 3, is 4"):
        run_pipeline(config, root_now)


@pytest.mark.parametrize("name", ["done.json", "sessions.json"])
@pytest.mark.parametrize(
    "values",
    [
        {"sessions": "x"},
        {"sessions": None},
        {"inputs": []},
        {"inputs": "abc"},
        {"inputs": {"first": [1]}},
        {"finished": ["a"]},
        {"workdir": 7},
        {"files": []},
        {"date": {}},
    ],
    ids=str,
)
def test_values_of_wrong_types(
    name: str, values: Any, root: Path, config: ml_collections.ConfigDict
) -> None:
    for stage in ("first", "second"):
        done = root / stage / "done.json"
        known = json.loads(done.read_text())
        if name != "done.json":
            done.unlink()
        (root / stage / name).write_text(json.dumps(known | values))
    samples = (root / "second" / "samples.jsonl").read_bytes()
    run_pipeline(config, root)
    assert (root / "second" / "samples.jsonl").read_bytes() == samples
    ran(root)


def test_settings_without_any_are_damaged(
    root: Path, config: ml_collections.ConfigDict
) -> None:
    (root / "first" / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="settings.json is damaged: it has no settings"):
        run_pipeline(config, root)


@pytest.mark.parametrize(
    "name",
    [
        *("run.json", ".run.json.lock", ".first.lock", "first/settings.json"),
        *("first/done.json", "first/sessions.json", "first/samples.jsonl"),
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_other_things_than_files(
    kind: str, name: str, root: Path, config: ml_collections.ConfigDict
) -> None:
    """A pipe would wait for ever for somebody who writes."""
    if name in ("first/sessions.json", "first/samples.jsonl"):
        (root / "first" / "done.json").unlink()
    file = root / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(file.name)
    try:
        run_pipeline(config, root)
    except UserError as error:
        assert f"{file.name} is no regular file" in str(error) or str(file) in str(
            error
        )
    else:
        ran(root)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 3, 4, 5, 6, 7, 8], "samples.jsonl:4 is about another question"),
        ([0, 1, 2, 2, 3, 4, 5, 6], "samples.jsonl:5 is about another question"),
        ([*range(10), 9], "samples.jsonl:11 is about another question"),
    ],
    ids=["lost", "twice", "too many"],
)
def test_rows_that_are_lost_or_there_twice(
    order: list[int], message: str, root: Path, config: ml_collections.ConfigDict
) -> None:
    (root / "first" / "done.json").unlink()
    file = root / "first" / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[n] for n in order))
    with pytest.raises(UserError, match=message):
        run_pipeline(config, root)


@pytest.mark.parametrize("row", [{}, {"question": "x"}, {"correct": "x"}], ids=str)
def test_rows_without_their_values(
    row: dict[str, Any], root: Path, config: ml_collections.ConfigDict
) -> None:
    (root / "first" / "done.json").unlink()
    file = root / "first" / "samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    kept = {key: x for key, x in json.loads(lines[1]).items() if row and key not in row}
    lines[1] = json.dumps(kept | row) + "\n"
    file.write_text("".join(lines))
    with pytest.raises(UserError, match=r"samples.jsonl:2 is (damaged|about another)"):
        run_pipeline(config, root)


def test_a_stage_that_is_read_has_lost_its_end(
    root: Path, config: ml_collections.ConfigDict
) -> None:
    file = root / "first" / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))
    run_pipeline(config, root)  # both are complete
    shutil.rmtree(root / "second")
    size, cut = sum(map(len, lines)), sum(map(len, lines[:-1]))
    with pytest.raises(UserError) as error:
        run_pipeline(config, root)
    assert f"{file} has {cut:,} bytes, but {size:,} when" in str(error.value)
    assert "--only=first" in str(error.value)
    run_pipeline(config, root, only="first")
    run_pipeline(config, root)
    ran(root)


def test_what_later_steps_have_left_is_dropped(tmp_path: Path) -> None:
    """A policy of other settings is not the best, nor are its completions read again."""
    best, rollouts = tmp_path / "best/checkpoints/3", tmp_path / "rollouts"
    c = RLConfig(steps=9, batch_size=1, group_size=2, rollouts=str(rollouts))
    best.mkdir(parents=True)
    (best / "_CHECKPOINT_METADATA").touch()
    rollouts.mkdir()
    kept = {f"{step:06d}.jsonl" for step in range(4)}
    for name in kept:
        (rollouts / name).touch()
        os.utime(rollouts / name, (1000, 1000))
    forget_later(tmp_path, c, 3)
    assert best.is_dir() and {file.name for file in rollouts.iterdir()} == kept
    forget_later(tmp_path, c, 2)
    assert not best.parents[1].exists()
    assert {file.name for file in rollouts.iterdir()} == kept
    (tmp_path / "changes.jsonl").touch()
    os.utime(tmp_path / "changes.jsonl", (2000, 2000))
    (rollouts / "000003.jsonl").touch()  # since the change
    forget_later(tmp_path, c, 1)
    assert {file.name for file in rollouts.iterdir()} == kept - {
        "000001.jsonl",
        "000002.jsonl",
    }


def test_the_lock_of_a_stage_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".part.lock")
    with (
        pytest.raises(UserError, match="part.lock is no regular file"),
        lock.held(tmp_path, "part"),
    ):
        pass


def test_sessions_keep_the_workdir(root: Path) -> None:
    done = json.loads((root / "first" / folders.DONE).read_text())
    assert done["workdir"] == str(root)
    size = (root / "first" / "samples.jsonl").stat().st_size
    assert done["files"]["samples.jsonl"] == size
    assert len(read_jsonl(root / "first" / "samples.jsonl")) == 10
