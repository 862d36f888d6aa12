"""The folder of a stage: settings that may change, damaged files, and who works in it."""

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from rlt_jax.errors import UserError
from rlt_jax.stages import folder as folders
from rlt_jax.stages import lock, run_pipeline
from rlt_jax.training.metrics import read_jsonl

Section = Callable[[str], dict[str, Any]]
RunStage = Callable[[dict[str, Any], Path], Path]


def run_with_changes(section: dict[str, Any], workdir: Path) -> None:
    config = {"seed": 0, "pipeline": ("part",), "part": section}
    run_pipeline(ml_collections.ConfigDict(config), workdir, with_changes=True)


def test_a_complete_stage_goes_on_with_more_steps(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    short, long = section("sft"), section("sft")
    for settings in (short, long):
        settings["optimizer"] = {"learning_rate": 1e-2, "schedule": "constant"}
        settings["sft"] |= {"evaluate_every": 0, "max_skipped": 5}
    short["sft"]["steps"] = 3
    whole = run_stage(long, tmp_path / "whole")
    part = run_stage(short, tmp_path / "part")
    with pytest.raises(
        UserError, match=r"sft.steps was 3, is 5.*--resume_with_changes"
    ):
        run_stage(long, tmp_path / "part")
    long["sft"]["max_skipped"] = 7
    run_with_changes(long, tmp_path / "part")
    losses = [
        [row["sft/loss"] for row in read_jsonl(x / "metrics.jsonl")]
        for x in (whole, part)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    (record,) = read_jsonl(part / "changes.jsonl")
    assert record["changes"] == {
        "sft.max_skipped": {"before": 5, "now": 7},
        "sft.steps": {"before": 3, "now": 5},
    }
    assert json.loads((part / "settings.json").read_text())["sft"]["steps"] == 5
    run_stage(long, tmp_path / "part")  # nothing is left to do


def test_other_changes_stay_refused(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    settings = section("sft")
    folder = run_stage(settings, tmp_path)
    settings["optimizer"]["learning_rate"] = 1.0
    # Nothing would be trained with it.
    with pytest.raises(UserError, match="learning_rate was 0.01, is 1.0") as error:
        run_with_changes(settings, tmp_path)
    assert "resume_with_changes" not in str(error.value)
    (folder / "done.json").unlink()
    run_with_changes(settings, tmp_path)
    settings["sft"]["row_length"] = 256
    (folder / "done.json").unlink()
    with pytest.raises(UserError, match=r"sft.row_length was 128, is 256") as error:
        run_with_changes(settings, tmp_path)
    assert "resume_with_changes" not in str(error.value)


@pytest.mark.parametrize("content", ["", '{"sta', "[]", "\x00\x00"])
def test_damaged_files_of_a_stage(
    content: str,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = run_stage(section("evaluate"), tmp_path)
    before = (folder / "samples.jsonl").read_bytes()
    done = json.loads((folder / "done.json").read_text())
    (folder / "done.json").write_text(content)
    run_stage(section("evaluate"), tmp_path)
    assert "done.json is damaged" in caplog.text
    again = json.loads((folder / "done.json").read_text())
    assert again["summary"] == done["summary"]
    (folder / "done.json").unlink()
    (folder / "sessions.json").write_text(content)
    run_stage(section("evaluate"), tmp_path)
    assert "sessions.json is damaged" in caplog.text
    assert (folder / "samples.jsonl").read_bytes() == before
    (folder / "settings.json").write_text(content)
    with pytest.raises(UserError, match="settings.json is damaged.* remove that file"):
        run_stage(section("evaluate"), tmp_path)
    (folder / "settings.json").unlink()
    assert run_stage(section("evaluate"), tmp_path) == folder


def test_a_damaged_line_is_named(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    folder = run_stage(section("collect"), tmp_path)
    (folder / "done.json").unlink()
    lines = (folder / "traces.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:30] + b"\n"
    (folder / "traces.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"traces.jsonl:2 is damaged.*--only=part"):
        run_stage(section("collect"), tmp_path)


def test_lost_metrics_are_told(
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = run_stage(section("sft"), tmp_path)
    (folder / "done.json").unlink()
    (folder / "metrics.jsonl").unlink()
    run_stage(section("sft"), tmp_path)
    assert "has 0 of the 5 steps before the checkpoint" in caplog.text


def hold(root: Path, held: Any, release: Any) -> None:
    with lock.held(root, "a"):
        held.set()
        release.wait(60)


def test_two_runs_do_not_work_in_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=[tmp_path, held, release])
    other.start()
    assert held.wait(60)
    with (
        pytest.raises(
            UserError, match=f"process {other.pid} on {socket.gethostname()}"
        ),
        lock.held(tmp_path, "a"),
    ):
        pass
    with lock.held(tmp_path, "b"):  # another stage
        pass
    other.kill()  # its lock is taken over at once
    other.join()
    assert (tmp_path / ".a.lock").exists()
    with lock.held(tmp_path, "a"):
        owner = json.loads((tmp_path / ".a.lock").read_text())
        assert owner["pid"] == os.getpid() and owner["since"]
    assert not list(tmp_path.iterdir())


def test_the_lock_of_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    file = tmp_path / ".a.lock"
    owner = {"host": "elsewhere", "pid": 1, "since": folders.now(), "count": 3}
    file.write_text(json.dumps(owner))
    with lock.held(tmp_path, "a"):  # its count stands still
        pass
    beats = iter(range(1000))
    monkeypatch.setattr(lock, "_owner", lambda _: owner | {"count": next(beats)})
    with (
        pytest.raises(UserError, match="process 1 on elsewhere"),
        lock.held(tmp_path, "a"),
    ):
        pass


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_try_lock", lambda _: None)
    file = tmp_path / ".a.lock"
    owner = {"host": socket.gethostname(), "since": folders.now(), "count": 3}
    file.write_text(json.dumps(owner | {"pid": os.getpid()}))
    with (
        pytest.raises(UserError, match=f"process {os.getpid()} on"),
        lock.held(tmp_path, "a"),
    ):
        pass
    file.write_text(json.dumps(owner | {"pid": 2**30}))
    with lock.held(tmp_path, "a"):
        pass
