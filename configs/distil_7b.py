"""A 7B student distilled from the traces of a teacher: Qwen2.5-7B-Instruct.

    python -m rlt_jax.main --config=configs/distil_7b.py:v5p:4x4x4 \\
        --workdir=/mnt/bucket/distil_7b --config.traces=/mnt/bucket/rlt_7b/collect/traces.jsonl

After the colon stands the slice, here 64 chips of v5p (see `MESHES`; `h100:8` and
`h200:8` are a node of GPUs). `traces` is what `collect` wrote, or any file of traces.
Rows of up to 16,384 tokens; three passes over some 17k traces.

The smallest slices on which it fits, by configs/plan.py (compiled, not run; hours at 40% of
the chips' published speed):

    slice      chips  memory of a device        step   hours  chip-hours
    v5e:4x8       32   9.8 of 15.8 GiB, 38%    6.9 s     1.9          61
    v6e:2x4        8  26.3 of 31.2 GiB, 16%    5.9 s     1.6          13
    v5p:2x2x1      4  51.6 of 95.7 GiB, 46%   23.5 s     6.5          26

On v5e:4x4 4% are free. GPUs were not planned: parameters, moments and gradients take 15 GB
of each of 8.
"""

import ml_collections

from rlt_jax.costs.chips import num_chips
from rlt_jax.settings import section
from rlt_jax.stages.sft import SFTConfig
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.training.optimizer import OptimizerConfig
from rlt_jax.training.sharding import MeshConfig

BASE = "Qwen/Qwen2.5-7B-Instruct"
# Devices over which a row is split; it divides the key/value heads.
MESHES = {"v5e": 4, "v6e": 4, "v5p": 2, "h100": 4, "h200": 4}


def get_config(topology: str = "v5p:4x4x4") -> ml_collections.ConfigDict:
    """One stage, for a slice such as "v5e:8x8"."""
    tensor = MESHES[topology.partition(":")[0]]
    groups = max(1, num_chips(topology) // tensor)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.traces = "traces.jsonl"
    config.pipeline = ("distil",)
    config.distil = {
        "stage": "sft",
        "model": section(ModelSource, path=BASE, dtype="bfloat16", remat="full"),
        "template": "rlt",
        "data": {"task": "file", "path": config.get_ref("traces")},
        "sft": section(
            SFTConfig,
            format="student",
            steps=1_000,  # three passes over 17k traces of some 5,000 tokens, packed
            batch_size=max(16, groups),
            micro_batch_size=groups,
            row_length=16_384,
            checkpoint_every=250,
        ),
        "lora": section(LoRAConfig),
        "optimizer": section(
            OptimizerConfig,
            learning_rate=1e-5,
            schedule="cosine",
            warmup_fraction=0.05,
        ),
        "mesh": section(MeshConfig, data=1, fsdp=-1, tensor=tensor),
    }
    return config
