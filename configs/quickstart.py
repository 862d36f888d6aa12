"""The whole method at small scale, on the embedded task.

    python -m rlt_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Teacher warm-up, RL of the teacher with the RLT reward, collection of explanations before
and after RL, distillation of a student from each, evaluation, and a report.

Hardware: 2 CPU cores, five to seven minutes.
Expected result (--config.seed=0 and 1): the base answers 15 and 16% of the held-out
questions, the student of warm-up explanations 23 and 29%, that of RLT explanations 96 and
97%.
"""

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

BASE = "embedded"
TEMPLATE = "tiny"
KINDS = {"careful": 0.2, "skipping": 0.4, "restating": 0.37, "wrong": 0.03}


def get_config() -> ml_collections.ConfigDict:
    """The pipeline."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.pipeline = (
        "warmup",
        "rl",
        "collect_warmup",
        "collect_rlt",
        "distil_warmup",
        "distil_rlt",
        "eval_base",
        "eval_student_warmup",
        "eval_student_rlt",
        "report",
    )
    worked = _problems("train", 8000, stream=1)
    # Copying the known answer is learned in a sudden step after some 300 updates, so
    # there are many small ones.
    worked |= {"kinds": KINDS, "known_answer": True}
    config.warmup = _sft("teacher", worked, steps=750, batch_size=8, rate=2e-3)
    config.rl = _run("policy", "{workdir}/warmup") | {
        "stage": "rl",
        "reward_terms": {"rlt": {"weight": 1.0}},
        "objective": section(ObjectiveConfig),
        "teaching": config_dict.placeholder(object),
        "data": _problems("train", 4000, stream=2),
        "held_out": _problems("test", 128, stream=3),
        "loop": section(RLConfig, steps=40, batch_size=16, group_size=8),
        "lora": section(LoRAConfig),
        "optimizer": section(OptimizerConfig, learning_rate=3e-4),
    }
    for name, teacher in (("collect_warmup", "warmup"), ("collect_rlt", "rl")):
        config[name] = _run("teacher", f"{{workdir}}/{teacher}") | {
            "stage": "collect",
            "data": _problems("train", 1024, stream=4),
            "collect": section(CollectConfig, batch_size=128),
        }
    for name, source in (
        ("distil_warmup", "collect_warmup"),
        ("distil_rlt", "collect_rlt"),
    ):
        traces = {"task": "file", "path": f"{{workdir}}/{source}/traces.jsonl"}
        config[name] = _sft("student", traces, steps=60, batch_size=24, rate=5e-4)
    for name, model in (
        ("eval_base", BASE),
        ("eval_student_warmup", "{workdir}/distil_warmup"),
        ("eval_student_rlt", "{workdir}/distil_rlt"),
    ):
        config[name] = {
            "stage": "evaluate",
            "model": section(ModelSource, path=model),
            "template": TEMPLATE,
            "data": _problems("test", 256, stream=5),
            "predictions": "",
            "sampling": _sampling(),
            "engine": _engine(),
            "evaluate": section(EvaluateConfig, batch_size=128, samples_per_problem=4),
            "mesh": section(MeshConfig),
        }
    config.report = section(
        ReportConfig,
        rl="rl",
        traces=(("warmup", "collect_warmup"), ("rlt", "collect_rlt")),
        evaluations=(
            ("base", "eval_base"),
            ("student_warmup_traces", "eval_student_warmup"),
            ("student_rlt_traces", "eval_student_rlt"),
        ),
    )
    config.report.stage = "report"
    return config


def _problems(split: str, size: int, stream: int) -> dict:
    return {"task": "arithmetic", "split": split, "size": size, "stream": stream}


def _engine() -> ml_collections.ConfigDict:
    return section(EngineConfig, slots=64, page_size=32, prefill_chunk=64, steps=16)


def _sampling() -> ml_collections.ConfigDict:
    return section(SamplingConfig, max_new_tokens=56, temperature=0.7)


def _sft(role: str, data: dict, steps: int, batch_size: int, rate: float) -> dict:
    return {
        "stage": "sft",
        "model": section(ModelSource, path=BASE),
        "template": TEMPLATE,
        "data": data,
        "held_out": config_dict.placeholder(object),
        "sft": section(
            SFTConfig,
            role=role,
            steps=steps,
            batch_size=batch_size,
            row_length=160,
            checkpoint_every=250,
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


def _run(name: str, teacher: str) -> dict:
    """What RL and collection share; the teacher's section has a name in each."""
    return {
        name: section(ModelSource, path=teacher),
        "students": (section(ModelSource, path=BASE),),
        "ensemble": section(EnsembleConfig),
        "template": TEMPLATE,
        "rows": section(RowShape, micro_batch_size=16, row_length=160),
        "sampling": _sampling(),
        "engine": _engine(),
        "rlt_reward": section(RLTRewardConfig),
        "mesh": section(MeshConfig),
    }
