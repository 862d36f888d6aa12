"""Attention over pages against attention over whole rows, on every path."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pallas_tpu
from jax.experimental.pallas.ops.gpu import paged_attention as gpu_kernel
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from rlt_jax.models import paged_cache
from rlt_jax.models.attention_kernels import Settings
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.paged_cache import (
    copy_pages,
    empty_pages,
    page_bytes,
    paged_attention,
    write,
)
from rlt_jax.types import PagedCache

L, K, C, H = 2, 2, 4, 8
CONFIG = ModelConfig(
    vocab_size=8,
    embed_dim=8,
    num_layers=L,
    num_heads=4,
    num_kv_heads=K,
    head_dim=H,
    mlp_dim=8,
    max_length=64,
)


@functools.partial(jax.jit, static_argnames=("softcap", "window"))
def attend(
    *operands: Any, softcap: float | None = None, window: int | None = None
) -> jax.Array:
    return paged_attention(*operands, Settings(1.0, softcap, window))


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def pool_and_rows(
    rng: np.random.Generator, B: int, columns: int, head_dim: int = H
) -> tuple[PagedCache, np.ndarray, np.ndarray]:
    """Full pages in random places, and layer 1 of them as rows [B, S, K, H]."""
    shape = (K, L, 1 + B * columns, C, head_dim)
    table = rng.permutation(np.arange(1, shape[2])).reshape(B, columns)
    cache = PagedCache(
        normal(rng, *shape), normal(rng, *shape), jnp.asarray(table, jnp.int32)
    )

    def rows(pool: jax.Array) -> np.ndarray:
        pages = np.asarray(pool, np.float64)[:, 1][:, table]  # [K, B, columns, C, H]
        return np.moveaxis(pages.reshape(K, B, columns * C, head_dim), 0, 2)

    return cache, rows(cache.keys), rows(cache.values)


def dense(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    positions: np.ndarray,
    softcap: float | None = None,
    window: int | None = None,
) -> np.ndarray:
    """The same, a query and a head at a time in float64."""
    query = np.asarray(query, np.float64)
    out = np.empty(query.shape)
    for b, t, n in np.ndindex(query.shape[:3]):
        at, head = positions[b, t], n // (query.shape[2] // K)
        seen = slice(0 if window is None else max(0, at - window + 1), at + 1)
        scores = keys[b, seen, head] @ query[b, t, n]
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ values[b, seen, head] / weights.sum()
    return out


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    ("softcap", "window", "windowed"),
    [(None, None, False), (2.0, None, False), (2.0, 5, True), (None, 5, False)],
)
def test_pages_are_seen_as_whole_rows(
    T: int, softcap: float | None, window: int | None, windowed: bool
) -> None:
    rng = np.random.default_rng(T)
    cache, keys, values = pool_and_rows(rng, B=4, columns=5)
    query = normal(rng, 4, T, 4, H)
    # The shortest row, ends of a page, and one that sees everything.
    positions = np.array([[0], [C - 1], [2 * C], [5 * C - T]]) + np.arange(T)
    ours = attend(
        query,
        cache,
        jnp.int32(1),
        jnp.asarray(positions, jnp.int32),
        jnp.asarray(windowed),
        softcap=softcap,
        window=window,
    )
    seen = window if windowed else None
    expected = dense(query, keys, values, positions, softcap, seen)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_pages_that_no_row_needs_change_no_bit() -> None:
    rng = np.random.default_rng(0)
    cache, _, _ = pool_and_rows(rng, B=2, columns=5)
    args = jnp.int32(1), jnp.array([[6], [3]]), jnp.asarray(False)
    query = normal(rng, 2, 1, 4, H)
    both = attend(query, cache, *args)
    longer = jnp.array([[6], [19]])
    mixed = attend(query, cache, args[0], longer, args[2])
    np.testing.assert_array_equal(mixed[0], both[0])
    wild = cache._replace(table=cache.table.at[:, 2:].set(0))
    np.testing.assert_array_equal(attend(query, wild, *args), both)


def stored(write_where: str, *args: jax.Array) -> PagedCache:
    """`write` as on this platform or another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jax.lax, "platform_dependent", lambda *x, **by: by[write_where](*x)
        )
        return write(*args)


@pytest.mark.parametrize(
    ("starts", "T"), [((0, 7, 19), 1), ((0, 4, 12), 4), ((4, 0, 8), 12)]
)
def test_slices_and_scatter_store_the_same(starts: tuple[int, ...], T: int) -> None:
    rng = np.random.default_rng(T)
    cache, _, _ = pool_and_rows(rng, B=3, columns=5)
    # The last row has pages for half of it: what it has no page for goes to page 0.
    cache = cache._replace(table=cache.table.at[2, 3:].set(0))
    positions = jnp.array(starts, jnp.int32)[:, None] + jnp.arange(T)
    key, value = normal(rng, 3, T, K, H), normal(rng, 3, T, K, H)
    args = cache, jnp.int32(1), positions, key, value
    slices, scatter = stored("cpu", *args), stored("default", *args)
    for ours, theirs, old, new in (
        (slices.keys, scatter.keys, cache.keys, key),
        (slices.values, scatter.values, cache.values, value),
    ):
        np.testing.assert_array_equal(ours[:, :, 1:], theirs[:, :, 1:])
        expected = np.array(old)
        for b, t in np.ndindex(3, T):
            place = starts[b] + t
            page = cache.table[b, place // C] if place < 5 * C else 0
            expected[:, 1, page, place % C] = new[b, t]
        np.testing.assert_array_equal(ours[:, :, 1:], expected[:, :, 1:])
    np.testing.assert_array_equal(write(*args).keys, slices.keys)


def test_what_is_behind_the_table_lands_in_page_0() -> None:
    rng = np.random.default_rng(0)
    cache, _, _ = pool_and_rows(rng, B=1, columns=2)
    positions = jnp.arange(C, 4 * C)[None]  # the table ends at 2 C
    new = normal(rng, 1, 3 * C, K, H)
    ours = write(cache, jnp.int32(0), positions, new, new)
    page = cache.table[0, 1]
    np.testing.assert_array_equal(ours.keys[:, 0, page], new[0, :C].swapaxes(0, 1))
    others = np.setdiff1d(np.arange(1, 3), page)
    np.testing.assert_array_equal(ours.keys[:, :, others], cache.keys[:, :, others])


def test_only_the_first_pages_are_copied() -> None:
    rng = np.random.default_rng(0)
    cache, _, _ = pool_and_rows(rng, B=2, columns=3)
    source, target = jnp.array([1, 2, 3]), jnp.array([4, 5, 6])
    copied = copy_pages(cache, source, target, jnp.int32(2))
    expected = np.array(cache.values)
    expected[:, :, 4:6] = expected[:, :, 1:3]
    np.testing.assert_array_equal(copied.values, expected)
    np.testing.assert_array_equal(copied.keys[:, :, 4:6], cache.keys[:, :, 1:3])


def test_the_size_of_a_page() -> None:
    cache = empty_pages(CONFIG, pages=3, page_size=C)
    assert cache.keys.shape == cache.values.shape == (K, L, 3, C, H)
    assert 3 * page_bytes(CONFIG, C) == cache.keys.nbytes + cache.values.nbytes


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("columns", [3, 8])
def test_the_gpu_kernel_agrees(
    columns: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gpu_kernel,
        "paged_attention",
        functools.partial(gpu_kernel.paged_attention, interpret=True),
    )
    rng = np.random.default_rng(columns)
    cache, keys, values = pool_and_rows(rng, B=3, columns=columns)
    query, positions = normal(rng, 3, 1, 4, H), np.array([[0], [5], [columns * C - 1]])
    operands = jnp.int32(1), jnp.asarray(positions, jnp.int32), jnp.asarray(False)
    ours = paged_cache._by_kernel(False, softcap, query, cache, *operands)
    expected = dense(query, keys, values, positions, softcap)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("columns", [3, 16])
def test_the_tpu_kernel_agrees(columns: int, softcap: float | None) -> None:
    rng = np.random.default_rng(columns)
    cache, _, _ = pool_and_rows(rng, B=3, columns=columns)
    # The kernel reads keys and values as bfloat16.
    cache = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, cache
    )
    query = normal(rng, 3, 1, 4, H)
    positions = jnp.array([[0], [5], [columns * C - 1]], jnp.int32)
    operands = query, cache, jnp.int32(1), positions, jnp.asarray(False)
    with pallas_tpu.force_tpu_interpret_mode():
        ours = paged_cache._by_kernel(True, softcap, *operands)
    as_float = cache._replace(
        keys=cache.keys.astype(jnp.float32), values=cache.values.astype(jnp.float32)
    )
    exact = attend(query, as_float, *operands[2:], softcap=softcap)
    np.testing.assert_allclose(ours, exact, atol=1e-5)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "columns", "dtype", "kernels"),
    [
        (128, 16, 3, "bfloat16", {"tpu", "cuda"}),
        (128, 16, 8, "float32", {"cuda"}),
        (64, 16, 40, "bfloat16", {"cuda"}),
        (96, 16, 8, "bfloat16", set()),
        (128, 24, 8, "bfloat16", {"tpu"}),
        (128, 16, 200, "bfloat16", {"tpu", "cuda"}),
    ],
)
def test_accelerators_use_their_kernels_where_these_take_the_sizes(
    head_dim: int,
    page_size: int,
    columns: int,
    dtype: str,
    kernels: set[str],
    gpu: AbstractMesh,
) -> None:
    def shape(*sizes: int, of: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, of)

    pool = shape(K, L, 9, page_size, head_dim)
    with jax.sharding.use_abstract_mesh(gpu):
        traced = jax.jit(attend).trace(
            shape(4, 1, 8, head_dim),
            PagedCache(pool, pool, shape(4, columns, of="int32")),
            shape(of="int32"),
            shape(4, 1, of="int32"),
            shape(of="bool"),
        )
    for platform, call in (("tpu", "tpu_custom_call"), ("cuda", "triton")):
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
        assert (call in lowered) == (platform in kernels)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("columns", [6, 80, 256])
def test_the_gpu_kernel_reads_no_more_than_shared_memory_holds(
    monkeypatch: pytest.MonkeyPatch, columns: int, head_dim: int, dtype: str
) -> None:
    given = {}

    def stub(query: jax.Array, *_: jax.Array, **options: Any) -> jax.Array:
        given.update(options)
        return query

    monkeypatch.setattr(gpu_kernel, "paged_attention", stub)
    pool = jnp.zeros((1, 1, 2, 64, head_dim), dtype)
    cache = PagedCache(pool, pool, jnp.zeros((1, columns), jnp.int32))
    query, positions = jnp.zeros((1, 1, 2, head_dim)), jnp.zeros((1, 1), jnp.int32)
    paged_cache._by_kernel(False, None, query, cache, 0, positions, False)
    at_once, splits = given["pages_per_compute_block"], given["k_splits"]
    a_page = 2 * 64 * head_dim * pool.dtype.itemsize  # keys and values
    assert at_once == 1 or at_once * a_page <= 64 * 1024
    assert at_once.bit_count() == 1
    padded = given["block_tables"].shape[1]
    assert padded >= columns
    assert padded % (splits * at_once) == 0


def test_decoding_compiles_for_tpu_with_the_kernel(tpus: Mesh) -> None:
    """As the engine splits it: slots and pages by hand, heads by the compiler."""
    B, N, heads, page, H = 32, 14, 2, 64, 128  # 16 slots a shard, rows of 32,768
    split, by_rows = ("data", "fsdp"), Spec(("data", "fsdp"))
    by_pages = Spec(None, None, split)

    def shape(dtype: str, spec: Spec, *sizes: int) -> jax.ShapeDtypeStruct:
        at = NamedSharding(tpus, spec)
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=at)

    pool = Spec("tensor", None, split)
    keys = shape("bfloat16", pool, heads, L, 1024, page, H)
    cache = PagedCache(keys, keys, shape("int32", by_rows, B, 512))
    specs = PagedCache(by_pages, by_pages, by_rows)
    sharded = jax.shard_map(
        attend,
        mesh=tpus,
        in_specs=(by_rows, specs, Spec(), by_rows, Spec()),
        out_specs=by_rows,
        axis_names=set(split),
        check_vma=False,
    )
    traced = jax.jit(sharded).trace(
        shape("bfloat16", Spec(split, None, "tensor"), B, 1, N, H),
        cache,
        shape("int32", Spec()),
        shape("int32", by_rows, B, 1),
        shape("bool", Spec()),
    )
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    assert "tpu_custom_call" in compiled.as_text()
    # The pool is read where it is: a copy of a device's part would show.
    part = keys.size * keys.dtype.itemsize // tpus.size
    assert compiled.memory_analysis().temp_size_in_bytes < part // 4
