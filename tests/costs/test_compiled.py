"""Compiled programs read by hand and by machine."""

import base64
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.costs import hlo
from rlt_jax.costs.compiled import Traffic, collectives, flops, hbm_bytes, memory
from rlt_jax.costs.flops import forward_flops, params_in_products, train_flops
from rlt_jax.inference import head
from rlt_jax.models.attention import BLOCK
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.types import Batch

ROWS = 8 * 16 * 4  # bytes of [8, 16] float32 on each device

SHOW = """
import base64, json

def show(name, compiled):
    (module,) = compiled.runtime_executable().hlo_modules()
    made = base64.b64encode(module.as_serialized_hlo_module_proto()).decode()
    print(json.dumps([name, made]))

"""

# Run where eight devices can be made before any backend has started, and where XLA
# optimises.
EIGHT_DEVICES = """
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
    show(name, jax.jit(function).lower(*arguments).compile())
"""

# Layers whose parameters are spread over four of eight chips, trained for n steps.
TPU = """
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
show("steps", compiled)
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


def programs_of(script: str) -> dict[str, hlo.Program]:
    """The programs that a script shows, by name."""
    run = subprocess.run(
        [sys.executable, "-c", SHOW + script],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    shown = dict(json.loads(line) for line in run.stdout.splitlines())
    return {name: hlo.parse(base64.b64decode(made)) for name, made in shown.items()}


@pytest.fixture(scope="module")
def programs() -> dict[str, hlo.Program]:
    return programs_of(EIGHT_DEVICES)


def test_collectives_by_hand(programs: dict[str, hlo.Program]) -> None:
    assert collectives(programs["spread"], (5, 7)) == {
        "all-gather": Traffic(3, 3 * ROWS * 3),
        "all-reduce": Traffic(5 * 7, 5 * 7 * 2 * ROWS * 3 / 4),
        "reduce-scatter": Traffic(1, ROWS * 3 / 4),
        "all-to-all": Traffic(1, ROWS / 4 * 3 / 4),
        "collective-permute": Traffic(5, 5 * ROWS),
    }


def test_unknown_loops_turn_once_unless_it_is_said(
    programs: dict[str, hlo.Program],
) -> None:
    program = programs["spread"]
    assert collectives(program, ())["all-reduce"].count == 1
    assert collectives(program, (5,))["all-reduce"].count == 5


def test_one_fusion_reads_and_writes_once(programs: dict[str, hlo.Program]) -> None:
    assert hbm_bytes(programs["one"], ()) == 2 * 512 * 512 * 4


def test_loops_read_and_write_their_slices(programs: dict[str, hlo.Program]) -> None:
    # Each turn reads x twice and a layer of the stack, and writes a new x and its output;
    # XLA may copy x, and clears the outputs first. Whole stacks would be 16 times more.
    layer = 512 * 512 * 4
    assert 16 * 5 * layer <= hbm_bytes(programs["layers"], ()) <= 16 * 9 * layer


def test_gathers_read_their_rows(programs: dict[str, hlo.Program]) -> None:
    rows = 8 * 512 * 4
    assert 2 * rows <= hbm_bytes(programs["rows"], ()) <= 2 * rows + 1024


def test_the_longer_branch_counts(programs: dict[str, hlo.Program]) -> None:
    assert flops(programs["branches"], ()) == 2 * 2 * 512**3


def test_a_program_for_tpus() -> None:
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs that are not there")
    program = programs_of(TPU)["steps"]
    traffic = collectives(program, (5,))
    kernel = 512 * 1024 * 2
    assert traffic["all-gather"] == Traffic(5 * 6 * 4, 5 * 6 * 4 * kernel * 3 / 4)
    # Gradients are summed over fsdp and over data, where a quarter of each is left.
    reduced = traffic["all-reduce"].bytes + traffic["reduce-scatter"].bytes
    assert reduced >= 5 * 6 * (2 * kernel * 3 / 4 + 2 * kernel / 4)
    # Of each layer two products, the one that is recomputed, and four for gradients.
    assert flops(program, (5,)) == 5 * 6 * 7 * 2 * (64 / 8) * 512 * 1024
    # The weights of a chip are at least read and written once.
    assert hbm_bytes(program, (5,)) >= 2 * 2 * 6 * kernel / 4


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

    read_loop = hlo.loop

    def loop(*args: Any) -> tuple[float, tuple]:
        known, kept = read_loop(*args)
        attention = "attention" in args[2].proto.metadata.op_name
        return known or (attended if attention else chunks), kept

    monkeypatch.setattr(hlo, "loop", loop)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((B, T), np.int32)
    forward = hlo.read(jax.jit(loss).lower(shapes, tokens).compile())
    both = hlo.read(jax.jit(jax.value_and_grad(loss)).lower(shapes, tokens).compile())
    # As if every block of queries met all blocks of keys, then as if it met none.
    attended, count = T // BLOCK, B * T
    assert flops(forward, ()) == forward_flops(config, count, T, count)
    attended = 0
    assert flops(forward, ()) == forward_flops(config, count, 0, count)
    assert flops(both, ()) == train_flops(config, count, 0, count)


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
