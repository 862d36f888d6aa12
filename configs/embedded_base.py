"""Makes the shipped base model of the embedded task again.

    python -m rlt_jax.main --config=configs/embedded_base.py --workdir=runs/base

Hardware: 2 CPU cores, about 25 minutes. Writes runs/base/export/model, which is what lies in
rlt_jax/models/assets/embedded.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Pretraining from scratch, then export."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.pipeline = ("pretrain", "export")
    config.pretrain = {
        "stage": "sft",
        "model": {
            "architecture": {
                "embed_dim": 128,
                "num_layers": 4,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 32,
                "mlp_dim": 384,
                "max_length": 256,
            },
            "tokenizer": "embedded",
        },
        "template": "tiny",
        "data": {
            "task": "arithmetic",
            "split": "train",
            "size": 60_000,
            "kinds": {
                "careful": 0.08,
                "skipping": 0.40,
                "restating": 0.50,
                "wrong": 0.02,
            },
            "known_answer": False,
            "drills": 60_000,
        },
        "held_out": None,
        "sft": {
            "format": "student",
            "steps": 2000,
            "batch_size": 24,
            "row_length": 160,
            "checkpoint_every": 250,
        },
        "lora": {},
        "optimizer": {
            "learning_rate": 2e-3,
            "schedule": "cosine",
            "warmup_fraction": 0.03,
            "weight_decay": 0.01,
        },
        "mesh": {},
    }
    config.export = {
        "stage": "export",
        "model": {"path": "{workdir}/pretrain"},
        "model_type": "",
        "dtype": "bfloat16",
        "mesh": {},
    }
    return config
