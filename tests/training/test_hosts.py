"""What tells a process that it is one of several; several are in stages/test_hosts.py."""

import signal
import socket
import subprocess
import sys

import pytest

from rlt_jax.errors import UserError
from rlt_jax.training import hosts
from tests.conftest import heeding_ctrl_c

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(("tasks", "several"), [(None, False), (1, False), (2, True)])
def test_slurm_steps_of_several_tasks(
    tasks: int | None, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    if tasks is not None:
        monkeypatch.setenv("SLURM_NTASKS", str(tasks))
    assert hosts._in_cluster() == several


def test_one_process_connects_to_nobody() -> None:
    hosts.connect(None, None, None)
    assert hosts.is_first()
    assert not hosts.stopping()
    hosts.agree("everything", {"x": 1})
    assert hosts.from_first(lambda: (1, 2)) == (1, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a:1", None, None), "--num_processes and --process_id missing"),
        ((None, None, 0), "--coordinator_address and --num_processes missing"),
        (("a", 2, 0), "give HOST:PORT"),
        (("a:1", 2, 2), "an id from 0"),
    ],
)
def test_flags_that_do_not_fit(flags: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hosts.connect(*flags)


# Each signal has 0.2 s to reach the thread that handles it.
ASKED = """
import os, signal, sys, time
from rlt_jax.training import hosts

def work():
    for number in map(int, sys.argv[2:]):
        os.kill(os.getpid(), number)
        time.sleep(0.2)
    hosts.stop_if_asked()

if sys.argv[1]:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
hosts.listen()
hosts.guard(work)
"""


@pytest.mark.parametrize(
    ("ignores", "signals", "status", "saved"),
    [
        ("", [signal.SIGHUP], 129, True),
        ("", [signal.SIGHUP, signal.SIGHUP], 129, True),
        ("", [signal.SIGTERM, signal.SIGHUP], 143, True),
        ("", [signal.SIGHUP, signal.SIGTERM], 143, False),
        ("ignores", [signal.SIGHUP], 0, False),
    ],
)
def test_a_lost_terminal(
    ignores: str, signals: list[int], status: int, saved: bool
) -> None:
    command = [sys.executable, "-c", ASKED, ignores, *(str(int(x)) for x in signals)]
    with heeding_ctrl_c():
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("all is saved" in done.stderr) == saved


# A second after JAX has begun to wait for process 0, which never comes.
WAITS = """
import os, signal, sys, threading
import jax
from rlt_jax.training import hosts

def initialize(*args, wait=jax.distributed.initialize, **options):
    threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()
    wait(*args, **options)

jax.distributed.initialize = initialize
signal.signal(signal.SIGINT, lambda *_: os._exit(130))
hosts.connect(sys.argv[1], 2, 1, 20)
"""


def test_ctrl_c_while_the_other_processes_are_awaited() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", WAITS, address]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
