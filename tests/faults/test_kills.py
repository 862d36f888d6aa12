"""Runs that are killed or stopped at random moments leave what an undisturbed one leaves."""

import contextlib
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.conftest import Run, Start, Whole, assert_same_run


@pytest.mark.parametrize(
    ("number", "status", "count"),
    [
        (signal.SIGKILL, -signal.SIGKILL, 2),
        (signal.SIGTERM, 143, 1),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, 30, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, 10, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_disturbed_goes_on(
    number: signal.Signals,
    status: int,
    count: int,
    start: Start,
    run: Run,
    whole: Whole,
    tmp_path: Path,
) -> None:
    moments = random.Random(count)
    disturbed, workdir = 0, tmp_path / "0"
    while disturbed < count:
        process = start(workdir)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0.2, 0.9) * whole.seconds)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors
        if process.returncode == 0:  # it was complete before
            assert_same_run(workdir, whole.workdir)
            workdir = tmp_path / str(disturbed)
        else:
            assert process.returncode == status, errors
            disturbed += 1
    assert run(workdir)[0] == 0
    assert_same_run(workdir, whole.workdir)
