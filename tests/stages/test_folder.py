"""The folder of a stage: settings that may change, damaged files, and who works in it."""

import fcntl
import json
import multiprocessing
import os
import shutil
import socket
import sys
import threading
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


@pytest.mark.parametrize("content", ["", "[1]", '{"pid": 1', "{}"])
def test_a_lock_whose_file_is_damaged(content: str, tmp_path: Path) -> None:
    (tmp_path / ".a.lock").write_text(content)
    with lock.held(tmp_path, "a"):
        owner = json.loads((tmp_path / ".a.lock").read_text())
        assert owner["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("owner", [{"host": "elsewhere", "pid": 1}, {}])
def test_a_lock_that_is_held_is_never_taken(
    owner: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its count stands still, as that of a machine that is suspended."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.2)
    with (tmp_path / ".a.lock").open("w") as opened:
        json.dump(owner, opened)
        opened.flush()
        fcntl.flock(opened, fcntl.LOCK_EX)
        in_use = pytest.raises(UserError, match="in use by another run")
        with in_use, lock.held(tmp_path, "a"):
            pytest.fail("it works")


def test_the_file_of_a_lock_is_never_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.001)
    counts = []
    with lock.held(tmp_path, "a"):
        file = tmp_path / ".a.lock"
        for _ in range(500):
            if content := file.read_text():
                counts.append(json.loads(content)["count"])
    assert len(counts) > 490 and counts == sorted(counts) and counts[-1] > 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_lock_was_taken_over_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    ended = threading.Event()

    def end(status: int) -> None:
        assert status == 75
        ended.set()
        sys.exit()  # ends the thread that beats

    monkeypatch.setattr(os, "_exit", end)
    file = tmp_path / ".a.lock"
    with lock.held(tmp_path, "a"):
        new = {"host": "elsewhere", "pid": 7, "since": "now", "count": 0}
        with file.open("r+b") as opened:
            opened.write(json.dumps(new).encode().ljust(lock.SIZE))
        assert ended.wait(10)
    assert "another run has taken over" in capsys.readouterr().err
    assert json.loads(file.read_text()) == new  # it is not removed either


def start(root: Path, barrier: Any, dates: Any) -> None:
    barrier.wait(60)
    dates.put(folders.date_of_run(root))


def test_seeds_that_start_together_have_one_date(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, dates = context.Barrier(3), context.Queue()
    arguments = [tmp_path / "new" / "run", barrier, dates]
    runs = [context.Process(target=start, args=arguments) for _ in range(3)]
    for run in runs:
        run.start()
    found = {dates.get(timeout=60) for _ in runs}
    for run in runs:
        run.join()
    assert len(found) == 1


def test_a_stage_that_a_run_works_on_is_not_set_aside(
    section: Section, tmp_path: Path
) -> None:
    config = {"seed": 0, "pipeline": ("part",), "part": section("sft")}
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "settings.json").write_text('{"seed": 1}')
    in_use = pytest.raises(UserError, match="in use by another run")
    with lock.held(tmp_path, "part"), in_use:
        run_pipeline(ml_collections.ConfigDict(config), tmp_path, only="part")
    assert (folder / "settings.json").read_text() == '{"seed": 1}'


@pytest.mark.parametrize("done", [False, True])
def test_only_with_changes_continues(done: bool, tmp_path: Path) -> None:
    """Where the changes may be made; else the stage runs afresh, as without the flag."""
    old = {"stage": "sft", "seed": 0, "sft": {"steps": 3, "batch_size": 2}}
    folder = tmp_path / "part"

    def left(sft: dict[str, int], with_changes: bool) -> bool:
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps(old))
        if done:
            (folder / "done.json").write_text('{"stage": "sft"}')
        values = old | {"sft": sft}
        folders.set_aside("part", folder, values, with_changes)
        is_left = folder.is_dir()
        shutil.rmtree(folder, ignore_errors=True)
        return is_left

    longer = {"steps": 5, "batch_size": 2}
    assert left(longer, True)
    assert not left(longer, False)
    assert not left(longer | {"batch_size": 4}, True)
    assert left(old["sft"], True) == (not done)


def test_a_change_that_cannot_work_changes_nothing(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    settings = section("sft")
    folder = run_stage(settings, tmp_path)
    before = {x.name: x.read_bytes() for x in folder.iterdir() if x.is_file()}
    settings["sft"]["steps"] = 9
    settings["mesh"] = {"fsdp": 3}
    with pytest.raises(UserError, match="fsdp"):
        run_with_changes(settings, tmp_path)
    assert before == {x.name: x.read_bytes() for x in folder.iterdir() if x.is_file()}
