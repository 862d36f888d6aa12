"""A student of 7B or 32B distilled from the traces of a teacher: Qwen2.5-Instruct.

    python -m rlt_jax.main --config=configs/distil.py:32b:v5p:4x4x4 \\
        --workdir=/mnt/bucket/distil_32b --config.traces=/mnt/bucket/rlt_7b/collect/traces.jsonl

After the colon stand the student, `7b` or `32b`, and the slice, here 64 chips of v5p (see
`MESHES`; `h100:8` and `h200:8` are a node of GPUs). `traces` is what `collect` wrote, or
any file of traces; one of each question is learned, for three passes over some 17k. Of
traces longer than 16,384 tokens another of the same question takes the place, where one
fits. To follow the loss on traces that are not learned, add

    --config.distil.held_out='{"task": "file", "path": "FILE"}' \\
        --config.distil.sft.evaluate_every=100

The smallest slices on which it fits, by configs/plan.py (compiled, not run; hours at 40% of
the chips' published speed, for 17,000 traces of 6,144 tokens, which are 1,196 steps of 16
rows):

            slice      chips  memory of a device        step   hours  chip-hours
    7b      v5e:4x8       32   9.8 of 15.8 GiB, 38%    6.9 s     2.3          73
            v6e:2x4        8  26.3 of 31.2 GiB, 16%    5.9 s     2.0          16
            v5p:2x2x1      4  51.6 of 95.7 GiB, 46%   23.5 s     7.8          31
    32b     v5e:8x16     128   9.2 of 15.8 GiB, 42%    7.3 s     2.4         310
            v6e:4x8       32  29.2 of 31.2 GiB,  6%    6.3 s     2.1          67
            v5p:2x2x4     16  58.2 of 95.7 GiB, 39%   25.0 s     8.3         133

7b leaves 4% on v5e:4x4. GPUs were not planned: parameters, moments and gradients take 15 GB
of each of 8 for 7b, 66 GB for 32b, which leaves h100 hardly any room for a row
(optimizer.state_dtype="bfloat16" saves 8 GB); h200 has 141 GB.
"""

import ml_collections
from ml_collections import config_dict

from rlt_jax.costs.chips import chip_of, num_chips, num_slices
from rlt_jax.errors import UserError
from rlt_jax.settings import section
from rlt_jax.stages.sft import SFTConfig
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.training.optimizer import OptimizerConfig
from rlt_jax.training.sharding import MeshConfig

BASES = {"7b": "Qwen/Qwen2.5-7B-Instruct", "32b": "Qwen/Qwen2.5-32B-Instruct"}
# Devices over which a row is split; it divides the key/value heads.
MESHES = {
    "7b": {"v5e": 4, "v6e": 4, "v5p": 2, "h100": 4, "h200": 4},
    "32b": {"v5e": 8, "v6e": 8, "v5p": 4, "h100": 8, "h200": 8},
}


def get_config(student: str = "7b:v5p:4x4x4") -> ml_collections.ConfigDict:
    """One stage, for a student and a slice such as "32b:v5e:8x16"."""
    size, _, topology = student.partition(":")
    if size not in BASES:
        raise UserError(f"configs/distil.py:{student}: begin with 7b or 32b.")
    topology = topology or "v5p:4x4x4"
    tensor = MESHES[size][chip_of(topology).name]
    groups = max(1, num_chips(topology) // tensor)
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.traces = "traces.jsonl"
    config.pipeline = ("distil",)
    config.distil = {
        "stage": "sft",
        "model": section(ModelSource, path=BASES[size], dtype="bfloat16", remat="full"),
        "template": "rlt",
        "data": {"task": "file", "path": config.get_ref("traces")},
        "held_out": config_dict.placeholder(object),
        "sft": section(
            SFTConfig,
            role="student",
            epochs=3.0,
            batch_size=max(16, groups),
            micro_batch_size=groups,
            row_length=16_384,
            overlong="shorter",
            traces_per_question=1,
            checkpoint_every=250,
        ),
        "lora": section(LoRAConfig),
        "optimizer": section(
            OptimizerConfig,
            learning_rate=1e-5,
            schedule="cosine",
            warmup_fraction=0.05,
        ),
        "mesh": section(MeshConfig, data=num_slices(topology), fsdp=-1, tensor=tensor),
    }
    return config
