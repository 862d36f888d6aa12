"""A run that was killed and resumed leaves what an uninterrupted one leaves, exactly.

A killed run is a copy of the folder of a running one, taken at the moment of the kill.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rlt_jax.records import Record
from rlt_jax.training import checkpoint, hosts
from rlt_jax.training import metrics as training_metrics
from rlt_jax.training.metrics import read_jsonl

Section = Callable[[str], dict[str, Any]]
RunStage = Callable[[dict[str, Any], Path], Path]
# Records of steps after the checkpoint, the last one cut off.
LEFTOVERS = """{"step": 3, "split": "train", "value": 0}
{"step": 4, "split": "held_out", "value": 0}
{"step": 4, "val"""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of tmp_path/whole from when its first checkpoint had been written."""
    save, killed = checkpoint.save, tmp_path / "killed"

    def save_and_copy(manager: Any, *args: Any) -> None:
        save(manager, *args)
        manager.wait_until_finished()
        if not killed.exists():
            # Another thread may be writing checksums.
            partial = shutil.ignore_patterns("*.partial")
            shutil.copytree(tmp_path / "whole", killed, ignore=partial)

    monkeypatch.setattr(checkpoint, "save", save_and_copy)
    return killed


@pytest.mark.parametrize(
    ("stage", "rank", "optimizer"),
    [
        # tests/faults kills runs of these.
        pytest.param("sft", 0, "adamw", marks=pytest.mark.slow),
        pytest.param("rl", 0, "adamw", marks=pytest.mark.slow),
        pytest.param("sft", 2, "adamw", marks=pytest.mark.slow),
        ("rl", 2, "adamw"),
        ("taught", 0, "adamw"),
        pytest.param("sft", 0, "adafactor", marks=pytest.mark.slow),
        ("sft", 0, "muon"),
    ],
)
def test_training_resumes_bit_for_bit(
    stage: str,
    rank: int,
    optimizer: str,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    killed: Path,
) -> None:
    settings = section("rl" if stage == "taught" else stage)
    settings |= {"lora": {"rank": rank}}
    settings["optimizer"]["name"] = optimizer
    if stage == "taught":  # by a moving average of itself
        settings |= {"students": [], "reward_terms": {"correctness": {}}}
        settings |= {"teaching": {"kind": "reverse", "sync_alpha": 0.5}}
        settings["loop"]["role"] = "student"
    steps = 5
    whole = run_stage(settings, tmp_path / "whole")
    assert saved_steps(killed / "part") == [3]
    assert not (killed / "part" / "done.json").exists()
    for file in killed.glob("*/*.jsonl"):
        with file.open("a", encoding="utf-8") as lines:
            lines.write(LEFTOVERS)

    resumed = run_stage(settings, killed)
    assert [row["step"] for row in metric_rows(whole)] == list(range(steps))
    assert metric_rows(resumed) == metric_rows(whole)
    assert saved_steps(resumed) == saved_steps(whole) == [steps]
    items = assert_same_checkpoint(resumed, whole, steps)
    assert ("adapters" in items) == bool(rank)
    assert summary(resumed) == summary(whole)
    for file in whole.glob("samples.jsonl"):
        assert (resumed / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("every", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_held_out_records_survive_a_resume(
    every: int,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    killed: Path,
) -> None:
    """Those of the step of the checkpoint too; later ones are written again."""
    settings = section("rl")
    settings["loop"]["evaluate_every"] = every
    whole = run_stage(settings, tmp_path / "whole")
    before = held_out_steps(killed / "part")
    assert before == [step for step in (0, every) for _ in range(3)]
    with (killed / "part" / "samples.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(LEFTOVERS)
    resumed = run_stage(settings, killed)
    steps = {2: (0, 2, 4, 5), 3: (0, 3, 5)}[every]
    expected = [step for step in steps for _ in range(3)]
    assert held_out_steps(resumed) == held_out_steps(whole) == expected
    samples = [folder / "samples.jsonl" for folder in (resumed, whole)]
    assert samples[0].read_bytes() == samples[1].read_bytes()
    assert metric_rows(resumed) == metric_rows(whole)
    assert summary(resumed) == summary(whole)


def held_out_steps(folder: Path) -> list[int]:
    records = read_jsonl(folder / "samples.jsonl")
    return [record["step"] for record in records if record["split"] == "held_out"]


@pytest.mark.slow  # tests/faults sends SIGTERM to a run of all stages
@pytest.mark.parametrize("stage", ["sft", "rl", "collect", "evaluate"])
def test_a_run_that_was_asked_to_stop_goes_on(
    stage: str,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run_stage(section(stage), tmp_path / "whole")
    answers = iter([False, False, True])  # before the stage, then in it
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "stopping", lambda: next(answers))
        with pytest.raises(hosts.Stopped):
            run_stage(section(stage), tmp_path / "stopped")
    assert not (tmp_path / "stopped/part/done.json").exists()
    resumed = run_stage(section(stage), tmp_path / "stopped")
    assert summary(resumed) == summary(whole)
    if stage in ("sft", "rl"):
        assert metric_rows(resumed) == metric_rows(whole)
        assert_same_checkpoint(resumed, whole, 5)
    for file in (*whole.glob("samples.jsonl"), *whole.glob("traces.jsonl")):
        assert (resumed / file.name).read_bytes() == file.read_bytes()


def test_training_that_was_killed_after_its_last_step_only_ends(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    folder = run_stage(section("sft"), tmp_path)
    before = summary(folder), metric_rows(folder)
    (folder / "done.json").unlink()
    run_stage(section("sft"), tmp_path)
    assert (summary(folder), metric_rows(folder)) == before


@pytest.mark.parametrize(
    ("stage", "name"), [("collect", "traces.jsonl"), ("evaluate", "samples.jsonl")]
)
def test_sampling_continues_with_the_batch_that_was_cut_off(
    stage: str,
    name: str,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = run_stage(section(stage), tmp_path)
    whole, results = (folder / name).read_bytes(), summary(folder)
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 10
    (folder / "done.json").unlink()
    # Batches of 4: the second one lacks a line, and another is cut in half.
    (folder / name).write_bytes(b"".join(lines[:6]) + lines[6][:20])
    appended: list[int] = []

    def append(file: Path, records: list[Record]) -> None:
        if file == folder / name:
            appended.append(len(records))
        append_jsonl(file, records)

    append_jsonl = training_metrics.append_jsonl
    monkeypatch.setattr(training_metrics, "append_jsonl", append)
    run_stage(section(stage), tmp_path)
    assert appended == [4, 2]
    assert (folder / name).read_bytes() == whole
    assert summary(folder) == results


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def metric_rows(folder: Path) -> list[dict[str, float]]:
    rows = read_jsonl(folder / "metrics.jsonl")
    hidden = ("time/", "memory/")
    return [{k: v for k, v in r.items() if not k.startswith(hidden)} for r in rows]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "done.json").read_text(encoding="utf-8"))["summary"]


def assert_same_checkpoint(left: Path, right: Path, step: int) -> set[str]:
    """Same trees (parameters, optimizer, reference), same data position; their names."""
    name = f"checkpoints/{step}"
    items = {path.name for path in (left / name).iterdir() if path.is_dir()}
    assert items == {path.name for path in (right / name).iterdir() if path.is_dir()}
    assert items >= {"params", "optimizer", "data"}
    for item in items - {"data"}:
        trees = [read_tree(folder / name / item) for folder in (left, right)]
        jax.tree.map(np.testing.assert_array_equal, *trees)
    data = [(folder / name / "data" / "metadata") for folder in (left, right)]
    assert data[0].read_bytes() == data[1].read_bytes()
    return items


def read_tree(folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder)
