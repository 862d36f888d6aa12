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

TEMPLATE = "rlt"
ROWS = {"micro_batch_size": 2, "row_length": 1024}
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
    scratch = {"architecture": ARCHITECTURE, "tokenizer": config.get_ref("tokenizer")}
    base = {"path": "{workdir}/base"}
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
    worked = {"task": "gsm8k", "path": train, "limit": 64}
    config.base = _sft("student", scratch, worked)
    config.warmup = _sft("teacher", base, worked)
    config.rl = {
        "stage": "rl",
        **_explaining(base, "policy", "{workdir}/warmup"),
        "terms": {"rlt": {}},
        "objective": {},
        "data": {"task": "gsm8k", "path": train, "limit": 64},
        "held_out": {"task": "gsm8k", "path": test, "limit": 4},
        "loop": {"steps": 2, "batch_size": 2, "group_size": 4, "sample_every": 1},
        "lora": {},
        "optimizer": {"learning_rate": 1e-4},
    }
    config.collect = {
        "stage": "collect",
        **_explaining(base, "teacher", "{workdir}/rl"),
        "data": {"task": "gsm8k", "path": train, "limit": 8},
        "collect": {"batch_size": 8},
    }
    traces = {"task": "file", "path": "{workdir}/collect/traces.jsonl"}
    config.distil = _sft("student", base, traces)
    config.eval_base = _evaluate(base, test)
    config.eval_student = _evaluate({"path": "{workdir}/distil"}, test)
    config.report = {
        "stage": "report",
        "rl": "rl",
        "traces": (("rlt", "collect"),),
        "evaluations": (("base", "eval_base"), ("student", "eval_student")),
    }
    return config


def _sft(row_format: str, model: dict[str, Any], data: dict[str, Any]) -> dict:
    return {
        "stage": "sft",
        "model": model,
        "template": TEMPLATE,
        "data": data,
        "held_out": None,
        "sft": {"format": row_format, "steps": 3, "batch_size": 2, "row_length": 1024},
        "lora": {},
        "optimizer": {"learning_rate": 1e-3},
        "mesh": {},
    }


def _explaining(student: dict[str, Any], role: str, teacher: str) -> dict[str, Any]:
    """What RL and collection share: the roles, and how the teacher writes."""
    return {
        role: {"path": teacher},
        "student": student,
        "students": {},
        "template": TEMPLATE,
        "rows": ROWS,
        "sampling": {"max_new_tokens": 96, "temperature": 0.7},
        "engine": {"slots": 32},
        "reward": {},
        "mesh": {},
    }


def _evaluate(model: dict[str, Any], test: Any) -> dict[str, Any]:
    return {
        "stage": "evaluate",
        "model": model,
        "template": TEMPLATE,
        "data": {"task": "gsm8k", "path": test, "limit": 8},
        "predictions": "",
        "sampling": {"max_new_tokens": 96, "temperature": 0.7},
        "engine": {"slots": 32},
        "evaluate": {"batch_size": 8},
        "mesh": {},
    }
