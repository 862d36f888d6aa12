"""Keys and values of growing rows in pages, and attention over them.

A row's cache is the list of pages that its `table` names, C tokens each, so memory
follows the tokens in use and rows with the same beginning share its pages. Page 0 belongs
to nobody: what rows without a request write lands there.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec

from rlt_jax.models.attention_kernels import split_by_hand
from rlt_jax.models.config import ModelConfig
from rlt_jax.types import PagedCache

MASKED = -1e30
TPU_PAGES_PER_BLOCK = 8
PAGES_PER_BLOCK = 4  # without a kernel


def empty_pages(config: ModelConfig, pages: int, page_size: int) -> PagedCache:
    """A zeroed pool, page 0 included, with a table of no rows."""
    shape = (
        config.num_kv_heads,
        config.num_layers,
        pages,
        page_size,
        config.head_dim,
    )
    zeros = jnp.zeros(shape, config.activation_dtype)
    return PagedCache(zeros, zeros, jnp.zeros((0, 0), jnp.int32))


def page_bytes(config: ModelConfig, page_size: int) -> int:
    """Bytes of one page: keys and values of all layers."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return per_token * page_size * config.activation_dtype.itemsize


def copy_pages(
    cache: PagedCache, source: jax.Array, target: jax.Array, count: jax.Array
) -> PagedCache:
    """Copies the first `count` of the pages `source` [B] onto the pages `target` [B]."""

    def copy(i: jax.Array, cache: PagedCache) -> PagedCache:
        def one(pool: jax.Array) -> jax.Array:
            page = jax.lax.dynamic_slice_in_dim(pool, source[i], 1, axis=2)
            return jax.lax.dynamic_update_slice_in_dim(pool, page, target[i], axis=2)

        return cache._replace(keys=one(cache.keys), values=one(cache.values))

    return jax.lax.fori_loop(0, count, copy, cache)


def write(
    cache: PagedCache,
    layer: jax.Array,
    positions: jax.Array,
    key: jax.Array,
    value: jax.Array,
) -> PagedCache:
    """Stores keys and values where the table says.

    Args:
      cache: pool and table of the B rows.
      layer: [] int32.
      positions: [B, T] int32, consecutive in a row. When T is a multiple of the page
        size, rows start at the start of a page.
      key: [B, T, K, H].
      value: [B, T, K, H].
    """
    C = cache.keys.shape[3]
    B, T = positions.shape
    # Positions behind the table's last page are padding.
    inside = positions < cache.table.shape[1] * C
    column = jnp.where(inside, positions // C, 0)
    page = jnp.where(inside, jnp.take_along_axis(cache.table, column, axis=1), 0)

    def by_slices(pool: jax.Array, x: jax.Array, *_: jax.Array) -> jax.Array:
        # On CPU a scatter copies the whole pool; slices are written in place.
        n = C if T % C == 0 else 1
        parts = x.astype(pool.dtype).reshape(B * T // n, n, *x.shape[2:])
        parts = jnp.moveaxis(parts, 2, 1)[:, :, None, None]  # [i, K, 1, 1, n, H]
        pages = page.reshape(-1)[::n]
        offsets = positions.reshape(-1)[::n] % C

        def one(i: jax.Array, pool: jax.Array) -> jax.Array:
            start = (0, layer, pages[i], offsets[i], 0)
            return jax.lax.dynamic_update_slice(pool, parts[i], start)

        return jax.lax.fori_loop(0, len(parts), one, pool)

    def by_scatter(
        pool: jax.Array,
        x: jax.Array,
        layer: jax.Array,
        page: jax.Array,
        positions: jax.Array,
    ) -> jax.Array:
        # With the head as an index, and not in the window that is written, XLA keeps the
        # layout that the kernels read; else it copies the pool in every layer.
        K, H = x.shape[2:]
        x = jnp.moveaxis(x, 2, 0).astype(pool.dtype)
        heads = jnp.arange(K)[:, None, None]
        if T % C == 0:
            pages = x.reshape(K, B, T // C, C, H)
            return pool.at[heads, layer, page[:, ::C]].set(pages)
        return pool.at[heads, layer, page, positions % C].set(x)

    whole = Spec()
    specs = (Spec("tensor"), Spec(None, None, "tensor"), whole, whole, whole)
    scattered = split_by_hand(by_scatter, specs, Spec("tensor"))

    def store(pool: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(
            *(pool, x, layer, page, positions), cpu=by_slices, default=scattered
        )

    return cache._replace(
        keys=store(cache.keys, key), values=store(cache.values, value)
    )


def paged_attention(
    query: jax.Array,
    cache: PagedCache,
    layer: jax.Array,
    positions: jax.Array,
    windowed: jax.Array,
    *,
    softcap: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Every query sees its row's keys up to its own position.

    One query a row without windows uses the paged kernels that come with JAX on TPU and
    GPU where they take the sizes, everything else plain XLA.

    Args:
      query: [B, T, N, H], already scaled; query head n reads key head n // G.
      cache: pool and table of the B rows, with the T tokens already written.
      layer: [] int32.
      positions: [B, T] int32.
      windowed: [] bool, whether the window holds in this layer.
      softcap: scores become softcap * tanh(score / softcap).
      window: how many tokens, its own included, a query sees in a windowed layer.

    Returns:
      [B, T, N, H] in the dtype of the query.
    """
    xla = functools.partial(_by_pages, softcap=softcap, window=window)
    operands = (query, cache, layer, positions, windowed)
    if query.shape[1] > 1 or window is not None:
        return xla(*operands)
    C, H = cache.keys.shape[3:]
    # Sizes that the kernels take; that of TPU rounds keys and values to bfloat16.
    on_tpu = H % 128 == 0 and cache.keys.dtype == jnp.bfloat16
    on_gpu = C.bit_count() == H.bit_count() == 1

    heads, pool, whole = Spec(None, None, "tensor"), Spec("tensor"), Spec()
    specs = (heads, PagedCache(pool, pool, whole), whole, whole, whole)

    def over_heads(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return split_by_hand(functools.partial(kernel, softcap), specs, heads)

    return jax.lax.platform_dependent(
        *operands,
        tpu=over_heads(_tpu_kernel) if on_tpu else xla,
        cuda=over_heads(_gpu_kernel) if on_gpu else xla,
        default=xla,
    )


def _by_pages(
    query: jax.Array,
    cache: PagedCache,
    layer: jax.Array,
    positions: jax.Array,
    windowed: jax.Array,
    softcap: float | None,
    window: int | None,
) -> jax.Array:
    """Online softmax over the pages, up to the last that any row needs.

    A page that a row does not need changes none of its bits: its weights are exactly 0.
    """
    B, T, N, H = query.shape
    K, _, _, C, _ = cache.keys.shape
    query = query.reshape(B, T, K, N // K, H).transpose(2, 0, 3, 1, 4)

    block = min(PAGES_PER_BLOCK, cache.table.shape[1])
    table = jnp.pad(cache.table, ((0, 0), (0, -cache.table.shape[1] % block)))
    C = C * block

    def add(j: jax.Array, carry: tuple) -> tuple:
        total, norm, largest = carry
        pages = jax.lax.dynamic_slice_in_dim(table, j * block, block, axis=1)
        key, value = (
            pool[:, layer, pages].reshape(K, B, C, H)
            for pool in (cache.keys, cache.values)
        )
        scores = jnp.einsum(
            "KBGTH,KBSH->KBGTS", query, key, preferred_element_type=jnp.float32
        )
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        distance = positions[:, :, None] - (j * C + jnp.arange(C))
        visible = distance >= 0
        if window is not None:
            visible &= (distance < window) | ~windowed
        scores = jnp.where(visible[:, None], scores, MASKED)
        new = jnp.maximum(largest, scores.max(-1))
        weights = jnp.exp(scores - new[..., None])
        shrink = jnp.exp(largest - new)
        weighed = jnp.einsum(
            "KBGTS,KBSH->KBGTH",
            weights.astype(value.dtype),
            value,
            preferred_element_type=jnp.float32,
        )
        total = total * shrink[..., None] + weighed
        return total, norm * shrink + weights.sum(-1), new

    shape = query.shape[:-1]
    empty = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.full(shape, MASKED, jnp.float32),
    )
    last = jnp.minimum(positions.max() // C + 1, table.shape[1] // block)
    total, norm, _ = jax.lax.fori_loop(0, last, add, empty)
    out = (total / norm[..., None]).astype(query.dtype)
    return out.transpose(1, 3, 0, 2, 4).reshape(B, T, N, H)


def _tpu_kernel(
    softcap: float | None,
    query: jax.Array,
    cache: PagedCache,
    layer: jax.Array,
    positions: jax.Array,
    _: jax.Array,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import paged_attention as kernel  # not on CPU

    block = TPU_PAGES_PER_BLOCK
    table, keys, values = _all_layers(cache, layer, block)
    out = kernel.paged_attention(
        query[:, 0],
        keys,
        values,
        positions[:, 0] + 1,
        table,
        attn_logits_soft_cap=softcap,
        pages_per_compute_block=block,
    )
    return out[:, None].astype(query.dtype)


def _gpu_kernel(
    softcap: float | None,
    query: jax.Array,
    cache: PagedCache,
    layer: jax.Array,
    positions: jax.Array,
    _: jax.Array,
) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import paged_attention as kernel  # not on CPU

    splits = 16  # of a row's pages; each reads them 1, 2, 4 or 8 at a time
    each = -(-cache.table.shape[1] // splits)
    columns = splits * min(8, 1 << (each - 1).bit_length())
    table, keys, values = _all_layers(cache, layer, columns)
    out = kernel.paged_attention(
        query[:, 0],
        keys,
        values,
        table,
        positions[:, 0] + 1,
        k_splits=splits,
        attn_logits_soft_cap=softcap,
    )
    return out[:, None].astype(query.dtype)


def _all_layers(
    cache: PagedCache, layer: jax.Array, columns: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Table and pools with a layer's pages as some of many; no layer is cut out.

    The table is padded to a multiple of `columns`.
    """
    K, L, pages, C, H = cache.keys.shape
    pad = -cache.table.shape[1] % columns
    table = jnp.pad(cache.table, ((0, 0), (0, pad))) + layer * pages
    shape = (K, L * pages, C, H)
    return table, cache.keys.reshape(shape), cache.values.reshape(shape)
