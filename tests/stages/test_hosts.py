"""Several processes as a user starts them: alone, in disagreement, killed, asked to stop."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.conftest import heeding_ctrl_c

Section = Callable[[str], dict[str, Any]]
ROOT = Path(__file__).parents[2]
CONFIG = """
import json, ml_collections
def get_config(stage="sft"):
    section = json.loads(%r)[stage]
    return ml_collections.ConfigDict({"seed": 0, "pipeline": ("it",), "it": section})
"""
STEPS = 100_000  # more than anybody waits for
SECONDS = 240  # a hang, on any machine


@pytest.fixture
def config(section: Section, tmp_path: Path) -> Path:
    """A config of an endless stage, `sft` or `config.py:rl`, on up to 4 devices."""
    sft, rl = section("sft"), section("rl")
    endless = {"steps": STEPS, "checkpoint_every": STEPS}
    sft["sft"] |= endless | {"batch_size": 4}
    rl["loop"] |= endless
    rl["rows"] |= {"micro_batch_size": 4}
    file = sft | {"data": {"task": "file", "path": "traces.jsonl"}}
    sections = {"sft": sft, "rl": rl, "file": file}
    config = tmp_path / "config.py"
    config.write_text(CONFIG % json.dumps(sections))
    return config


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts process `index` of `count`, which meet at a port of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []

    def start(
        config: Any, index: int, count: int, *flags: str, cwd: Path = ROOT
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rlt_jax.main", f"--config={config}"]
        command += [f"--workdir={tmp_path / 'run'}", *flags]
        if count > 1:
            command += [f"--coordinator_address={address}", f"--process_id={index}"]
            command += [f"--num_processes={count}"]
        with heeding_ctrl_c():
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Status and messages of a process, which has to end."""
    _, messages = process.communicate(timeout=SECONDS)
    return process.returncode, messages


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    """Until a file has something in it."""
    while not (file.is_file() and file.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize("index", [0, 1])
def test_one_of_two_alone_gives_up(index: int, config: Path, start: Callable) -> None:
    status, messages = ended(start(config, index, 2, "--init_timeout=2"))
    assert status == 1
    assert f"rlt_jax: process {index} of 2 timed out waiting for" in messages
    assert "Traceback" not in messages


def test_flags_that_belong_together(config: Path, start: Callable) -> None:
    status, messages = ended(start(config, 0, 1, "--process_id=0"))
    assert status == 1
    assert "--coordinator_address and --num_processes missing" in messages


def test_different_configs_are_told_everywhere(config: Path, start: Callable) -> None:
    processes = [start(config, index, 2, f"--config.seed={index}") for index in (0, 1)]
    for status, messages in map(ended, processes):
        assert status == 1
        assert "config.seed is 0 in process 0, but 1 in process 1" in messages
        assert "Traceback" not in messages


def test_tasks_of_slurm_meet_without_flags(
    config: Path, start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))  # the port comes from it
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
    processes = []
    for index in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", index)
        monkeypatch.setenv("SLURM_LOCALID", index)
        processes.append(start(config, 0, 1, f"--config.seed={index}"))
    for status, messages in map(ended, processes):
        assert status == 1
        assert "config.seed is 0 in process 0, but 1 in process 1" in messages


def test_data_files_that_differ(config: Path, start: Callable, tmp_path: Path) -> None:
    processes = []
    for index, solution in enumerate(("2", "two")):
        row = {"question": "1+1?", "solution": solution, "reasoning_trace": "1+1=2"}
        host = tmp_path / f"host{index}"
        host.mkdir()
        (host / "traces.jsonl").write_text(json.dumps(row) + "\n")
        processes.append(start(f"{config}:file", index, 2, cwd=host))
    for status, messages in map(ended, processes):
        assert status == 1
        assert "the traces of data must be the same in all 2 processes" in messages
        assert "Traceback" not in messages


def test_an_error_in_one_process_ends_the_other(
    config: Path, start: Callable, tmp_path: Path
) -> None:
    away = tmp_path / "away"
    away.mkdir()
    first = start(config, 0, 2, "--workdir=run", cwd=tmp_path)
    second = start(config, 1, 2, "--workdir=run", cwd=away)
    (status, told), (failed, messages) = ended(first), ended(second)
    assert (status, failed) == (1, 1)
    assert "rlt_jax: process 1 of 2: run/it, which process 0 has made" in messages
    assert "ends, as another process failed: process 1 of 2: run/it" in told
    assert "Traceback" not in told + messages


def test_a_process_that_is_killed_ends_the_other(
    config: Path, start: Callable, tmp_path: Path
) -> None:
    flag = "--heartbeat_timeout=30"
    first, second = (start(config, index, 2, flag) for index in (0, 1))
    wait_for(tmp_path / "run/it/metrics.jsonl", first)
    second.send_signal(signal.SIGKILL)
    status, messages = ended(first)
    # JAX aborts the process where a collective that waits for the other holds the GIL.
    assert status in (75, -signal.SIGABRT), messages
    lost = ("process 1 has not answered", "another process, or the network to it")
    if status == 75:
        assert any(text in messages for text in lost)
        assert "stack trace" not in messages and "Traceback" not in messages


# Checkpoints of every step, as Orbax has a way of its own to react to preemption.
@pytest.mark.parametrize(
    ("stage", "count", "number", "flags"),
    [
        ("sft", 1, signal.SIGINT, []),
        pytest.param("sft", 1, signal.SIGHUP, [], marks=pytest.mark.slow),
        pytest.param(
            *("rl", 2, signal.SIGTERM, ["--config.it.loop.checkpoint_every=1"]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_signal_saves_and_stops_all(
    stage: str,
    count: int,
    number: signal.Signals,
    flags: list[str],
    config: Path,
    start: Callable,
    tmp_path: Path,
) -> None:
    processes = [start(f"{config}:{stage}", i, count, *flags) for i in range(count)]
    wait_for(tmp_path / "run/it/metrics.jsonl", processes[0])
    processes[-1].send_signal(number)
    for status, messages in map(ended, processes):
        assert status == 128 + number
        assert "stopped by a signal, all is saved" in messages
        assert "Traceback" not in messages
    (saved,) = (tmp_path / "run/it/checkpoints").iterdir()
    rows = (tmp_path / "run/it/metrics.jsonl").read_text().splitlines()
    assert 1 < int(saved.name) == len(rows)


@pytest.mark.parametrize("count", [1, 2])
def test_a_second_signal_kills(
    count: int, config: Path, start: Callable, tmp_path: Path
) -> None:
    process, *_ = [start(config, index, count) for index in range(count)]
    wait_for(tmp_path / "run/it/settings.json", process)
    # The first step is still to be compiled.
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.2)
    status, messages = ended(process)
    assert status == 130
    assert "a second signal ends it at once" in messages
    assert "all is saved" not in messages
