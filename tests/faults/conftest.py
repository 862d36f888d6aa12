"""A whole pipeline of tiny stages as a command, and what it leaves."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rlt_jax.training.metrics import read_jsonl
from tests.stages.conftest import SECTIONS

ROOT = Path(__file__).parents[2]
CONFIG = """
import json, ml_collections
def get_config():
    return ml_collections.ConfigDict(json.loads(%r))
"""
SECONDS = 900  # a hang, on any machine
STAGES = ("warm", "teach", "explain", "distil", "answer", "show")

Start = Callable[..., subprocess.Popen[str]]
Run = Callable[..., tuple[int, str]]


def stages() -> dict[str, Any]:
    """A config whose stages each read from the one before."""
    made = json.loads(json.dumps(SECTIONS))
    warm, teach, explain, answer = (
        made[name] for name in ("sft", "rl", "collect", "evaluate")
    )
    warm["sft"] |= {"role": "teacher", "checkpoint_every": 2}
    teach["policy"] = {"path": "{workdir}/warm"}
    teach["loop"] |= {"checkpoint_every": 2, "evaluate_every": 2}
    explain["teacher"] = {"path": "{workdir}/teach"}
    distil = json.loads(json.dumps(SECTIONS["sft"])) | {"held_out": None}
    traces = {"task": "file", "path": "{workdir}/explain/traces.jsonl"}
    distil["data"] = traces | {"keep_cut_off": True}
    distil["sft"] |= {"evaluate_every": 0, "checkpoint_every": 2}
    answer["model"] = {"path": "{workdir}/distil"}
    show = {
        "stage": "report",
        "rl": "teach",
        "traces": [["explanations", "explain"]],
        "evaluations": [["answers", "answer"]],
    }
    sections = dict(zip(STAGES, (warm, teach, explain, distil, answer, show)))
    return {"seed": 0, "pipeline": STAGES} | sections


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config's file; programs that are compiled once are kept beside it."""
    file = tmp_path_factory.mktemp("faults") / "config.py"
    file.write_text(CONFIG % json.dumps(stages()), encoding="utf-8")
    return file


def arguments(config: Path, workdir: Path) -> list[str]:
    """Those of the command."""
    programs = f"--compilation_cache={config.with_name('programs')}"
    return [f"--config={config}", f"--workdir={workdir}", programs]


@pytest.fixture(scope="session")
def start(config: Path) -> Start:
    """Starts the command in a workdir, with more flags and environment variables."""

    def start(
        workdir: Path,
        *flags: str,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "rlt_jax.main", *arguments(config, workdir), *flags],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def run(start: Start) -> Run:
    """Runs the command to its end; returns exit status and standard error."""

    def run(workdir: Path, *flags: str, **options: Any) -> tuple[int, str]:
        process = start(workdir, *flags, **options)
        try:
            _, errors = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        return process.returncode, errors

    return run


@pytest.fixture(scope="session")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    status, errors = run(workdir)
    assert status == 0, errors
    return workdir


@pytest.fixture(scope="session")
def seconds(run: Run, whole: Path) -> float:
    """How long a run takes where nothing is to be compiled."""
    began = time.monotonic()
    assert run(whole.with_name("again"))[0] == 0
    return time.monotonic() - began


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that makes a disk fail."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("shim") / "failing_disk.so"
    source = Path(__file__).with_name("failing_disk.c")
    flags = ["-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run([compiler, *flags], check=True)
    return str(library)


def assert_same_run(workdir: Path, whole: Path) -> None:
    """The same parameters, metrics (times apart), samples, traces and results, bit for bit."""
    for stage in STAGES:
        left, right = workdir / stage, whole / stage
        if stage != "show":  # its summary has times
            assert summary(left, workdir) == summary(right, whole), stage
        for name in ("samples.jsonl", "traces.jsonl", "results.json"):
            if (right / name).exists():
                assert (left / name).read_bytes() == (right / name).read_bytes(), name
        if (right / "metrics.jsonl").exists():
            assert metric_rows(left) == metric_rows(right), stage
        for step in right.glob("checkpoints/*"):
            trees = [
                read_tree(folder / "checkpoints" / step.name / "params")
                for folder in (left, right)
            ]
            jax.tree.map(np.testing.assert_array_equal, *trees)
    assert (workdir / "report" / "index.html").is_file()


def summary(folder: Path, workdir: Path) -> Any:
    text = (folder / "done.json").read_text(encoding="utf-8")
    return json.loads(text.replace(str(workdir), ""))["summary"]


def metric_rows(folder: Path) -> list[dict[str, float]]:
    hidden = ("time/", "memory/")
    return [
        {name: x for name, x in row.items() if not name.startswith(hidden)}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]


def read_tree(folder: Path) -> Any:
    """Arrays of a checkpoint as NumPy arrays: it may be of several processes."""
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(folder).item_metadata
        empty = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
        return checkpointer.restore(folder, empty)
