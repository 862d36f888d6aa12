"""Runs that are disturbed leave what an undisturbed one leaves."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Run, Start, assert_same_run


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
    moments = random.Random(count)
    disturbed, workdir = 0, tmp_path / "0"
    while disturbed < count:
        process = start(workdir)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0.2, 0.9) * seconds)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors
        if process.returncode == 0:  # it was complete before
            assert_same_run(workdir, whole)
            workdir = tmp_path / str(disturbed)
        else:
            assert process.returncode == status, errors
            disturbed += 1
    assert run(workdir)[0] == 0
    assert_same_run(workdir, whole)
