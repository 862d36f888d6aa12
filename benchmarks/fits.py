"""Which models `configs/rlt.py` can train on which devices, by arithmetic and by `plan`.

    python -m benchmarks.fits
    JAX_PLATFORMS=cpu python -m benchmarks.fits --plan

The first command prints a Markdown table: the bytes of the fullest moment of an RL step on
each device, with the presets of the recipe and its default rows of 2,048 tokens. The second
one compares that with what libtpu says of the compiled programs of stage `rl`, all
parameters trained, on the TPU slices of the table (pip install 'rlt_jax[plan]'; half an
hour on two CPU cores).

Bytes a parameter, split over the devices (mesh axis fsdp), with all parameters trained:
4 for the master weights, 8 for AdamW's moments, 4 for the reference (0 where it is
offloaded), 2 for the judging student (0 likewise); in an update 8 for the gradients of a
step and of a micro-batch, in a rollout 2 on every device for the weights that decode, and
2 more while they are gathered from several. With adapters: 2 for the frozen weights, 2 for
the merged ones, 2 for the reference. To that come the cache of keys and values of every
slot, or, in an update, the activations of a micro-batch: the input of each layer, one
layer's own values, the logits of a chunk, and copies of the head and its gradient. What
the compiler for TPU adds was found with `--plan`: heads of less than 128 are padded in the
cache, and it is copied then; more copies of the head.
"""

import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from rlt_jax.costs.chips import CHIPS
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.published import published_config
from rlt_jax.models.transformer import init_params
from rlt_jax.stages.plan import PlanConfig, plan

RECIPE = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "rlt.py"))
DEVICES = RECIPE["DEVICES"]
MODELS = {
    size: f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B")
}
MACHINES = (
    *(("t4", 1), ("l4", 1), ("a100-40", 1), ("a100", 1), ("h100", 1), ("h100", 8)),
    *(("v5e", 1), ("v5e", 8), ("v6e", 8)),
)
SLICES = {("v5e", 1): "v5e:1x1", ("v5e", 8): "v5e:2x4", ("v6e", 8): "v6e:2x4"}
ROW_LENGTH = 2048
RANK = 32
USABLE = 0.75  # of a GPU's memory, what JAX takes by default
CHUNK = 3 * 2**26  # logits, their exponentials and their gradient


class Need(NamedTuple):
    """Bytes on each device in the two fullest moments of a step."""

    rollout: float
    update: float


def num_params(config: ModelConfig) -> int:
    """P, parameters of a model."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def adapter_params(config: ModelConfig, rank: int) -> int:
    """Parameters of adapters on all projections."""
    D, H, F = config.embed_dim, config.head_dim, config.mlp_dim
    query, key = config.num_heads * H, config.num_kv_heads * H
    pairs = ((D, query), (D, key), (D, key), (query, D), (D, F), (D, F), (F, D))
    return config.num_layers * rank * sum(map(sum, pairs))


def need(config: ModelConfig, name: str, count: int, rank: int) -> Need:
    """Bytes on each device of a step of RL; see the module docstring."""
    device, is_tpu = DEVICES[name], name.startswith("v")
    P = num_params(config)
    held = 0 if device.offload else 1
    if rank:
        trained = 12 * adapter_params(config, rank) / count
        resident = trained + (2 + 2 * held + 2 * held) * P / count
        merged, gradients = 2 * P / count, 8 * adapter_params(config, rank) / count
    else:
        resident = (4 + 8 + 4 * held + 2 * held) * P / count
        merged, gradients = 0.0, 8 * P / count
    fetched = (0 if held else 2 if rank else 4) * P / count  # one of the offloaded
    tokens = max(device.tokens, ROW_LENGTH)
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    a_layer = tokens * (6 * config.embed_dim + heads + 4 * config.mlp_dim) * 2
    copies = 1 if rank else 6 if is_tpu else 2
    head = 4 * config.embed_dim * config.vocab_size * copies / count
    activations = tokens * config.embed_dim * 2 * config.num_layers + 2 * a_layer
    of_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    cache = device.slots * (ROW_LENGTH + 64) * of_token
    if is_tpu and config.head_dim < 128:
        cache *= 128 / config.head_dim + 1
    gathered = 2 * P if count > 1 else 0
    return Need(
        resident + merged + 2 * P + max(cache, gathered) + CHUNK,
        resident + max(gradients + activations + head, fetched) + CHUNK,
    )


def usable(name: str) -> float:
    """Bytes of a device that a program may use."""
    known = CHIPS.get(name)
    return known.usable_bytes if known else USABLE * DEVICES[name].memory * 1e9


def cell(config: ModelConfig, name: str, count: int, rank: int) -> str:
    """GB of the fullest moment, bold where it fits."""
    most = max(need(config, name, count, rank))
    text = f"{most / 1e9:.0f}"
    return f"**{text}**" if most <= usable(name) else text


def main() -> None:
    """Prints the table that the arguments ask for."""
    if "--plan" in sys.argv[1:]:
        print_plans()
    else:
        print_needs()


def print_plans() -> None:
    """Prints what the compiler says of the largest program, a row a slice and model."""
    print("| slice | model | usable GB | arithmetic | plan | largest program |")
    print("|---|---|---|---|---|---|")
    for (name, count), topology in SLICES.items():
        for size, model in MODELS.items():
            changes = (f'model="{model}"',)
            recipe = "configs/rlt.py:gsm8k"
            found = plan(PlanConfig(recipe, topology, ("rl",), changes))
            largest = max(found["programs"], key=lambda one: one["bytes"]["total"])
            sizes = largest["bytes"]
            total = f"{sizes['total'] / 1e9:.1f}"
            if not all("roofline" in program for program in found["programs"]):
                total = f"over {total}"  # some were not compiled
            print(
                f"| `{topology}` | {size} | {sizes['limit'] / 1e9:.1f} |",
                f"{cell(published_config(model), name, count, 0)} |",
                f"**{total}**" if found["fits"] else total,
                f"| {largest['name']} |",
                flush=True,
            )


def print_needs() -> None:
    """Prints the arithmetic."""
    configs = {size: published_config(name) for size, name in MODELS.items()}
    columns = [f"{size}{part}" for size in MODELS for part in ("", " LoRA")]
    print("| device | usable GB |", " | ".join(columns), "|")
    print("|---|---|" + "---|" * len(columns))
    for name, count in MACHINES:
        label = f"{name}-{count}" if count > 1 else name
        cells = [
            cell(config, name, count, rank)
            for config in configs.values()
            for rank in (0, RANK)
        ]
        limit = usable(name) / 1e9
        print(f"| `{label}` | {limit:.0f} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
