"""On-policy distillation: a student learns on its own attempts from a teacher who knows.

    python -m rlt_jax.main --config=configs/on_policy.py --workdir=runs/on_policy

A small teacher is warmed up and trained by RL, as in configs/quickstart.py. Then the base
answers questions without their solutions, and the teacher, who sees question and solution,
says of every token of the answer how it would have gone on: the student is moved towards
the teacher's distributions. `--config.taught.teaching.kind=advantage` takes the log-ratio of
the sampled tokens instead, `--config.taught.teaching.teacher=None
--config.taught.teaching.prompt=privileged --config.taught.teaching.sync_alpha=0.05` makes a
moving average of the student its own teacher; docs/on_policy.md has the other choices.

Hardware: 2 CPU cores, two to three minutes.
Expected result: right answers rise from 18.9 to 80.0 percent with --config.seed=0, from 20.7
to 81.1 with 1.
"""

import ml_collections
from ml_collections import config_dict

from rlt_jax.data.rows import RowShape
from rlt_jax.inference.engine import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.rl.losses import ObjectiveConfig
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig
from rlt_jax.rl.teaching import TeachingConfig
from rlt_jax.settings import section
from rlt_jax.stages.evaluate import EvaluateConfig
from rlt_jax.stages.rl_config import RLConfig
from rlt_jax.stages.sft import SFTConfig
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.training.optimizer import OptimizerConfig
from rlt_jax.training.sharding import MeshConfig

BASE = "embedded_small"
KINDS = {"careful": 0.2, "skipping": 0.4, "restating": 0.37, "wrong": 0.03}


def get_config() -> ml_collections.ConfigDict:
    """The pipeline."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.pipeline = ("warmup", "rl", "taught", "eval_base", "eval_taught")
    config.warmup = {
        "stage": "sft",
        "model": section(ModelSource, path=BASE),
        "template": "tiny",
        "data": _problems("train", 8000, 1) | {"kinds": KINDS, "known_answer": True},
        "held_out": config_dict.placeholder(object),
        "sft": section(
            SFTConfig, role="teacher", steps=250, batch_size=8, row_length=160
        ),
        **_training(2e-3, schedule="cosine", warmup_fraction=0.05),
    }
    config.rl = _rl("{workdir}/warmup", "teacher", {"rlt": {"weight": 1.0}})
    config.rl.students = (section(ModelSource, path=BASE),)
    config.rl.loop.update(steps=40, batch_size=16)
    teacher = section(ModelSource, path="{workdir}/rl")
    teaching = section(
        TeachingConfig, kind="reverse", prompt="teacher", teacher=teacher
    )
    config.taught = _rl(BASE, "student", {}, teaching)
    config.taught.objective.beta = 0.0
    config.taught.sampling.temperature = 1.0
    for name, model in (("eval_base", BASE), ("eval_taught", "{workdir}/taught")):
        config[name] = {
            "stage": "evaluate",
            "model": section(ModelSource, path=model),
            "template": "tiny",
            "data": _problems("test", 256, stream=5),
            "predictions": "",
            "evaluate": section(EvaluateConfig, batch_size=128, samples_per_problem=4),
            "mesh": section(MeshConfig),
            **_sampler(),
        }
    return config


def _rl(
    policy: str,
    role: str,
    terms: dict,
    teaching: ml_collections.ConfigDict | None = None,
) -> ml_collections.ConfigDict:
    """RL of a teacher, or of a student."""
    loop = section(RLConfig, role=role, steps=20, batch_size=32, group_size=8)
    return ml_collections.ConfigDict(
        {
            "stage": "rl",
            "policy": section(ModelSource, path=policy),
            "students": (),
            "ensemble": section(EnsembleConfig),
            "template": "tiny",
            "data": _problems("train", 4000, stream=2),
            "held_out": _problems("test", 128, stream=3),
            "rows": section(RowShape, micro_batch_size=16, row_length=160),
            "rlt_reward": section(RLTRewardConfig),
            "reward_terms": terms,
            "objective": section(ObjectiveConfig),
            "teaching": teaching or config_dict.placeholder(object),
            "loop": loop,
            **_sampler(),
            **_training(5e-4),
        }
    )


def _problems(split: str, size: int, stream: int) -> dict:
    return {"task": "arithmetic", "split": split, "size": size, "stream": stream}


def _sampler() -> dict:
    return {
        "sampling": section(SamplingConfig, max_new_tokens=56, temperature=0.7),
        "engine": section(
            EngineConfig, slots=64, page_size=32, prefill_chunk=64, steps=16
        ),
    }


def _training(rate: float, **others: object) -> dict:
    return {
        "optimizer": section(OptimizerConfig, learning_rate=rate, **others),
        "lora": section(LoRAConfig),
        "mesh": section(MeshConfig),
    }
