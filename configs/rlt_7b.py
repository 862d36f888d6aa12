"""The published teacher: Qwen2.5-7B, warmed up, then trained by RL with a 7B student.

    python -m rlt_jax.main --config=configs/rlt_7b.py:v5p:4x4x4 --workdir=/mnt/bucket/rlt_7b \\
        --config.data=/mnt/bucket/bespoke_stratos_17k.parquet \\
        --config.held_out=/mnt/bucket/held_out.jsonl

After the colon stands the slice, here 64 chips of v5p (see `MESHES`; `h100:8` and
`h200:8` are a node of GPUs); launch/tpu_pod.sh runs it on all hosts. `data` is
bespokelabs/Bespoke-Stratos-17k as downloaded from the Hugging Face Hub, `held_out`
questions with solutions that are not in it.

Settings as published (arXiv 2506.08388): warm-up of 10 epochs over 17k traces, learning
rate 1e-5 with a cosine after 5% of the steps, AdamW with b2 0.95 and decay 1e-4; 125 steps
of 16 prompts x 64 completions, learning rate 1e-6, AdamW with b2 0.999 and no decay,
temperature 0.7, up to 16,384 + 16,384 tokens. The paper reports about 280 H100-hours for
the teacher and 7 for its traces.

One thing differs on purpose: a step of the warm-up is 16 traces there, here packed rows,
as padded ones would be empty for the most part, and one at least for each group of chips.
On few groups it is 4 or 5 rows, some 12 to 16 traces of 5,000 tokens; on larger slices a
row a group (v5e:8x8 has 16 groups, v5p:4x4x4 has 32), so fewer and larger steps at the same
learning rate. The passes over the traces are 10 everywhere.

The smallest slices on which warm-up and RL fit, by configs/plan.py (compiled, not run;
hours at 40% of the chips' published speed, with prompts of 2,048 and completions of 4,096
tokens on average, so 15,938 steps of warm-up with 4 rows or 3,985 with 16):

    slice      chips  memory of a device      step of RL  warm-up + RL   chip-hours
    v5e:8x8       64  13.4 of 15.8 GiB, 15%        221 s         11.5 h         734
    v6e:4x4       16  26.6 of 31.2 GiB, 15%        239 s         11.6 h         185
    v5p:2x2x1      4  81.8 of 95.7 GiB, 15%      1,147 s         65.9 h         263

The cache takes what is left, so the fullest program is decoding on all of them. On v5e:4x8
an update leaves 1%. GPUs were not planned: parameters, moments, reference and student take
17 GB of each of 8 (18 bytes a parameter), the weights to decode with 4 GB on h100 and 8
on h200, and gradients 4 GB.
"""

import ml_collections
from ml_collections import config_dict

from rlt_jax.costs.chips import chip_of, num_chips, num_slices
from rlt_jax.data.rows import RowShape
from rlt_jax.inference.engine import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.rl.losses import ObjectiveConfig
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig
from rlt_jax.settings import section
from rlt_jax.stages.collect import CollectConfig
from rlt_jax.stages.rl_config import RLConfig
from rlt_jax.stages.sft import SFTConfig
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.training.optimizer import OptimizerConfig
from rlt_jax.training.sharding import MeshConfig

BASE = "Qwen/Qwen2.5-7B-Instruct"
STUDENT = "bespokelabs/Bespoke-Stratos-7B"
PROMPT = COMPLETION = 16_384
# Chips over which a row is split; it divides the 4 key/value heads.
MESHES = {"v5e": 4, "v6e": 4, "v5p": 2, "h100": 4, "h200": 2}
PARAMETERS = 7.6e9
BYTES_PER_TOKEN = 2 * 28 * 4 * 128 * 2  # keys and values of 28 layers and 4 heads


def get_config(topology: str = "v5p:4x4x4") -> ml_collections.ConfigDict:
    """Warm-up, RL and traces, for a slice such as "v5e:8x8"."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.data = "bespoke_stratos_17k.parquet"
    config.held_out = "held_out.jsonl"
    tensor = MESHES[chip_of(topology).name]
    groups = max(1, num_chips(topology) // tensor)
    mesh = section(MeshConfig, data=num_slices(topology), fsdp=-1, tensor=tensor)
    data = {"task": "file", "path": config.get_ref("data")}
    trained = {"dtype": "bfloat16", "remat": "full"}
    frozen = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    config.pipeline = ("warmup", "rl", "collect")
    config.warmup = {
        "stage": "sft",
        "model": section(ModelSource, path=BASE, **trained),
        "template": "rlt",
        "data": data,
        "held_out": config_dict.placeholder(object),
        "sft": section(
            SFTConfig,
            role="teacher",
            epochs=10.0,
            # Five rows hold about 16 traces of some 5,000 tokens.
            batch_size=groups * max(1, 5 // groups),
            micro_batch_size=groups,
            row_length=16_384,
            checkpoint_every=500,
        ),
        "lora": section(LoRAConfig),
        "optimizer": section(
            OptimizerConfig,
            learning_rate=1e-5,
            schedule="cosine",
            warmup_fraction=0.05,
            b2=0.95,
            weight_decay=1e-4,
        ),
        "mesh": mesh,
    }
    cache_tokens = _cache_tokens(topology, tensor)
    # As many as find room with rows of 6,144 tokens; a step has 1,024.
    slots = min(max(8, cache_tokens // 6144), -(-1024 // groups))
    engine = section(
        EngineConfig,
        slots=groups * slots,
        cache_tokens=groups * min(cache_tokens, slots * (PROMPT + COMPLETION)),
        steps=32,
        prefill_chunk=2048,
        weights="bfloat16",
    )
    explaining = {
        "students": (section(ModelSource, path=STUDENT, **frozen),),
        "ensemble": section(EnsembleConfig),
        "template": "rlt",
        "rows": section(
            RowShape, micro_batch_size=groups, row_length=PROMPT + COMPLETION
        ),
        "sampling": section(SamplingConfig, max_new_tokens=COMPLETION, temperature=0.7),
        "engine": engine,
        "rlt_reward": section(RLTRewardConfig),
        "mesh": mesh,
    }
    config.rl = explaining | {
        "stage": "rl",
        "policy": section(ModelSource, path="{workdir}/warmup", **trained),
        "reward_terms": {"rlt": {"weight": 1.0}},
        "objective": section(ObjectiveConfig),
        "teaching": config_dict.placeholder(object),
        "data": data,
        "held_out": {"task": "file", "path": config.get_ref("held_out")},
        "loop": section(RLConfig, steps=125, batch_size=16, group_size=64),
        "lora": section(LoRAConfig),
        "optimizer": section(
            OptimizerConfig, learning_rate=1e-6, b2=0.999, weight_decay=0.0
        ),
    }
    config.collect = explaining | {
        "stage": "collect",
        "teacher": section(ModelSource, path="{workdir}/rl", **frozen),
        "data": data,
        "collect": section(CollectConfig, batch_size=1024),
    }
    return config


def _cache_tokens(topology: str, tensor: int) -> int:
    """What each group of chips has room for beside everything else, in tokens.

    Split over all chips are the parameters with two moments, the reference (4 bytes each)
    and the student (2); over each group the weights to decode with (2).
    """
    others = 18 * PARAMETERS / num_chips(topology) + 2 * PARAMETERS / tensor
    room = 0.85 * chip_of(topology).usable_bytes - others
    return max(int(room * tensor / BYTES_PER_TOKEN) // 64, 513) * 64  # a row, at least
