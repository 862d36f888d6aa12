"""A run without progress is told about, and ends where it may; even if a device hangs."""

import subprocess
import sys

import pytest

SCRIPT = """
import threading, time
from unittest import mock
import jax
from rlt_jax import watchdog
watchdog.DEVICE_SECONDS = 0.5
watchdog.progress("step 3")
with mock.patch.object(jax, "local_devices", {devices}):
    watchdog.start(1.0, {ends})
    {work}
"""
HANG = "threading.Event().wait(60)"


def run(devices: str, ends: bool, work: str = HANG) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(devices=devices, ends=ends, work=work)
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    "devices",
    [
        "lambda: []",
        "lambda: threading.Event().wait(60)",
        "lambda: 1 / 0",
    ],
)
def test_a_stalled_run_ends(devices: str) -> None:
    done = run(devices, ends=True)
    assert done.returncode == 75
    assert "no progress for" in done.stderr and "step 3" in done.stderr
    assert "in wait" in done.stderr  # where the thread stands
    assert "ended by --stall_exit" in done.stderr


def test_a_stalled_run_may_go_on() -> None:
    done = run("lambda: []", ends=False, work="time.sleep(2.5)")
    assert done.returncode == 0
    assert done.stderr.count("no progress for") == 2  # after 1 and 2 seconds


def test_a_run_with_progress_is_left_alone() -> None:
    work = "[(time.sleep(0.2), watchdog.progress('x')) for _ in range(10)]"
    done = run("lambda: []", ends=True, work=work)
    assert (done.returncode, done.stderr) == (0, "")
