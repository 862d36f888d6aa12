"""The whole method on GSM8K: real questions, real lengths, real tokens, a toy model.

    python -m rlt_jax.main --config=configs/gsm8k.py --workdir=runs/gsm8k \\
        --config.data_dir=DIR --config.tokenizer=DIR

`data_dir` holds train.jsonl and test.jsonl as published (github.com/openai/
grade-school-math), `tokenizer` is a Hugging Face tokenizer directory with a chat template
(here that of DeepSeek-R1, 128k entries).

The model is small, starts from random weights and is trained for a handful of steps. It
learns nothing worth having; what this run shows is that the questions, prompts of 90 to
360 tokens, a vocabulary of 128k, and every stage from the first step to the report fit
together. For a result, set `model` to a pretrained checkpoint, raise steps, batch sizes
and `max_new_tokens`, and drop the limits.

Hardware: 2 CPU cores, about 2 minutes, 2 GB of memory, 0.4 GB of disk.
Expected result: all stages complete, losses are finite and near log(vocabulary) = 11.8,
no explanation is closed, and every accuracy is 0.
"""

from typing import Any

import ml_collections
from ml_collections import config_dict

from rlt_jax.data.rows import RowShape
from rlt_jax.inference.engine import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.report.pages import ReportConfig
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

TEMPLATE = "rlt"
BASE = "{workdir}/base"
ARCHITECTURE = {
    "embed_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "mlp_dim": 192,
    "max_length": 2048,
}


def get_config() -> ml_collections.ConfigDict:
    """The pipeline; `data_dir` and `tokenizer` are named once, at the top."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data_dir = "../shared/data/gsm8k"
    config.tokenizer = "../shared/data/tokenizers/deepseek_r1"
    train = config.get_ref("data_dir") + "/train.jsonl"
    test = config.get_ref("data_dir") + "/test.jsonl"
    config.pipeline = (
        "base",
        "warmup",
        "rl",
        "collect",
        "distil",
        "eval_base",
        "eval_student",
        "report",
    )
    scratch = section(ModelSource, architecture=ARCHITECTURE, tokenizer="embedded")
    scratch.tokenizer = config.get_ref("tokenizer")
    worked = _gsm8k(train, 64)
    config.base = _sft("student", scratch, worked)
    config.warmup = _sft("teacher", section(ModelSource, path=BASE), worked)
    config.rl = _run() | {
        "stage": "rl",
        "policy": section(ModelSource, path="{workdir}/warmup"),
        "reward_terms": {"rlt": {"weight": 1.0}},
        "objective": section(ObjectiveConfig),
        "data": _gsm8k(train, 64),
        "held_out": _gsm8k(test, 4),
        "loop": section(RLConfig, steps=2, batch_size=2, group_size=4, sample_every=1),
        "lora": section(LoRAConfig),
        "optimizer": section(OptimizerConfig, learning_rate=1e-4),
    }
    config.collect = _run() | {
        "stage": "collect",
        "teacher": section(ModelSource, path="{workdir}/rl"),
        "data": _gsm8k(train, 8),
        "collect": section(CollectConfig, batch_size=8),
    }
    traces = {"task": "file", "path": "{workdir}/collect/traces.jsonl"}
    config.distil = _sft("student", section(ModelSource, path=BASE), traces)
    for name, model in (("eval_base", BASE), ("eval_student", "{workdir}/distil")):
        config[name] = {
            "stage": "evaluate",
            "model": section(ModelSource, path=model),
            "template": TEMPLATE,
            "data": _gsm8k(test, 8),
            "predictions": "",
            "sampling": _sampling(),
            "engine": section(EngineConfig, slots=32),
            "evaluate": section(EvaluateConfig, batch_size=8),
            "mesh": section(MeshConfig),
        }
    config.report = section(
        ReportConfig,
        rl="rl",
        traces=(("rlt", "collect"),),
        evaluations=(("base", "eval_base"), ("student", "eval_student")),
    )
    config.report.stage = "report"
    return config


def _gsm8k(path: Any, limit: int) -> dict[str, Any]:
    return {"task": "gsm8k", "path": path, "limit": limit}


def _sampling() -> ml_collections.ConfigDict:
    return section(SamplingConfig, max_new_tokens=96, temperature=0.7)


def _sft(role: str, model: ml_collections.ConfigDict, data: dict[str, Any]) -> dict:
    return {
        "stage": "sft",
        "model": model,
        "template": TEMPLATE,
        "data": data,
        "held_out": config_dict.placeholder(object),
        "sft": section(SFTConfig, role=role, steps=3, batch_size=2, row_length=1024),
        "lora": section(LoRAConfig),
        "optimizer": section(OptimizerConfig, learning_rate=1e-3),
        "mesh": section(MeshConfig),
    }


def _run() -> dict[str, Any]:
    """What RL and collection share."""
    return {
        "students": (section(ModelSource, path=BASE),),
        "ensemble": section(EnsembleConfig),
        "template": TEMPLATE,
        "rows": section(RowShape, micro_batch_size=2, row_length=1024),
        "sampling": _sampling(),
        "engine": section(EngineConfig, slots=32),
        "rlt_reward": section(RLTRewardConfig),
        "mesh": section(MeshConfig),
    }
