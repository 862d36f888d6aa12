"""A watchdog: where a run stands that has made no progress for too long.

Loops report every step, phase and batch to `progress`. After `timeout` seconds without a
report, where each thread stands goes to standard error, with the last report and the
memory of the devices; and once more each time that it doubles.
"""

import faulthandler
import os
import sys
import threading
import time

import jax

from rlt_jax.errors import tell

STALLED = 75  # exit status; see `hosts`
DEVICE_SECONDS = 10.0  # for what devices tell

_last = ["start", time.monotonic()]


def progress(what: str) -> None:
    """Reports what a run does now, or has just done."""
    _last[:] = what, time.monotonic()


def start(timeout: float, ends: bool) -> None:
    """Watches the run from a thread of its own.

    Args:
      timeout: seconds without progress.
      ends: whether to end the process then, with status 75.
    """
    args = [timeout, ends]
    threading.Thread(target=_watch, args=args, daemon=True, name="watchdog").start()


def _watch(timeout: float, ends: bool) -> None:
    seen, patience = None, timeout
    while True:
        time.sleep(min(timeout, 60.0) / 4)
        what, since = _last
        if since != seen:
            seen, patience = since, timeout
        if time.monotonic() - since > patience:
            patience *= 2
            _report(what, time.monotonic() - since)
            if ends:
                tell("ended by --stall_exit; the same command resumes the run")
                os._exit(STALLED)


def _report(what: str, seconds: float) -> None:
    stalled = f"no progress for {seconds:.0f} s since: {what}"
    tell(f"{stalled}. Threads, the most recent call first:")
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    # It may wait for what hangs, or fail.
    devices = threading.Thread(target=_report_devices, daemon=True)
    devices.start()
    devices.join(DEVICE_SECONDS)


def _report_devices() -> None:
    for device in jax.local_devices():
        used = (device.memory_stats() or {}).get("bytes_in_use")
        memory = "" if used is None else f": {used / 2**30:.1f} GiB in use"
        tell(f"{device}{memory}")
