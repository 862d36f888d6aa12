"""The kernels of accelerators agree with plain XLA; TPU programs have them."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from rlt_jax.models import attention_kernels as kernels
from rlt_jax.models.attention import Tokens, attention
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import (
    Transformer,
    hidden_states,
    init_params,
    logical_axes,
)
from rlt_jax.training.sharding import MESH_AXES, to_shardings

B, N, K, H = 2, 4, 2, 32


def packed(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segment_ids [B, T]: three segments a row, and padding."""
    positions = np.zeros((B, length), np.int32)
    segment_ids = np.zeros((B, length), np.int32)
    for b in range(B):
        edges = [0, *sorted(rng.choice(np.arange(1, length), 3, replace=False))]
        for number, (start, end) in enumerate(itertools.pairwise(edges), 1):
            positions[b, start:end] = np.arange(end - start)
            segment_ids[b, start:end] = number
    return positions, segment_ids


def operands(length: int, windowed: bool, dtype: str) -> tuple:
    rng = np.random.default_rng(length)
    tokens = Tokens(*map(jnp.asarray, packed(rng, length)), jnp.asarray(windowed))
    heads = (N, K, K, N)
    arrays = [rng.standard_normal((B, length, n, H)) for n in heads]
    return *(jnp.asarray(x, dtype) for x in arrays), tokens


def of_tokens(kernel: Callable) -> Callable:
    """A kernel, run by the interpreter, with the signature of `attention`."""
    return lambda q, k, v, tokens, settings: kernel(
        *(q, k, v, tokens.segment_ids, tokens.windowed, settings), interpret=True
    )


def values_and_gradients(attend: Callable, *args: jax.Array) -> list[jax.Array]:
    """Outputs and gradients of all three arrays, where there is no padding."""
    query, key, value, d_out, tokens = args

    @jax.jit
    def both(*arrays: jax.Array) -> tuple:
        out, pull = jax.vjp(lambda *x: attend(*x, tokens), *arrays)
        live = (tokens.segment_ids > 0)[:, :, None, None]
        return jnp.where(live, out, 0), *pull(jnp.where(live, d_out, 0))

    return [x.astype(jnp.float32) for x in both(query, key, value)]


@pytest.mark.parametrize(
    ("length", "blocks", "softcap", "window", "windowed"),
    [
        (100, (), None, None, False),
        (300, (), 2.0, None, False),
        (256, (256,), None, 20, False),
        (300, (), 3.0, 20, True),
        (500, (256,), 3.0, 20, True),  # two blocks of two parts
    ],
)
def test_the_tpu_kernel_agrees(
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    blocks: tuple[int, ...],
    softcap: float | None,
    window: int | None,
    windowed: bool,
) -> None:
    monkeypatch.setattr(kernels, "TPU_BLOCKS", blocks)
    monkeypatch.setattr(kernels, "TPU_KEYS_AT_ONCE", 128)
    args = operands(length, windowed, "float32")
    settings = kernels.Settings(H**-0.5, softcap, window)
    kernel = functools.partial(of_tokens(kernels.tpu_attention), settings=settings)
    xla = functools.partial(attention, settings=settings)
    for ours, theirs in zip(
        values_and_gradients(kernel, *args), values_and_gradients(xla, *args)
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [100, 192])
def test_the_gpu_kernel_agrees(length: int) -> None:
    args = operands(length, False, "float32")
    settings = kernels.Settings(H**-0.5)
    kernel = functools.partial(of_tokens(kernels.gpu_attention), settings=settings)
    xla = functools.partial(attention, settings=settings)
    for ours, theirs in zip(
        values_and_gradients(kernel, *args), values_and_gradients(xla, *args)
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [kernels.tpu_attention, kernels.gpu_attention])
def test_kernels_agree_in_bfloat16(kernel: Callable) -> None:
    args = operands(200, False, "bfloat16")
    settings = kernels.Settings(H**-0.5)
    run = functools.partial(of_tokens(kernel), settings=settings)
    xla = functools.partial(attention, settings=settings)
    for ours, theirs in zip(
        values_and_gradients(run, *args), values_and_gradients(xla, *args)
    ):
        # Results have 8 bits; weights are rounded to as many on one path and not on
        # the other, and gradients of keys are sums over many queries.
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 0.01


@pytest.mark.parametrize("kernel", [kernels.tpu_attention, kernels.gpu_attention])
def test_padding_has_finite_gradients(kernel: Callable) -> None:
    query, key, value, d_out, tokens = operands(140, False, "float32")
    tokens = tokens._replace(segment_ids=jnp.zeros_like(tokens.segment_ids))
    run = functools.partial(of_tokens(kernel), settings=kernels.Settings(1.0))
    out, pull = jax.vjp(lambda *x: run(*x, tokens), query, key, value)
    assert all(jnp.isfinite(x).all() for x in (out, *pull(d_out)))


@pytest.mark.parametrize(
    ("length", "token_bytes", "block"),
    [
        (1, 256, 128),
        (128, 256, 128),
        (256, 256, 256),
        (300, 256, 128),
        (1100, 256, 128),
        (1536, 256, 512),
        (2000, 256, 1024),
        (32_768, 256, 1024),
        (32_768, 1024, 512),
    ],
)
def test_blocks_fit_into_memory_and_lengthen_rows_by_little(
    length: int, token_bytes: int, block: int
) -> None:
    assert kernels.tpu_block(length, token_bytes) == block


@pytest.mark.parametrize("rows", [2, 3])  # 3 are not divided by fsdp
def test_a_mesh_splits_rows_and_heads(rows: int) -> None:
    mesh = AbstractMesh((1, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    seen = []

    def kernel(query: jax.Array, *_: jax.Array) -> jax.Array:
        seen.append(query.shape)
        return query

    shapes = [jax.ShapeDtypeStruct((rows, 8, n, H), "float32") for n in (N, K, K)]
    ids = jax.ShapeDtypeStruct((rows, 8), "int32")
    with jax.sharding.use_abstract_mesh(mesh):
        split = kernels.on_each_device(kernel, shapes[0])
        out = jax.eval_shape(split, *shapes, ids, jax.ShapeDtypeStruct((), "bool"))
    assert out.shape == shapes[0].shape
    assert seen == [(1 if rows == 2 else 3, 8, N // 2, H)]
    assert kernels.on_each_device(kernel, shapes[0]) is kernel


@pytest.mark.parametrize(
    ("head_dim", "dtype", "window", "found"),
    [
        (128, "bfloat16", None, {"tpu", "cuda"}),
        (128, "float32", None, {"tpu"}),
        (128, "bfloat16", 8, {"tpu"}),
        (80, "bfloat16", None, {"tpu"}),
        (512, "bfloat16", None, set()),
        (8, "float32", None, set()),
    ],
)
def test_accelerators_use_their_kernels_where_these_take_the_sizes(
    head_dim: int, dtype: str, window: int | None, found: set[str], gpu: AbstractMesh
) -> None:
    query, key = (jax.ShapeDtypeStruct((B, 64, n, head_dim), dtype) for n in (N, K))
    ids = jax.ShapeDtypeStruct((B, 64), "int32")

    def loss(q: jax.Array, k: jax.Array, ids: jax.Array) -> jax.Array:
        tokens = Tokens(ids, ids, jnp.array(True))
        out = attention(q, k, k, tokens, kernels.Settings(1.0, window=window))
        return (out.astype(jnp.float32) ** 2).sum()

    with jax.sharding.use_abstract_mesh(gpu):
        traced = jax.jit(jax.grad(loss)).trace(query, key, ids)
    calls = {"tpu": "tpu_custom_call", "cuda": "triton"}
    for platform in ("tpu", "cuda", "cpu"):
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
        inside = {name for name, call in calls.items() if call in lowered}
        assert inside == found & {platform}


def test_a_training_step_for_tpu_has_the_kernel_and_no_table_of_scores(
    tpus: Mesh,
) -> None:
    rows, length = 4, 512
    config = ModelConfig(
        vocab_size=64,
        embed_dim=128,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=128,
        max_length=length,
        dtype="bfloat16",
    )
    model = Transformer(config)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        shapes,
        to_shardings(logical_axes(config), tpus),
    )
    batch = NamedSharding(tpus, Spec(("data", "fsdp")))
    row = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch)

    def loss(params: dict, *rows: jax.Array) -> jax.Array:
        hidden, _ = hidden_states(model, params, *rows)
        return (hidden.astype(jnp.float32) ** 2).sum()

    with jax.sharding.use_abstract_mesh(tpus.abstract_mesh):
        step = jax.jit(jax.value_and_grad(loss)).trace(params, row, row, row)
        compiled = step.lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in text
    assert "tpu_custom_call" in text
    assert f"{length},{length}]" not in text
