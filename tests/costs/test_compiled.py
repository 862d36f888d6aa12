"""Compiled programs read by hand and by machine."""

import json
import math
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.costs import hlo
from rlt_jax.costs.compiled import (
    Traffic,
    collectives,
    hbm_bytes,
    memory,
)
from rlt_jax.costs.flops import forward_flops, params_in_products, train_flops
from rlt_jax.inference import head
from rlt_jax.models.attention import BLOCK
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.types import Batch

ROWS = 8 * 16 * 4  # bytes of [8, 16] float32 on each device

# Run where eight devices can be made before any backend has started, and where XLA
# optimises.
EIGHT_DEVICES = """
import json
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 8)
mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

def on_device(a, n):
    def known(i, a):
        return lax.all_gather(a, "y").max(0) + lax.axis_index("y")
    def inner(i, a):
        return jnp.sin(lax.psum(a, "y"))
    def outer(i, a):
        a = lax.ppermute(a, "x", [(0, 1), (1, 0)])
        return lax.fori_loop(0, n + i, inner, a)
    a = lax.fori_loop(0, 3, known, a)
    a = lax.fori_loop(0, n, outer, a)
    a = lax.psum_scatter(a, "y", scatter_dimension=1, tiled=True)
    return lax.all_to_all(a, "y", 0, 1, tiled=True)

spread = jax.shard_map(
    on_device, mesh=mesh, in_specs=(P(("x", "y")), P()), out_specs=P(("x", "y")),
    check_vma=False,
)
n, f32 = jax.ShapeDtypeStruct((), jnp.int32), jnp.float32
rows = jax.ShapeDtypeStruct((64, 16), f32)
square = jax.ShapeDtypeStruct((512, 512), f32)
stack = jax.ShapeDtypeStruct((16, 512, 512), f32)

def layers(x, stack):
    return lax.scan(lambda x, w: (jnp.sin(x) * w, jnp.cos(x)), x, stack)

def branches(n, x, w):
    return lax.cond(n > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

programs = {
    "spread": (spread, rows, n),
    "one": (lambda x: jnp.sin(x) + 1, square),
    "layers": (layers, square, stack),
    "rows": (lambda table, i: table[i], square, jax.ShapeDtypeStruct((8,), jnp.int32)),
    "branches": (branches, n, square, square),
}
for name, (function, *arguments) in programs.items():
    print(json.dumps([name, jax.jit(function).lower(*arguments).compile().as_text()]))
"""

# Layers whose parameters are spread over four of eight chips, trained for n steps.
TPU = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
devices = get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "fsdp"))

def layer(x, w):
    return x + jax.nn.relu(x @ w[0]) @ w[1], None

def loss(weights, x):
    y, _ = lax.scan(jax.checkpoint(layer), x, weights)
    return (y.astype(jnp.float32) ** 2).mean()

def steps(weights, x, n):
    def step(i, weights):
        gradients = jax.grad(loss)(weights, x + i.astype(x.dtype))
        return jax.tree.map(lambda w, g: w - g, weights, gradients)
    return lax.fori_loop(0, n, step, weights)

def array(shape, dtype, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

weights = (
    array((6, 512, 1024), jnp.bfloat16, None, "fsdp"),
    array((6, 1024, 512), jnp.bfloat16, None, None, "fsdp"),
)
x = array((64, 512), jnp.bfloat16, ("data", "fsdp"))
made = jax.jit(steps, out_shardings=tuple(w.sharding for w in weights))
compiled = made.lower(weights, x, array((), jnp.int32)).compile()
print(json.dumps(["steps", compiled.as_text()]))
"""

# What libtpu prints: on-chip memory S(1), an all-gather spread over two fusions, another
# one that runs asynchronously elsewhere, an all-reduce of which a slice is kept, and a
# product with a batch of four as a convolution.
FUSIONS = """HloModule made, is_scheduled=true, num_partitions=8

%gather.1 (p.1: bf16[128,64]) -> bf16[512,64] {
  %p.1 = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[512,64]{1,0} all-gather(%p.1), channel_id=7, \
replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}, dimensions={0}
}

%gather.2 (p.2: bf16[128,64]) -> bf16[512,64] {
  %p.2 = bf16[128,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[512,64]{1,0} all-gather(%p.2), channel_id=7, \
replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}, dimensions={0}
}

%gather.3 (p.5: bf16[128,64]) -> bf16[512,64] {
  %p.5 = bf16[128,64]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[512,64]{1,0} all-gather(%p.5), channel_id=9, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}, execution_thread="sparsecore"

%scatter (p.3: f32[64,32], p.4: s32[]) -> f32[8,32] {
  %p.3 = f32[64,32]{1,0} parameter(0)
  %p.4 = s32[] parameter(1)
  %all-reduce.1 = f32[64,32]{1,0} all-reduce(%p.3), channel_id=8, \
replica_groups=[1,8]<=[8], to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %part = f32[8,32]{1,0} dynamic-slice(%all-reduce.1, %p.4, %zero), \
dynamic_slice_sizes={8,32}
}

ENTRY %main (a: bf16[128,64], b: f32[64,32], i: s32[]) -> (f32[8,32], f32[4,16,32]) {
  %a = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[64,32]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %fusion.1 = bf16[512,64]{1,0:T(8,128)(2,1)S(1)} fusion(%a), kind=kCustom, \
calls=%gather.1, metadata={op_name="x/calls=%scatter"}
  %fusion.2 = bf16[512,64]{1,0:T(8,128)(2,1)S(1)} fusion(%a), kind=kCustom, \
calls=%gather.2
  %begun = ((bf16[128,64]{1,0}), bf16[512,64]{1,0:S(1)}, u32[]{:S(8)}) \
call-start(%a), async_execution_thread="sparsecore", to_apply=%gather.3
  %done = bf16[512,64]{1,0:S(1)} call-done(%begun)
  %fusion.3 = f32[8,32]{1,0} fusion(%b, %i), kind=kCustom, calls=%scatter
  %left = f32[4,16,8]{2,1,0:T(8,128)S(1)} custom-call(), custom_call_target="k"
  %right = f32[4,8,32]{2,1,0:T(8,128)S(1)} custom-call(), custom_call_target="k"
  %product = f32[4,16,32]{2,1,0:T(8,128)} convolution(%left, %right), \
window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
  ROOT %out = (f32[8,32]{1,0}, /*index=1*/f32[4,16,32]{2,1,0}) tuple(%fusion.3, \
%product)
}
"""

CONFIG = ModelConfig(
    vocab_size=96,
    embed_dim=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_length=32,
    tie_embeddings=False,
)


def texts_of(script: str) -> dict[str, str]:
    """The programs that a script prints, by name."""
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return dict(json.loads(line) for line in run.stdout.splitlines())


def dot_flops(text: str) -> float:
    """Operations of matrix products, a multiply and an add being two."""
    program = hlo.parse(text)

    def product(body: hlo.Computation, line: hlo.Instruction) -> int:
        left = body.operand(line, 0).arrays[0].shape
        axes = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", line.rest)[1]
        contracted = math.prod(left[int(axis)] for axis in axes.split(","))
        return 2 * math.prod(line.arrays[0].shape) * contracted

    def own(body: hlo.Computation) -> dict[str, float]:
        lines = hlo.inside(program, body)
        return {"flops": sum(product(*x) for x in lines if x[1].opcode == "dot")}

    return hlo.total(program, own, ())["flops"]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return texts_of(EIGHT_DEVICES)


def test_collectives_by_hand(texts: dict[str, str]) -> None:
    assert collectives(texts["spread"], (5, 7)) == {
        "all-gather": Traffic(3, 3 * ROWS * 3),
        "all-reduce": Traffic(5 * 7, 5 * 7 * 2 * ROWS * 3 / 4),
        "reduce-scatter": Traffic(1, ROWS * 3 / 4),
        "all-to-all": Traffic(1, ROWS / 4 * 3 / 4),
        "collective-permute": Traffic(5, 5 * ROWS),
    }


def test_unknown_loops_turn_once_unless_it_is_said(texts: dict[str, str]) -> None:
    text = texts["spread"]
    assert collectives(text, ())["all-reduce"].count == 1
    assert collectives(text, (5,))["all-reduce"].count == 5


def test_one_fusion_reads_and_writes_once(texts: dict[str, str]) -> None:
    assert hbm_bytes(texts["one"], ()) == 2 * 512 * 512 * 4


def test_loops_read_and_write_their_slices(texts: dict[str, str]) -> None:
    # Each turn reads x twice and a layer of the stack, and writes a new x and its output;
    # XLA may copy x, and clears the outputs first. Whole stacks would be 16 times more.
    layer = 512 * 512 * 4
    assert 16 * 5 * layer <= hbm_bytes(texts["layers"], ()) <= 16 * 9 * layer


def test_gathers_read_their_rows(texts: dict[str, str]) -> None:
    rows = 8 * 512 * 4
    assert 2 * rows <= hbm_bytes(texts["rows"], ()) <= 2 * rows + 1024


def test_the_longer_branch_counts(texts: dict[str, str]) -> None:
    assert dot_flops(texts["branches"]) == 2 * 2 * 512**3


def test_forms_of_tpus() -> None:
    assert collectives(FUSIONS, ()) == {
        "all-gather": Traffic(2, 2 * 128 * 64 * 2 * 3),
        "reduce-scatter": Traffic(1, 64 * 32 * 4 * 7 / 8),
    }
    # Three gathers read a; what they make stays on the chip. Of the rest: b and the index,
    # the slice that is kept, the product.
    kept = 64 * 32 * 4 + 4 + 8 * 32 * 4 + 4 * 16 * 32 * 4
    assert hbm_bytes(FUSIONS, ()) == 3 * 128 * 64 * 2 + kept


def test_a_program_for_tpus() -> None:
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs that are not there")
    text = texts_of(TPU)["steps"]
    traffic = collectives(text, (5,))
    kernel = 512 * 1024 * 2
    assert traffic["all-gather"] == Traffic(5 * 6 * 4, 5 * 6 * 4 * kernel * 3 / 4)
    # Gradients are summed over fsdp and over data, where a quarter of each is left.
    reduced = traffic["all-reduce"].bytes + traffic["reduce-scatter"].bytes
    assert reduced >= 5 * 6 * (2 * kernel * 3 / 4 + 2 * kernel / 4)
    # The weights of a chip are at least read and written once.
    assert hbm_bytes(text, (5,)) >= 2 * 2 * 6 * kernel / 4


def test_memory_adds_up() -> None:
    def double(x: jax.Array) -> jax.Array:
        return x * 2

    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    size = 256 * 256 * 4
    whole = memory(jax.jit(double).lower(x).compile())
    assert whole["arguments"] == whole["outputs"] == size
    assert whole["aliased"] == 0
    donated = memory(jax.jit(double, donate_argnums=0).lower(x).compile())
    assert donated["aliased"] == size
    assert whole["peak"] - donated["peak"] == size


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_model_flops_are_those_of_the_compiled_products(
    remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(**CONFIG.__dict__ | {"remat": remat})
    model = Transformer(config)
    B, T, chunks = 2, 2 * BLOCK, 4
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", B * config.vocab_size * T // chunks)

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        ones = jnp.ones_like(tokens)
        positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
        batch = Batch(tokens, positions, ones, None)
        return head.log_probs_and_entropy(model, params, batch)[0].sum()

    trip_count = hlo.trip_count

    def trips(program: hlo.Program, around: hlo.Computation, loop: Any) -> float:
        known = trip_count(program, around, loop)
        if known is not None:
            return known
        return attended if re.search('op_name="[^"]*attention', loop.rest) else chunks

    monkeypatch.setattr(hlo, "trip_count", trips)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((B, T), np.int32)
    forward = jax.jit(loss).lower(shapes, tokens).compile().as_text()
    both = jax.jit(jax.value_and_grad(loss)).lower(shapes, tokens).compile().as_text()
    # As if every block of queries met all blocks of keys, then as if it met none.
    attended, count = T // BLOCK, B * T
    assert dot_flops(forward) == forward_flops(config, count, T, count)
    attended = 0
    assert dot_flops(forward) == forward_flops(config, count, 0, count)
    assert dot_flops(both) == train_flops(config, count, 0, count)


def test_params_in_products_are_the_kernels_of_the_layers() -> None:
    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    kernels = {
        name: leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["layers"])
        if "kernel" in (name := jax.tree_util.keystr(path))
    }
    assert len(kernels) == 7
    assert params_in_products(CONFIG) == sum(kernels.values())


def test_windows_limit_the_context() -> None:
    windowed = ModelConfig(
        **CONFIG.__dict__
        | {"sliding_window": 4, "windowed_layers": (True, False, True)}
    )
    assert forward_flops(windowed, 10, 16, 0) - forward_flops(CONFIG, 10, 0, 0) == (
        4 * 4 * 8 * 10 * (4 + 16 + 4)
    )
