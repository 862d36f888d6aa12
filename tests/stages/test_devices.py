"""Every stage on eight devices does what it does on one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlt_jax.training.metrics import read_jsonl

Section = Callable[[str], dict[str, Any]]
RunStage = Callable[[dict[str, Any], Path], Path]

PROGRAM = """
import json, sys
from pathlib import Path
import ml_collections
from rlt_jax.stages import run_pipeline
config = ml_collections.ConfigDict(json.loads(sys.argv[1]))
run_pipeline(config, Path(sys.argv[2]))
"""
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
# Of the machine, of the slots, which are rounded up on every device, and of the last
# bits of weights, which provenance hashes.
OF_DEVICES = ("time/", "memory/", "rollout/occupancy", "provenance")


def on_eight(sections: dict[str, dict[str, Any]], workdir: Path) -> None:
    for section in sections.values():
        section["mesh"] = MESH
    config = {"seed": 0, "pipeline": list(sections), **sections}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(config), str(workdir)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


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


@pytest.fixture
def sections(section: Section) -> dict[str, dict[str, Any]]:
    """RL, traces of the policy, scores of the traces, and a student of them."""
    rl, collect, sft = (section(name) for name in ("rl", "collect", "sft"))
    model = rl["policy"] | {
        "architecture": rl["policy"]["architecture"] | {"num_kv_heads": 2}
    }
    rl |= {"policy": model, "student": model}
    rl["loop"] |= {"steps": 3, "updates_per_rollout": 2, "sync_every": 1}
    rl["optimizer"] = {"learning_rate": 1e-3}
    collect |= {"teacher": {"path": "{workdir}/rl"}, "student": model}
    for part in (rl, collect):
        part["rows"] = {"micro_batch_size": 4, "row_length": 128}
    sft |= {"model": model, "data": {"task": "file"}}
    sft["data"]["path"] = "{workdir}/collect/traces.jsonl"
    sft["sft"] |= {"batch_size": 4, "steps": 3}
    sft["optimizer"]["learning_rate"] = 1e-3
    return {"rl": rl, "collect": collect, "sft": sft}


def test_eight_devices_do_what_one_does(
    sections: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    import ml_collections

    from rlt_jax.stages import run_pipeline

    one, eight = tmp_path / "one", tmp_path / "eight"
    config = {"seed": 0, "pipeline": tuple(sections), **sections}
    run_pipeline(ml_collections.ConfigDict(config), one)
    on_eight(sections, eight)
    for file in (
        "rl/metrics.jsonl",
        "rl/samples.jsonl",
        "collect/traces.jsonl",
        "sft/metrics.jsonl",
    ):
        ours, theirs = read_jsonl(one / file), read_jsonl(eight / file)
        assert len(ours) >= 3
        assert_close(ours, theirs, file)
