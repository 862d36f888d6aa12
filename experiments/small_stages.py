"""Stages of the studies on the embedded tasks, with the settings that they share."""

from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from rlt_jax.data.rows import RowShape
from rlt_jax.data.selection import SelectionConfig
from rlt_jax.inference.engine import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.rl.losses import ObjectiveConfig
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig
from rlt_jax.settings import section
from rlt_jax.stages.collect import CollectConfig
from rlt_jax.stages.evaluate import EvaluateConfig
from rlt_jax.stages.rl_config import RLConfig
from rlt_jax.stages.sft import SFTConfig
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.training.optimizer import OptimizerConfig
from rlt_jax.training.sharding import MeshConfig

KIND = "experiments.kinds:kind_of"
SMALL, LARGE = "embedded_small", "embedded"
TEMPLATE = "tiny"
ROW = 160  # tokens


def of_seeds(
    stages_of_a_seed: Callable[[int], dict[str, Any]], seeds: Sequence[int]
) -> ml_collections.ConfigDict:
    """A pipeline of all stages of all seeds, named NAME_SEED."""
    stages = {
        f"{name}_{seed}": values | {"seed": seed}
        for seed in seeds
        for name, values in stages_of_a_seed(seed).items()
    }
    config = ml_collections.ConfigDict(stages)
    config.seed = 0
    config.pipeline = tuple(stages)
    return config


def chains(split: str, size: int, stream: int, **more: Any) -> dict:
    task = {"task": "arithmetic", "split": split, "size": size, "stream": stream}
    return task | more


def _engine() -> ml_collections.ConfigDict:
    return section(EngineConfig, slots=64, page_size=32, prefill_chunk=64, steps=16)


def _sampling(temperature: float = 0.7) -> ml_collections.ConfigDict:
    return section(SamplingConfig, max_new_tokens=56, temperature=temperature)


def sft(
    model: str, role: str, data: dict, steps: int, batch_size: int, rate: float
) -> dict:
    return {
        "stage": "sft",
        "model": section(ModelSource, path=model),
        "template": TEMPLATE,
        "data": data,
        "held_out": config_dict.placeholder(object),
        "sft": section(
            SFTConfig,
            role=role,
            steps=steps,
            batch_size=batch_size,
            row_length=ROW,
            checkpoint_every=1000,
        ),
        "lora": section(LoRAConfig),
        "optimizer": section(
            OptimizerConfig,
            learning_rate=rate,
            schedule="cosine",
            warmup_fraction=0.05,
        ),
        "mesh": section(MeshConfig),
    }


def sampling_sections(student: str | None, temperature: float = 0.7) -> dict:
    """What all stages with a teacher or a policy share."""
    return {
        "students": (section(ModelSource, path=student),) if student else (),
        "ensemble": section(EnsembleConfig),
        "template": TEMPLATE,
        "rows": section(RowShape, micro_batch_size=16, row_length=ROW),
        "sampling": _sampling(temperature),
        "engine": _engine(),
        "mesh": section(MeshConfig),
    }


def rl(policy: str, held_out: dict, rate: float, **loop: Any) -> dict:
    return {
        "stage": "rl",
        "policy": section(ModelSource, path=policy),
        "held_out": held_out,
        "loop": section(RLConfig, checkpoint_every=1000, **loop),
        "lora": section(LoRAConfig),
        "optimizer": section(OptimizerConfig, learning_rate=rate),
    }


def teacher_rl(policy: str, student: str | None, reward: dict) -> dict:
    """Without a student, the policy's copy is the student."""
    loop = {"steps": 40, "batch_size": 16, "group_size": 8}
    return (
        sampling_sections(student)
        | rl(
            policy,
            chains("test", 128, stream=3),
            5e-4,
            self_teaching=student is None,
            **loop,
        )
        | {
            "data": chains("train", 4000, stream=2),
            "rlt_reward": section(RLTRewardConfig, **reward),
            "reward_terms": {"rlt": {"weight": 1.0}},
            "objective": section(ObjectiveConfig),
            "teaching": config_dict.placeholder(object),
        }
    )


def student_rl(policy: str, steps: int, task: Any = chains) -> dict:
    loop = {"steps": steps, "batch_size": 32, "group_size": 8, "role": "student"}
    return (
        sampling_sections(None, temperature=1.0)
        | rl(policy, task("test", 128, stream=3), 5e-4, **loop)
        | {
            "data": task("train", 4000, stream=2),
            "rlt_reward": section(RLTRewardConfig),
            "reward_terms": {"correctness": {"weight": 1.0}},
            "objective": section(ObjectiveConfig, beta=0.0),
            "teaching": config_dict.placeholder(object),
        }
    )


def collect(teacher: str, student: str, data: dict | None = None) -> dict:
    data = data or chains("train", 1024, stream=4)
    kind = KIND if data["task"] == "arithmetic" else ""
    return sampling_sections(student) | {
        "stage": "collect",
        "teacher": section(ModelSource, path=teacher),
        "data": data,
        "rlt_reward": section(RLTRewardConfig),
        "collect": section(CollectConfig, batch_size=128, classify=kind),
    }


def evaluate(
    model: str, data: dict | None = None, samples: int = 4, keep_right: bool = False
) -> dict:
    return {
        "stage": "evaluate",
        "model": section(ModelSource, path=model),
        "template": TEMPLATE,
        "data": data or chains("test", 256, stream=5),
        "predictions": "",
        "sampling": _sampling(),
        "engine": _engine(),
        "evaluate": section(
            EvaluateConfig,
            batch_size=128,
            samples_per_problem=samples,
            keep_right=keep_right,
        ),
        "mesh": section(MeshConfig),
    }


def score(teacher: str, student: str, path: str, controls: bool = False) -> dict:
    return {
        "stage": "score",
        "teacher": section(ModelSource, path=teacher),
        "students": (section(ModelSource, path=student),),
        "ensemble": section(EnsembleConfig),
        "template": TEMPLATE,
        "data": {"path": path},
        "rlt_reward": section(RLTRewardConfig),
        "select": section(SelectionConfig),
        "teacher_temperature": 0.7,
        "batch_size": 128,
        "assume_closed": True,
        "per_token": False,
        "controls": controls,
        "num_examples": 4,
        "mesh": section(MeshConfig),
    }
