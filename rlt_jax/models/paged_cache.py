"""Paged KV cache (arXiv 2309.06180), and attention over it.

The cache of a row is a list of pages of C tokens each, given by the page table, so memory
grows with the tokens in use and rows with the same prefix share its pages. Page 0 is a
dummy: rows without a request write to it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec

from rlt_jax.models.attention import MASKED, OnlineSoftmax, float_einsum, soft_cap
from rlt_jax.models.attention_kernels import Settings, pad, split_by_hand
from rlt_jax.models.config import ModelConfig
from rlt_jax.types import Array, PagedCache

# Keys and values that a thread block reads at once; an L4 has 99 KiB of shared memory.
GPU_TILE_BYTES = 64 * 1024
TPU_PAGES_PER_BLOCK = 8
PAGES_PER_BLOCK = 4  # of the XLA path


def empty_pages(config: ModelConfig, pages: int, page_size: int) -> PagedCache:
    """A zeroed pool of pages, page 0 included, with an empty page table."""
    shape = (config.num_kv_heads, config.num_layers, pages, page_size, config.head_dim)
    zeros = jnp.zeros(shape, config.activation_dtype)
    return PagedCache(zeros, zeros, jnp.zeros((0, 0), jnp.int32))


def page_bytes(config: ModelConfig, page_size: int) -> int:
    """Size of one page in bytes: keys and values of all layers."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return per_token * page_size * config.activation_dtype.itemsize


def copy_pages(
    cache: PagedCache, source: Array, target: Array, count: Array
) -> PagedCache:
    """Copies the first `count` pages of `source` [B] to the pages `target` [B]."""

    def copy(i: Array, cache: PagedCache) -> PagedCache:
        def one(pool: Array) -> Array:
            page = jax.lax.dynamic_slice_in_dim(pool, source[i], 1, axis=2)
            return jax.lax.dynamic_update_slice_in_dim(pool, page, target[i], axis=2)

        return cache._replace(keys=one(cache.keys), values=one(cache.values))

    return jax.lax.fori_loop(0, count, copy, cache)


def write(
    cache: PagedCache, layer: Array, positions: Array, key: Array, value: Array
) -> PagedCache:
    """Writes keys and values to the pages of their rows.

    Args:
      cache: pool and page table of the B rows.
      layer: [] int32, index of the layer.
      positions: [B, T] int32, consecutive in a row. When T is a multiple of the page
        size, the first position of a row has to be one too.
      key: [B, T, K, H].
      value: [B, T, K, H].
    """
    C = cache.keys.shape[3]
    # Positions after the last page of the table are padding.
    inside = positions < cache.table.shape[1] * C
    column = jnp.where(inside, positions // C, 0)
    page = jnp.where(inside, jnp.take_along_axis(cache.table, column, axis=1), 0)

    specs = (Spec("tensor"), Spec(None, None, "tensor"), Spec(), Spec(), Spec())
    scatter = split_by_hand(_write_scatter, specs, Spec("tensor"))

    def store(pool: Array, x: Array) -> Array:
        args = (pool, x, layer, positions, page)
        return jax.lax.platform_dependent(*args, cpu=_write_slices, default=scatter)

    return PagedCache(store(cache.keys, key), store(cache.values, value), cache.table)


def _write_slices(
    pool: Array, x: Array, layer: Array, positions: Array, page: Array
) -> Array:
    """Writes x [B, T, K, H] in place, where a scatter copies the pool on CPU."""
    C, (B, T) = pool.shape[3], positions.shape
    n = C if T % C == 0 else 1
    parts = x.astype(pool.dtype).reshape(B * T // n, n, *x.shape[2:])
    parts = jnp.moveaxis(parts, 2, 1)[:, :, None, None]  # [i, K, 1, 1, n, H]
    pages, offsets = page.reshape(-1)[::n], positions.reshape(-1)[::n] % C

    def one(i: Array, pool: Array) -> Array:
        start = (0, layer, pages[i], offsets[i], 0)
        return jax.lax.dynamic_update_slice(pool, parts[i], start)

    return jax.lax.fori_loop(0, len(parts), one, pool)


def _write_scatter(
    pool: Array, x: Array, layer: Array, positions: Array, page: Array
) -> Array:
    """Writes x [B, T, K, H] with a scatter.

    With the head as a scatter index, XLA keeps the layout that the kernels read; with the
    head in the update window, it would copy the pool in every layer.
    """
    C, (B, T, K, H) = pool.shape[3], x.shape
    x = jnp.moveaxis(x, 2, 0).astype(pool.dtype)
    heads = jnp.arange(K)[:, None, None]
    if T % C == 0:
        return pool.at[heads, layer, page[:, ::C]].set(x.reshape(K, B, T // C, C, H))
    return pool.at[heads, layer, page, positions % C].set(x)


def paged_attention(
    query: Array,
    cache: PagedCache,
    layer: Array,
    positions: Array,
    windowed: Array,
    settings: Settings,
) -> Array:
    """Causal attention of queries to the cached keys and values of their rows.

    With one query per row and no window, TPU and GPU use the paged kernels that ship with
    JAX where they support the sizes; everything else is plain XLA.

    Args:
      query: [B, T, N, H]; query head n reads key head n // G.
      cache: pool and page table of the B rows, with the T tokens already written.
      layer: [] int32, index of the layer.
      positions: [B, T] int32.
      windowed: [] bool, whether the layer has a sliding window.
      settings: scale, soft cap and window.

    Returns:
      [B, T, N, H] in the dtype of the query.
    """
    xla, softcap = functools.partial(_pagewise, settings), settings.softcap
    operands = (query * settings.scale, cache, layer, positions, windowed)
    if query.shape[1] > 1 or settings.window is not None:
        return xla(*operands)
    C, H = cache.keys.shape[3:]
    # Sizes that the kernels support; the TPU kernel rounds keys and values to bfloat16.
    on_tpu = H % 128 == 0 and cache.keys.dtype == jnp.bfloat16

    heads, pool = Spec(None, None, "tensor"), Spec("tensor")
    specs = (heads, PagedCache(pool, pool, Spec()), Spec(), Spec(), Spec())

    def kernel(tpu: bool) -> Callable[..., Array]:
        return split_by_hand(functools.partial(_by_kernel, tpu, softcap), specs, heads)

    tpu = kernel(tpu=True) if on_tpu else xla
    cuda = kernel(tpu=False) if C.bit_count() == H.bit_count() == 1 else xla
    return jax.lax.platform_dependent(*operands, tpu=tpu, cuda=cuda, default=xla)


def _pagewise(
    settings: Settings,
    query: Array,
    cache: PagedCache,
    layer: Array,
    positions: Array,
    windowed: Array,
) -> Array:
    """Online softmax over the pages, up to the last one that any row uses.

    A page that a row does not use has weights of exactly 0, so it changes no bit.
    """
    B, T, N, H = query.shape
    K, _, _, C, _ = cache.keys.shape
    query = query.reshape(B, T, K, N // K, H).transpose(2, 0, 3, 1, 4)

    block = min(PAGES_PER_BLOCK, cache.table.shape[1])
    table, C = pad(cache.table, block), C * block

    def page_block(j: Array, state: OnlineSoftmax) -> OnlineSoftmax:
        pages = jax.lax.dynamic_slice_in_dim(table, j * block, block, axis=1)
        pools = (cache.keys, cache.values)
        key, value = (x[:, layer, pages].reshape(K, B, C, H) for x in pools)
        scores = float_einsum("KBGTH,KBSH->KBGTS", query, key)
        scores = soft_cap(scores, settings.softcap)
        distance = positions[:, :, None] - (j * C + jnp.arange(C))
        visible = distance >= 0
        if settings.window is not None:
            visible &= (distance < settings.window) | ~windowed
        scores = jnp.where(visible[:, None], scores, MASKED)
        return state.add(scores, value, "KBGTS,KBSH->KBGTH")

    blocks = jnp.minimum(positions.max() // C + 1, table.shape[1] // block)
    state = jax.lax.fori_loop(0, blocks, page_block, OnlineSoftmax.empty(query.shape))
    out = state.mean().astype(query.dtype)
    return out.transpose(1, 3, 0, 2, 4).reshape(B, T, N, H)


def _by_kernel(
    tpu: bool,
    softcap: float | None,
    query: Array,
    cache: PagedCache,
    layer: Array,
    positions: Array,
    _: Array,
) -> Array:
    """One query per row, by the paged kernel of TPU or else of GPU; CPU imports none."""
    K, L, pages, C, H = cache.keys.shape
    if tpu:
        from jax.experimental.pallas.ops.tpu import paged_attention as kernel

        multiple, name = TPU_PAGES_PER_BLOCK, "page_indices"
        options = {"pages_per_compute_block": multiple}
    else:
        from jax.experimental.pallas.ops.gpu import paged_attention as kernel

        splits = 16  # of the pages of a row; each split reads some at a time
        each = -(-cache.table.shape[1] // splits)
        fitting = max(1, GPU_TILE_BYTES // (2 * C * H * cache.keys.dtype.itemsize))
        at_once = min(8, 1 << (each - 1).bit_length(), 1 << (fitting.bit_length() - 1))
        multiple, name = splits * at_once, "block_tables"
        options = {"k_splits": splits, "pages_per_compute_block": at_once}
    # Layers and pages become one axis, so that no layer has to be sliced.
    pools = (x.reshape(K, L * pages, C, H) for x in (cache.keys, cache.values))
    options[name] = pad(cache.table, multiple) + layer * pages
    options |= {"lengths": positions[:, 0] + 1, "attn_logits_soft_cap": softcap}
    out = kernel.paged_attention(query[:, 0], *pools, **options)
    return out[:, None].astype(query.dtype)
