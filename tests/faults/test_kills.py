"""Runs that are disturbed leave what an undisturbed one leaves."""

import contextlib
import errno
import itertools
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.conftest import SECONDS, Run, Start, assert_same_run


def test_a_run_that_is_killed_and_then_out_of_space(
    start: Start, run: Run, whole: Path, shim: str, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    process = start(workdir)
    while process.poll() is None and not (workdir / "teach/metrics.jsonl").exists():
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    full = {"LD_PRELOAD": shim, "FAILING_FOLDER": str(workdir), "FAILING_AT": "40"}
    status, errors = run(workdir, environment=full | {"FAILING_FOREVER": "1"})
    assert status == 75, errors
    assert os.strerror(errno.ENOSPC) in errors and "Traceback" not in errors
    assert not (workdir / "show" / "done.json").exists()
    assert run(workdir)[0] == 0
    assert_same_run(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "count"),
    [(signal.SIGKILL, -signal.SIGKILL, 30), (signal.SIGTERM, 143, 10)],
)
def test_a_run_that_is_disturbed_at_random_goes_on(
    number: signal.Signals,
    status: int,
    count: int,
    start: Start,
    run: Run,
    whole: Path,
    seconds: float,
    tmp_path: Path,
) -> None:
    moments, folders = random.Random(count), map(str, itertools.count())
    disturbed, workdir = 0, tmp_path / next(folders)
    while disturbed < count:
        process = start(workdir)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0.2, 0.9) * seconds)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors
        if process.returncode == 0:  # it was complete before
            assert_same_run(workdir, whole)
            workdir = tmp_path / next(folders)
        else:
            # Before it listens and after the last stage, the signal itself ends it.
            assert process.returncode in (status, -number), errors
            disturbed += 1
    assert run(workdir)[0] == 0
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_at_random_go_on(
    start: Start, tmp_path: Path
) -> None:
    moments, folders = random.Random(2), map(str, itertools.count())
    whole, workdir = tmp_path / "whole", tmp_path / next(folders)
    assert ended(*start_two(start, whole)) == [0, 0]
    began = time.monotonic()
    assert ended(*start_two(start, tmp_path / "again")) == [0, 0]
    seconds, disturbed = time.monotonic() - began, 0
    while disturbed < 3:
        pair = start_two(start, workdir)
        with contextlib.suppress(subprocess.TimeoutExpired):
            pair[0].wait(moments.uniform(0.2, 0.6) * seconds)
        killed = moments.choice((0, 1))
        pair[killed].kill()
        statuses = ended(*pair)
        if statuses == [0, 0]:  # it was complete before
            assert_same_run(workdir, whole)
            workdir = tmp_path / next(folders)
        else:
            assert statuses[killed] == -signal.SIGKILL
            # JAX itself aborts one that has lost process 0, or waits in a collective.
            assert statuses[1 - killed] in (75, -signal.SIGABRT)
            disturbed += 1
    assert ended(*start_two(start, workdir)) == [0, 0]
    assert_same_run(workdir, whole)


def start_two(start: Start, workdir: Path) -> tuple[subprocess.Popen[str], ...]:
    """Both processes of a run, which meet at a port of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--coordinator_address={address}", "--num_processes=2"]
    flags += ["--heartbeat_timeout=10"]
    environment = {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    return tuple(
        start(workdir, f"--process_id={index}", *flags, environment=environment)
        for index in (0, 1)
    )


def ended(*processes: subprocess.Popen[str]) -> list[int]:
    """Exit statuses; a traceback is an error."""
    for process in processes:
        _, errors = process.communicate(timeout=SECONDS)
        assert "Traceback" not in errors, errors
    return [process.returncode for process in processes]
