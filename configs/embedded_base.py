"""Makes the shipped base models again.

    python -m rlt_jax.main --config=configs/embedded_base.py --workdir=runs/base
    python -m rlt_jax.main --config=configs/embedded_base.py:small --workdir=runs/small

The first knows chains of digits (0.85 million parameters, `embedded`). The second knows
them in two notations, puzzles, and that a question may tell its solution (0.23 million,
`embedded_small`). Both have rarely seen careful steps, often skipped ones and bare answers.

Run it from a checkout, as the puzzles are a task of experiments/.

Hardware: 2 CPU cores, about 25 minutes. Writes export/model, which is what lies in
rlt_jax/models/assets.
"""

import ml_collections
from ml_collections import config_dict

from rlt_jax.errors import UserError
from rlt_jax.settings import section
from rlt_jax.stages.sft import SFTConfig
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.training.optimizer import OptimizerConfig
from rlt_jax.training.sharding import MeshConfig

KINDS = {"careful": 0.08, "skipping": 0.40, "restating": 0.50, "wrong": 0.02}
HINTED = {"careful": 0.2, "skipping": 0.4, "restating": 0.37, "wrong": 0.03}
HEADS = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "max_length": 256}
SIZES = {
    "": {"embed_dim": 128, "head_dim": 32, "mlp_dim": 384},
    "small": {"embed_dim": 64, "head_dim": 16, "mlp_dim": 192},
}


def get_config(size: str = "") -> ml_collections.ConfigDict:
    """Pretraining from scratch, then export."""
    if size not in SIZES:
        raise UserError(f"configs/embedded_base.py:{size}: no choice, or `small`.")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.pipeline = ("pretrain", "export")
    config.pretrain = {
        "stage": "sft",
        "model": section(
            ModelSource, architecture=HEADS | SIZES[size], tokenizer="embedded"
        ),
        "template": "tiny",
        "data": _small_data() if size else _chains(60_000, KINDS, drills=60_000),
        "held_out": config_dict.placeholder(object),
        "sft": section(
            SFTConfig,
            role="student",
            steps=5000 if size else 2000,
            batch_size=24,
            row_length=160,
            checkpoint_every=250,
        ),
        "lora": section(LoRAConfig),
        "optimizer": section(
            OptimizerConfig,
            learning_rate=4e-3 if size else 2e-3,
            schedule="cosine",
            warmup_fraction=0.03,
            weight_decay=0.01,
        ),
        "mesh": section(MeshConfig),
    }
    config.export = {
        "stage": "export",
        "model": section(ModelSource, path="{workdir}/pretrain"),
        "model_type": "",
        "dtype": "bfloat16",
        "adapter_base": "",
        "mesh": section(MeshConfig),
    }
    return config


def _small_data() -> dict:
    pair = {"numbers": 2, "max_number": 50, "max_target": 99}
    sources = {
        "steps": _chains(0, KINDS, drills=40_000) | {"share": 0.15},
        "puzzles": _puzzles(12_000, KINDS) | {"share": 0.1},
        "puzzle_steps": _puzzles(3000, {"careful": 1.0}) | pair | {"share": 0.1},
        "told_puzzles": _puzzles(12_000, HINTED, hinted=True) | {"share": 0.1},
    }
    for notation in ("signs", "letters"):
        more = {"notation": notation}
        sources[notation] = _chains(40_000, KINDS) | more | {"share": 0.15}
        told = _chains(30_000, HINTED, hinted=True)
        sources[f"told_{notation}"] = told | more | {"share": 0.125}
    return {"task": "mix", "sources": sources}


def _chains(size: int, kinds: dict, drills: int = 0, hinted: bool = False) -> dict:
    return {
        "task": "arithmetic",
        "split": "train",
        "size": size,
        "kinds": kinds,
        "known_answer": hinted,
        "drills": drills,
        "hinted": hinted,
        "stream": 8 * hinted,
    }


def _puzzles(size: int, kinds: dict, hinted: bool = False) -> dict:
    return {
        "task": "experiments.countdown:traces",
        "split": "train",
        "size": size,
        "kinds": kinds,
        "hinted": hinted,
        "numbers": 3,
        "max_number": 12,
        "max_target": 50,
        "signs": "+-*",
    }
