"""One device, eight, and two processes with four each do the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from rlt_jax.stages import run_pipeline
from rlt_jax.training import hosts
from rlt_jax.training.metrics import append_jsonl, read_jsonl

Section = Callable[[str], dict[str, Any]]
Sections = dict[str, dict[str, Any]]

ROOT = Path(__file__).parents[2]
CONFIG = """
import json, ml_collections
def get_config():
    return ml_collections.ConfigDict(json.loads(%r))
"""
EIGHT = [sys.executable, "-m", "rlt_jax.main"]
POD = [str(ROOT / "launch/local_pod.sh"), "2", "--grace_seconds=200"]
# Of the machine, of the slots, which are rounded up on every device, and of the last
# bits of weights, which provenance hashes.
OF_DEVICES = ("time/", "memory/", "rollout/occupancy", "provenance")
FILES = ("metrics", "samples")  # of rl
STOPPED = 128 + signal.SIGTERM
SECONDS = 300  # a hang, on any machine


def start(
    command: list[str], sections: Sections, workdir: Path
) -> subprocess.Popen[str]:
    """Runs sections from the command line."""
    file = workdir.with_name(f"{workdir.name}.py")
    config = {"seed": 0, "pipeline": list(sections), **sections}
    file.write_text(CONFIG % json.dumps(config), encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [*command, f"--config={file}", f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(command: list[str], sections: Sections, workdir: Path) -> None:
    """To the end."""
    process = start(command, sections, workdir)
    messages, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, messages


def run_and_stop(command: list[str], sections: Sections, workdir: Path) -> None:
    """Asks for a stop before the first step, so that it comes after one."""
    process = start(command, sections, workdir)
    while not (workdir / next(iter(sections)) / "settings.json").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    messages, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == STOPPED, messages
    assert "all is saved" in messages
    assert not (workdir / next(iter(sections)) / "done.json").exists()


def run_here(sections: Sections, workdir: Path) -> None:
    """In this process, on one device."""
    config = {"seed": 0, "pipeline": tuple(sections), **sections}
    run_pipeline(ml_collections.ConfigDict(config), workdir)


def assert_close(ours: Any, theirs: Any, where: str) -> None:
    """The same structure, texts and whole numbers; floats to 1e-5."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for name in ours:
            if not name.startswith(OF_DEVICES):
                assert_close(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for n, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_close(*pair, f"{where}[{n}]")
    elif isinstance(ours, float):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=where)
    else:
        assert ours == theirs, where


def assert_same_files(one: Path, other: Path, *names: str) -> None:
    for name in names:
        ours, theirs = read_jsonl(one / name), read_jsonl(other / name)
        assert len(ours) >= 3
        assert_close(ours, theirs, f"{other.name}/{name}")


@pytest.fixture
def sections(section: Section, tmp_path: Path) -> Sections:
    """RL, traces of the policy, a student of them; scores of other explanations."""
    rows = [
        {"question": f"{n}+3?", "solution": str(n + 3), "completions": [f"{n}, 3", ""]}
        for n in range(3)
    ]
    append_jsonl(tmp_path / "rows.jsonl", rows)
    rl, collect, sft = (section(name) for name in ("rl", "collect", "sft"))
    model = rl["policy"] | {
        "architecture": rl["policy"]["architecture"] | {"num_kv_heads": 2}
    }
    rl |= {"policy": model, "students": [model]}
    rl["loop"] |= {"steps": 3, "updates_per_rollout": 2, "sync_every": 1}
    rl["optimizer"] = {"learning_rate": 1e-3}
    collect |= {"teacher": {"path": "{workdir}/rl"}, "students": [model]}
    for part in (rl, collect):
        part["rows"] = {"micro_batch_size": 4, "row_length": 128}
    score = {
        "stage": "score",
        **{name: collect[name] for name in ("teacher", "students", "ensemble")},
        **{name: collect[name] for name in ("template", "rlt_reward")},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "select": {},
        "teacher_temperature": 0.7,
        "batch_size": 4,
        "assume_closed": True,
        "per_token": True,
        "controls": True,
        "num_examples": 1,
    }
    sft |= {"model": model, "data": {"task": "file"}}
    sft["data"]["path"] = "{workdir}/collect/traces.jsonl"
    sft["data"]["keep_cut_off"] = True
    sft["sft"] |= {"batch_size": 4, "steps": 3}
    sft["optimizer"]["learning_rate"] = 1e-3
    return {"rl": rl, "collect": collect, "score": score, "sft": sft}


@pytest.mark.parametrize(
    "command",
    [pytest.param(EIGHT, marks=pytest.mark.slow), POD],
    ids=["eight", "two processes of four"],
)
def test_eight_devices_do_what_one_device_does(
    command: list[str], sections: Sections, tmp_path: Path
) -> None:
    one, eight = tmp_path / "one", tmp_path / "eight"
    run_here(sections | {"score": sections["score"] | {"mesh": {}}}, one)
    for part in sections.values():
        part["mesh"] = {"data": 2, "fsdp": 2, "tensor": 2}
    run(command, sections, eight)
    assert_same_files(
        one,
        eight,
        "rl/metrics.jsonl",
        "rl/samples.jsonl",
        "collect/completions.jsonl",
        "collect/traces.jsonl",
        "score/scores.jsonl",
        "score/selected.jsonl",
        "sft/metrics.jsonl",
    )
    ours, theirs = (
        {file.relative_to(run) for file in run.glob("*/*")} for run in (one, eight)
    )
    assert ours == theirs


@pytest.mark.slow
def test_eight_devices_teach_as_one_does(section: Section, tmp_path: Path) -> None:
    rl = section("rl")
    model = rl["policy"] | {
        "architecture": rl["policy"]["architecture"] | {"num_kv_heads": 2}
    }
    rl |= {"policy": model, "students": [], "reward_terms": {"correctness": {}}}
    rl["loop"] |= {"role": "student", "steps": 3}
    rl["optimizer"] = {"learning_rate": 1e-3}
    rl["rows"] = {"micro_batch_size": 4, "row_length": 128}
    sections = {
        "advised": {"clip": 1.0, "baseline": "group", "teacher": model},
        "taught": {"kind": "forward", "sync_alpha": 0.1, "reward_weight": 1.0},
    }
    sections = {name: rl | {"teaching": part} for name, part in sections.items()}
    run_here(sections, tmp_path / "one")
    for part in sections.values():
        part["mesh"] = {"data": 2, "fsdp": 2, "tensor": 2}
    run(EIGHT, sections, tmp_path / "eight")
    names = [f"{name}/{file}.jsonl" for name in sections for file in FILES]
    assert_same_files(tmp_path / "one", tmp_path / "eight", *names)


@pytest.fixture
def sft(section: Section) -> Sections:
    """A section for any number of devices up to eight."""
    values = section("sft")
    values["sft"] |= {"batch_size": 8, "steps": 4}
    return {"sft": values}


@pytest.fixture
def whole(sft: Sections, tmp_path: Path) -> Path:
    """An uninterrupted run on one device."""
    run_here(sft, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.slow
def test_a_checkpoint_of_one_device_goes_on_on_eight(
    sft: Sections, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, False, True])  # before the stage, then in it
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "stopping", lambda: next(answers))
        with pytest.raises(hosts.Stopped):
            run_here(sft, tmp_path / "eight")
    assert [file.name for file in tmp_path.glob("eight/sft/checkpoints/*")] == ["2"]
    shutil.copytree(tmp_path / "eight", tmp_path / "pod")
    run(EIGHT, sft, tmp_path / "eight")
    run(POD, sft, tmp_path / "pod")
    for folder in ("eight", "pod"):
        assert_same_files(whole, tmp_path / folder, "sft/metrics.jsonl")


@pytest.mark.parametrize("command", [EIGHT, POD], ids=["eight", "pod"])
@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_on_one(
    command: list[str], sft: Sections, whole: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    run_and_stop(command, sft, moved)
    (saved,) = moved.glob("sft/checkpoints/*")
    assert int(saved.name) < 4
    run_here(sft, moved)
    assert_same_files(whole, moved, "sft/metrics.jsonl")


@pytest.mark.slow
def test_sampling_goes_on_in_two_processes(section: Section, tmp_path: Path) -> None:
    sections = {"evaluate": section("evaluate")}
    sections["evaluate"]["engine"]["slots"] = 8
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run_here(sections, whole)
    shutil.copytree(whole, moved)
    (moved / "evaluate/done.json").unlink()
    for name, kept in (("completions", 7), ("samples", 5)):
        file = moved / f"evaluate/{name}.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:kept]) + lines[kept][:9])
    run(POD, sections, moved)
    for name in ("samples.jsonl", "results.json"):
        ours, theirs = (run / "evaluate" / name for run in (whole, moved))
        assert ours.read_bytes() == theirs.read_bytes()
    assert len(read_jsonl(moved / "evaluate/completions.jsonl")) == 10
