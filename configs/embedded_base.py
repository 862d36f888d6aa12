"""Makes the shipped base models again.

    python -m rlt_jax.main --config=configs/embedded_base.py --workdir=runs/base
    python -m rlt_jax.main --config=configs/embedded_base.py:small --workdir=runs/small
    python -m rlt_jax.main --config=configs/embedded_base.py:chains --workdir=runs/chains
    python -m rlt_jax.main --config=configs/embedded_base.py:chains_large \\
        --workdir=runs/chains_large

| config | model | parameters | knows |
|---|---|---|---|
| (none) | `embedded` | 0.85 million | chains of digits |
| `small` | `embedded_small` | 0.23 million | chains in two notations, puzzles, and that a question may tell its solution |
| `chains` | `embedded_chains` | 0.23 million | the same with one to three chains side by side |
| `chains_large` | `embedded_chains_large` | 0.85 million | the same |

The first two have rarely seen careful steps, often skipped ones and bare answers; the
others have seen careful steps in a fifth of the explanations.

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
SMALL = {"embed_dim": 64, "head_dim": 16, "mlp_dim": 192}
LARGE = {"embed_dim": 128, "head_dim": 32, "mlp_dim": 384}


def get_config(model: str = "") -> ml_collections.ConfigDict:
    """Pretraining from scratch, then export."""
    if model not in (models := _models()):
        raise UserError(
            f"configs/embedded_base.py:{model}: must be empty or one of "
            f"{', '.join(filter(None, models))}."
        )
    size, data, steps, rate, row = models[model]
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.pipeline = ("pretrain", "export")
    config.pretrain = {
        "stage": "sft",
        "model": section(ModelSource, architecture=HEADS | size, tokenizer="embedded"),
        "template": "tiny",
        "data": data,
        "held_out": config_dict.placeholder(object),
        "sft": section(
            SFTConfig,
            role="student",
            steps=steps,
            batch_size=24,
            row_length=row,
            checkpoint_every=250,
        ),
        "lora": section(LoRAConfig),
        "optimizer": section(
            OptimizerConfig,
            learning_rate=rate,
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


def _models() -> dict[str, tuple[dict, dict, int, float, int]]:
    """Name -> size, data, steps, learning rate, tokens of a row."""
    one_chain = _chains(60_000, KINDS, drills=60_000)
    side_by_side = _side_by_side_data()
    return {
        "": (LARGE, one_chain, 2000, 2e-3, 160),
        "small": (SMALL, _small_data(), 5000, 4e-3, 160),
        "chains": (SMALL, side_by_side, 6000, 4e-3, 192),
        "chains_large": (LARGE, side_by_side, 2500, 2e-3, 192),
    }


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


def _side_by_side_data() -> dict:
    """One to three chains of two to four operations, told or not, and puzzles."""
    pair = {"numbers": 2, "max_number": 50, "max_target": 99}
    sources = {
        "steps": _chains(0, HINTED, drills=40_000) | {"share": 0.1},
        "puzzles": _puzzles(12_000, HINTED) | {"share": 0.06},
        "puzzle_steps": _puzzles(3000, {"careful": 1.0}) | pair | {"share": 0.06},
        "told_puzzles": _puzzles(12_000, HINTED, hinted=True) | {"share": 0.06},
    }
    for chains in (1, 2, 3):
        more = {"chains": chains, "operations": (2, 4)}
        for notation, size, share in (
            ("signs", 20_000, 0.1),
            ("letters", 10_000, 0.05),
        ):
            more["notation"] = notation
            plain, told = (_chains(size, HINTED, hinted=x) for x in (False, True))
            name = f"{notation}_{chains}"
            sources[name] = plain | more | {"share": share}
            sources[f"told_{name}"] = told | more | {"share": 0.6 * share}
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
