"""Sections of a config so small that a stage takes seconds, most of them compiling."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import pytest

from rlt_jax.stages import run_pipeline

MODEL = {
    "architecture": {
        "embed_dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
        "mlp_dim": 24,
        "max_length": 128,
    },
    "tokenizer": "embedded",
}
PROBLEMS = {"task": "arithmetic", "split": "train", "size": 10}
RUN = {
    "teacher": MODEL,
    "students": [MODEL],
    "ensemble": {},
    "template": "tiny",
    "rows": {"micro_batch_size": 2, "row_length": 128},
    "sampling": {"max_new_tokens": 8, "temperature": 1.0},
    "engine": {"slots": 4, "page_size": 32, "prefill_chunk": 64},
    "rlt_reward": {},
    "mesh": {},
}
SECTIONS = {
    "sft": {
        "stage": "sft",
        "model": MODEL,
        "template": "tiny",
        "data": {
            **PROBLEMS,
            "size": 40,
            "kinds": {"careful": 0.5, "restating": 0.5},
            "known_answer": True,
        },
        "held_out": {
            **PROBLEMS,
            "split": "test",
            "kinds": {"careful": 1.0},
            "known_answer": True,
        },
        "sft": {
            "role": "student",
            "steps": 5,
            "batch_size": 2,
            "row_length": 128,
            "evaluate_every": 2,
            "checkpoint_every": 3,
        },
        "lora": {},
        "optimizer": {
            "learning_rate": 1e-2,
            "schedule": "cosine",
            "warmup_fraction": 0.5,
        },
        "mesh": {},
    },
    "rl": {
        "stage": "rl",
        **{name: value for name, value in RUN.items() if name != "teacher"},
        "policy": MODEL,
        "data": PROBLEMS,
        "held_out": {**PROBLEMS, "split": "test", "size": 3},
        "reward_terms": {"rlt": {}},
        "objective": {},
        "teaching": None,
        "loop": {
            "steps": 5,
            "batch_size": 2,
            "group_size": 2,
            "sync_every": 2,
            "sample_every": 1,
            "checkpoint_every": 3,
        },
        "lora": {},
        "optimizer": {"learning_rate": 1e-2},
    },
    "collect": {
        "stage": "collect",
        **RUN,
        "data": PROBLEMS,
        "collect": {"batch_size": 4},
    },
    "evaluate": {
        "stage": "evaluate",
        "model": MODEL,
        "template": "tiny",
        "data": {**PROBLEMS, "split": "test", "size": 5},
        "predictions": "",
        "sampling": {"max_new_tokens": 8, "temperature": 1.0},
        "engine": {"slots": 4, "page_size": 32, "prefill_chunk": 64},
        "evaluate": {"batch_size": 4, "samples_per_problem": 2},
        "mesh": {},
    },
}


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stages that run twice, as resumed ones do, compile only the first time."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    options = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def section() -> Callable[[str], dict[str, Any]]:
    """Name of a stage -> a section for it, which the test may change."""
    return lambda stage: copy.deepcopy(SECTIONS[stage])


@pytest.fixture
def run_stage() -> Callable[[dict[str, Any], Path], Path]:
    """Runs a section as a pipeline of its own; gives the folder of the stage."""

    def run(section: dict[str, Any], workdir: Path) -> Path:
        config = {"seed": 0, "pipeline": ("part",), "part": section}
        run_pipeline(ml_collections.ConfigDict(config), workdir)
        return workdir / "part"

    return run
