"""A student of 7B or 32B distilled from the traces of a teacher: Qwen2.5-Instruct.

    python -m rlt_jax.main --config=configs/distil.py:32b:v5p:4x4x4 \\
        --workdir=/mnt/bucket/distil_32b --config.traces=/mnt/bucket/rlt_7b/collect/traces.jsonl

After the colon stand the student, `7b` or `32b`, and the slice, here 64 chips of v5p (see
`STUDENTS`; `h100:8` and `h200:8` are a node of GPUs). `traces` is what `collect` wrote, or
any file of traces. Rows of up to 16,384 tokens, one of each question; a longer trace
gives way to another of its question, if there is one that fits. Three passes over some 17k
traces. `--config.held_out=FILE --config.distil.sft.evaluate_every=100` follows the loss on
traces that are not learned.

The smallest slices on which it fits, by configs/plan.py (compiled, not run; hours at 40% of
the chips' published speed):

            slice      chips  memory of a device        step   hours  chip-hours
    7b      v5e:4x8       32   9.8 of 15.8 GiB, 38%    6.9 s     1.9          61
            v6e:2x4        8  26.3 of 31.2 GiB, 16%    5.9 s     1.6          13
            v5p:2x2x1      4  51.6 of 95.7 GiB, 46%   23.5 s     6.5          26
    32b     v5e:8x16     128   9.2 of 15.8 GiB, 42%    7.3 s     2.0         259
            v6e:4x8       32  29.2 of 31.2 GiB,  6%    6.3 s     1.7          56
            v5p:2x2x4     16  58.2 of 95.7 GiB, 39%   25.0 s     7.0         111

7b leaves 4% on v5e:4x4. GPUs were not planned: parameters, moments and gradients take 15 GB
of each of 8 for 7b, 66 GB for 32b, which leaves h100 hardly any room for a row
(optimizer.state_dtype="bfloat16" saves 8 GB); h200 has 141 GB.
"""

import ml_collections

from rlt_jax.costs.chips import num_chips
from rlt_jax.errors import UserError
from rlt_jax.settings import section
from rlt_jax.stages.sft import SFTConfig
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.training.optimizer import OptimizerConfig
from rlt_jax.training.sharding import MeshConfig

# Student -> its base, and for each chip the devices over which a row is split; these
# divide the key/value heads.
STUDENTS = {
    "7b": (
        "Qwen/Qwen2.5-7B-Instruct",
        {"v5e": 4, "v6e": 4, "v5p": 2, "h100": 4, "h200": 4},
    ),
    "32b": (
        "Qwen/Qwen2.5-32B-Instruct",
        {"v5e": 8, "v6e": 8, "v5p": 4, "h100": 8, "h200": 8},
    ),
}
SLICE = "v5p:4x4x4"


def get_config(student: str = "7b") -> ml_collections.ConfigDict:
    """One stage, for a student and perhaps a slice such as "32b:v5e:8x16"."""
    size, _, topology = student.partition(":")
    topology = topology or SLICE
