"""Attention over packed rows, with memory linear in the length.

TPU and GPU use the kernels that come with JAX where these take the sizes. For all else
this is the online softmax of FlashAttention (arXiv 2205.14135) in plain XLA. A block of
queries meets only the blocks of keys between the start of its earliest segment (or
window) and itself, so packing several segments into a row costs no more attention than
the segments alone.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlt_jax.models import attention_kernels as kernels

MASKED = -1e30  # finite, so that nothing becomes NaN
BLOCK = 64  # tokens; twice as fast on CPU as one block for rows of 256


class Settings(NamedTuple):
    """What is known when the program is compiled."""

    block: int
    softcap: float | None
    window: int | None


class Tokens(NamedTuple):
    """Where the tokens stand: positions and segment_ids [B, T], windowed [] bool."""

    positions: jax.Array
    segment_ids: jax.Array
    windowed: jax.Array


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Causal grouped-query attention within segments, with a float32 softmax.

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H]; query head n reads key head n // G with G = N / K.
      value: [B, T, K, H].
      tokens: of the packed rows; positions count from 0 within each segment.
      scale: multiplies the queries.
      softcap: scores become softcap * tanh(score / softcap).
      window: how many tokens, its own included, a query sees in a windowed layer.

    Returns:
      [B, T, N, H] in the dtype of the query.
    """
    limits = {"scale": scale, "softcap": softcap, "window": window}
    xla = functools.partial(_by_blocks, **limits)
    tpu = cuda = xla
    if kernels.tpu_takes(query):
        tpu = _kernel(functools.partial(kernels.tpu_attention, **limits), query)
    if kernels.gpu_takes(query, softcap, window):
        cuda = _kernel(functools.partial(kernels.gpu_attention, scale=scale), query)
    operands = (query, key, value, tokens)
    if tpu is cuda is xla:
        return xla(*operands)
    return jax.lax.platform_dependent(*operands, tpu=tpu, cuda=cuda, default=xla)


def _kernel(
    kernel: kernels.Kernel, query: jax.Array
) -> Callable[[jax.Array, jax.Array, jax.Array, Tokens], jax.Array]:
    split = kernels.on_each_device(kernel, query)
    return lambda q, k, v, tokens: split(q, k, v, tokens.segment_ids, tokens.windowed)


def _by_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> jax.Array:
    B, T, N, H = query.shape
    K, block = key.shape[2], min(BLOCK, T)
    query = query.reshape(B, T, K, N // K, H) * scale
    arrays = (query, key, value, tokens.positions, tokens.segment_ids)
    *arrays, positions, segment_ids = (kernels.pad(x, block) for x in arrays)
    padded = Tokens(positions, segment_ids, tokens.windowed)
    out = _attend(Settings(block, softcap, window), *arrays, padded)
    return out[:, :T].reshape(B, T, N, H)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Squeezes values smoothly into (-cap, cap)."""
    return cap * jnp.tanh(x / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
) -> jax.Array:
    return _forward(settings, query, key, value, tokens)[0]


def _forward(
    settings: Settings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
) -> tuple[jax.Array, tuple]:
    B, T, K, G, H = query.shape
    C = settings.block
    first = _first_blocks(tokens, settings)

    def one_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = _heads_first(block_of(query, i, C))

        def add(j: jax.Array, carry: tuple) -> tuple:
            total, norm, largest = carry
            scores, _ = _scores(settings, q, block_of(key, j, C), tokens, i, j)
            new = jnp.maximum(largest, scores.max(-1))
            weights = jnp.exp(scores - new[..., None])
            shrink = jnp.exp(largest - new)
            total = total * shrink[..., None] + _weigh(weights, block_of(value, j, C))
            return total, norm * shrink + weights.sum(-1), new

        shape = (B, K, G, C)
        empty = (
            jnp.zeros((*shape, H), jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.full(shape, MASKED, jnp.float32),
        )
        total, norm, largest = jax.lax.fori_loop(first[i], i + 1, add, empty)
        out = (total / norm[..., None]).astype(query.dtype)
        return _tokens_first(out), largest + jnp.log(norm)

    out, normaliser = jax.lax.map(one_block, jnp.arange(T // C))
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape)
    return out, (query, key, value, tokens, out, normaliser)


def _backward(settings: Settings, saved: tuple, d_out: jax.Array) -> tuple:
    query, key, value, tokens, out, normaliser = saved
    C = settings.block
    first = _first_blocks(tokens, settings)
    overlap = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def one_block(carry: tuple, i: jax.Array) -> tuple:
        q = _heads_first(block_of(query, i, C))
        d_o = _heads_first(block_of(d_out, i, C)).astype(jnp.float32)
        delta = jnp.moveaxis(block_of(overlap, i, C), 1, -1)

        def add(j: jax.Array, carry: tuple) -> tuple:
            d_q, d_key, d_value = carry
            k, v = block_of(key, j, C), block_of(value, j, C)
            scores, slope = _scores(settings, q, k, tokens, i, j)
            weights = jnp.exp(scores - normaliser[i][..., None])
            d_weights = jnp.einsum("BKGTH,BSKH->BKGTS", d_o, v.astype(jnp.float32))
            d_scores = weights * (d_weights - delta[..., None]) * slope
            d_q += _weigh(d_scores, k)
            d_v = jnp.einsum("BKGTS,BKGTH->BSKH", weights, d_o)
            d_k = jnp.einsum("BKGTS,BKGTH->BSKH", d_scores, q.astype(jnp.float32))
            return d_q, _add_at(d_key, j, d_k), _add_at(d_value, j, d_v)

        d_q = jnp.zeros(q.shape, jnp.float32)
        d_q, *carry = jax.lax.fori_loop(first[i], i + 1, add, (d_q, *carry))
        return tuple(carry), _tokens_first(d_q)

    zeros = jnp.zeros(key.shape, jnp.float32)
    blocks = jnp.arange(query.shape[1] // C)
    (d_key, d_value), d_query = jax.lax.scan(one_block, (zeros, zeros), blocks)
    d_query = jnp.moveaxis(d_query, 0, 1).reshape(query.shape)
    return (
        d_query.astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        None,
    )


_attend.defvjp(_forward, _backward)


def _first_blocks(tokens: Tokens, settings: Settings) -> jax.Array:
    """For each block of queries the first block of keys that any of them sees."""
    reach = tokens.positions
    if settings.window is not None:
        near = jnp.minimum(reach, settings.window - 1)
        reach = jnp.where(tokens.windowed, near, reach)
    B, T = reach.shape
    earliest = (jnp.arange(T) - reach).reshape(B, -1, settings.block)
    return earliest.min(axis=(0, 2)) // settings.block


def _scores(
    settings: Settings,
    query: jax.Array,
    key: jax.Array,
    tokens: Tokens,
    i: jax.Array,
    j: jax.Array,
) -> tuple[jax.Array, jax.Array | float]:
    """Masked scores [B, K, G, C, C] of one block, and the slope of the soft cap."""
    C = settings.block
    scores = jnp.einsum(
        "BKGTH,BSKH->BKGTS", query, key, preferred_element_type=jnp.float32
    )
    slope: jax.Array | float = 1.0
    if settings.softcap is not None:
        squeezed = jnp.tanh(scores / settings.softcap)
        scores, slope = settings.softcap * squeezed, 1 - squeezed**2
    distance = (
        block_of(tokens.positions, i, C)[:, :, None]
        - block_of(tokens.positions, j, C)[:, None, :]
    )
    same = (
        block_of(tokens.segment_ids, i, C)[:, :, None]
        == block_of(tokens.segment_ids, j, C)[:, None, :]
    )
    # Rows of padding all have position 0; a token of them sees that block alone.
    visible = same & (distance >= 0)
    if settings.window is not None:
        visible &= (distance < settings.window) | ~tokens.windowed
    return jnp.where(visible[:, None, None], scores, MASKED), slope


def block_of(x: jax.Array, block: jax.Array, size: int) -> jax.Array:
    """Tokens of one block: [B, T, ...] -> [B, C, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis=1)


def _add_at(x: jax.Array, block: jax.Array, update: jax.Array) -> jax.Array:
    size = update.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(
        x, block_of(x, block, size) + update, block * size, axis=1
    )


def _weigh(weights: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.einsum(
        "BKGTS,BSKH->BKGTH",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )


def _heads_first(x: jax.Array) -> jax.Array:
    """[B, C, K, G, H] -> [B, K, G, C, H]."""
    return jnp.moveaxis(x, 1, 3)


def _tokens_first(x: jax.Array) -> jax.Array:
    """[B, K, G, C, H] -> [B, C, K, G, H]."""
    return jnp.moveaxis(x, 3, 1)
