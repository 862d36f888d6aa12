"""What a teacher of a student's own attempts costs: memory of an update, time of a step.

    python benchmarks/teaching.py [--repeats=3] [--steps=5]

Memory: the update of a 25-million-parameter transformer (width 384, 8 layers, vocabulary
32,000, float32, layers recomputed, AdamW) on one row of 4,096 tokens, as XLA plans it:
arguments, results and temporaries on one device, without a teacher, with advantages of
sampled tokens, and with divergences over the vocabulary.

Time: the stage `rl` with the same transformer and random weights, 8 prompts x 4 completions
of 128 tokens, a correctness reward, one update a rollout. Every run has a process of its
own, they take turns, and the first step, which compiles, is not counted. Shown are medians
over the steps of all repeats, and the ratio to the stage without a teacher.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict
from rollout import wait_for_quiet

from rlt_jax.data.rows import RowShape
from rlt_jax.inference import head
from rlt_jax.inference.divergence import Models
from rlt_jax.inference.engine import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.config import ModelConfig
from rlt_jax.rl.losses import Divergence, ObjectiveConfig, policy_loss
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig
from rlt_jax.rl.teaching import TeachingConfig
from rlt_jax.settings import section
from rlt_jax.stages import plan_shapes, run_pipeline
from rlt_jax.stages.rl_config import RLConfig
from rlt_jax.training import sharding
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.learner import jit_update
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.training.metrics import read_jsonl
from rlt_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlt_jax.training.sharding import MeshConfig
from rlt_jax.training.state import abstract_state, state_shardings

SHAPE = {
    "vocab_size": 32_000,
    "embed_dim": 384,
    "num_layers": 8,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 64,
    "mlp_dim": 1024,
    "max_length": 4096,
}
ROW = 4096
TEACHINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "advantage": {},
    "reverse": {"kind": "reverse"},
    "forward": {"kind": "forward"},
    "jensen_shannon": {"kind": "jensen_shannon"},
    "reverse, top 64": {"kind": "reverse", "top_k": 64},
}


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=5, help="of a run, without the first"
    )
    parser.add_argument("--run", help="for the benchmark itself: a row of TEACHINGS")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(step_times(options.run, options.steps + 1)))
        return
    print(f"jax {jax.__version__}, Python {platform.python_version()}")
    print(f"\nAn update on {ROW:,} tokens{'GiB':>10}{'to none':>9}")
    sizes = {name: update_bytes(teaching) for name, teaching in TEACHINGS.items()}
    for name, size in sizes.items():
        print(f"{name:26}{size / 2**30:9.3f}{size / sizes['none']:9.2f}")
    phases = ("rollout", "score", "update", "step")
    print(f"\n{'A step, seconds':18}" + "".join(f"{x:>9}" for x in phases), "  to none")
    times: dict[str, list[dict[str, float]]] = {name: [] for name in TEACHINGS}
    for _ in range(options.repeats):
        for name, steps in times.items():
            wait_for_quiet()
            command = [sys.executable, __file__, "--run", name]
            command += ["--steps", str(options.steps)]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            )
            steps += json.loads(done.stdout.splitlines()[-1])
    medians = {
        name: {x: statistics.median(step[x] for step in steps) for x in phases}
        for name, steps in times.items()
    }
    for name, found in medians.items():
        ratio = found["step"] / medians["none"]["step"]
        print(
            f"{name:18}" + "".join(f"{found[x]:9.2f}" for x in phases), f"{ratio:9.2f}"
        )


def update_bytes(settings: dict[str, Any] | None) -> int:
    """Peak memory of the update's arguments, results and temporaries."""
    mesh = sharding.make_mesh(MeshConfig())
    config = ModelConfig(**SHAPE)
    model, params = plan_shapes.load_shape(
        {"architecture": SHAPE, "tokenizer": "embedded", "remat": "full"}, {}, mesh
    )
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-4), 10)
    batch = plan_shapes.rollout_batch(mesh, 1, RowShape(1, ROW), 0)
    one = batch.sampler_log_probs
    batch = batch._replace(advantages=one, inverse_length=one, loss_weights=one)
    divergence = None
    if settings is not None:
        batch = batch._replace(taught=one)
        c = TeachingConfig(**settings)
        if c.over_vocabulary:
            states = jax.ShapeDtypeStruct((*one.shape, config.embed_dim), jnp.float32)
            kernel = head.kernel_of(config, params)
            batch = batch._replace(teacher_states=states, teacher_kernel=kernel)
            models = Models((config, 1.0), (config, 1.0))
            divergence = Divergence(c.weight, c.divergence, models)
    loss_fn = policy_loss(ObjectiveConfig(beta=0.0), 1.0, 1, divergence)
    placed = state_shardings(model, tx, mesh)
    update = jit_update(loss_fn, model, tx, mesh, placed)
    state = abstract_state(model, params, tx, mesh)
    memory = update.lower(state, batch, None).compile().memory_analysis()
    # The new state takes the place of the old one.
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def step_times(name: str, steps: int) -> list[dict[str, float]]:
    """Seconds of the phases of every step but the first."""
    with tempfile.TemporaryDirectory() as folder:
        config = ConfigDict({"rl": stage(TEACHINGS[name], steps)})
        config.pipeline, config.seed = ("rl",), 0
        run_pipeline(config, folder)
        rows = read_jsonl(Path(folder, "rl", "metrics.jsonl"))
    phases = ("rollout", "score", "update", "step")
    return [{x: row[f"time/{x}_seconds"] for x in phases} for row in rows[1:]]


def stage(settings: dict[str, Any] | None, steps: int) -> dict[str, Any]:
    """The stage that is timed."""
    taught = config_dict.placeholder(object)
    if settings is not None:
        taught = section(TeachingConfig, **settings)
    data = {"task": "arithmetic", "split": "train", "size": 64, "stream": 2}
    return {
        "stage": "rl",
        "policy": section(ModelSource, architecture=SHAPE, tokenizer="embedded"),
        "students": (),
        "ensemble": section(EnsembleConfig),
        "template": "tiny",
        "data": data,
        "held_out": data | {"size": 2},
        "rows": section(RowShape, micro_batch_size=8, row_length=512),
        "sampling": section(SamplingConfig, max_new_tokens=128),
        "engine": section(EngineConfig, slots=32, page_size=32, prefill_chunk=64),
        "rlt_reward": section(RLTRewardConfig),
        "reward_terms": {"correctness": {"weight": 1.0}},
        "objective": section(ObjectiveConfig, beta=0.0),
        "teaching": taught,
        "loop": section(
            RLConfig, role="student", steps=steps, batch_size=8, group_size=4
        ),
        "lora": section(LoRAConfig),
        "optimizer": section(OptimizerConfig, learning_rate=1e-4),
        "mesh": section(MeshConfig),
    }


if __name__ == "__main__":
    main()
