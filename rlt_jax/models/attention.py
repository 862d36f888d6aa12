"""Attention over packed rows, with memory linear in the length.

TPU and GPU use the kernels that ship with JAX where they support the sizes. Everything
else uses the online softmax of FlashAttention (arXiv 2205.14135) in plain XLA. A block of
queries visits only the blocks of keys from the start of its earliest segment (or window)
up to itself, so a packed row costs no more attention than its segments do alone.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlt_jax.models import attention_kernels as kernels
from rlt_jax.models.attention_kernels import Settings, pad
from rlt_jax.types import Array

MASKED = -1e30  # finite, so that fully masked rows do not become NaN
BLOCK = 64  # tokens; twice as fast on CPU as one block for rows of 256


class Tokens(NamedTuple):
    """What the attention mask depends on.

    Attributes:
      positions: [B, T] int32, counted from 0 within each segment.
      segment_ids: [B, T] int32, 0 for padding.
      windowed: [] bool, whether the layer has a sliding window.
    """

    positions: Array
    segment_ids: Array
    windowed: Array


def attention(
    query: Array,
    key: Array,
    value: Array,
    tokens: Tokens,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Array:
    """Causal grouped-query attention within segments, with a float32 softmax.

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H]; query head n reads key head n // G with G = N / K.
      value: [B, T, K, H].
      tokens: positions and segments of the packed rows.
      scale: multiplies the queries.
      softcap: scores become softcap * tanh(score / softcap).
      window: number of tokens that a query attends to in a windowed layer, itself
        included.

    Returns:
      [B, T, N, H] in the dtype of the query.
    """
    settings = Settings(scale, softcap, window)
    tpu = cuda = xla = functools.partial(_blockwise, settings)
    if kernels.tpu_takes(query):
        tpu = _kernel(kernels.tpu_attention, settings, query)
    if kernels.gpu_takes(query, settings):
        cuda = _kernel(kernels.gpu_attention, settings, query)
    operands = (query, key, value, tokens)
    if tpu is cuda is xla:
        return xla(*operands)
    return jax.lax.platform_dependent(*operands, tpu=tpu, cuda=cuda, default=xla)


def _kernel(
    kernel: kernels.Kernel, settings: Settings, query: Array
) -> Callable[[Array, Array, Array, Tokens], Array]:
    kernel = functools.partial(kernel, settings=settings)
    sharded = kernels.on_each_device(kernel, query)
    return lambda q, k, v, tokens: sharded(q, k, v, tokens.segment_ids, tokens.windowed)


def _blockwise(
    settings: Settings, query: Array, key: Array, value: Array, tokens: Tokens
) -> Array:
    B, T, N, H = query.shape
    K = key.shape[2]
    query = query.reshape(B, T, K, N // K, H) * settings.scale
    arrays = (query, key, value, tokens.positions, tokens.segment_ids)
    *arrays, positions, segment_ids = (pad(x, min(BLOCK, T)) for x in arrays)
    padded = Tokens(positions, segment_ids, tokens.windowed)
    return _attend(settings, *arrays, padded)[:, :T].reshape(B, T, N, H)


def soft_cap(x: Array, cap: float) -> Array:
    """Limits values smoothly to (-cap, cap)."""
    return cap * jnp.tanh(x / cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings, query: Array, key: Array, value: Array, tokens: Tokens
) -> Array:
    return _forward(settings, query, key, value, tokens)[0]


def _forward(
    settings: Settings, query: Array, key: Array, value: Array, tokens: Tokens
) -> tuple[Array, tuple]:
    B, T, K, G, H = query.shape
    C = min(BLOCK, T)
    first = _first_blocks(settings, tokens)

    def query_block(i: Array) -> tuple[Array, Array]:
        q = _heads_first(block_of(query, i, C))

        def key_block(j: Array, carry: tuple) -> tuple:
            total, norm, max_score = carry
            scores, _ = _scores(settings, q, block_of(key, j, C), tokens, i, j)
            new_max = jnp.maximum(max_score, scores.max(-1))
            weights = jnp.exp(scores - new_max[..., None])
            correction = jnp.exp(max_score - new_max)
            new = _weighted_sum(weights, block_of(value, j, C))
            total = total * correction[..., None] + new
            return total, norm * correction + weights.sum(-1), new_max

        shape = (B, K, G, C)
        empty = (
            jnp.zeros((*shape, H), jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.full(shape, MASKED, jnp.float32),
        )
        total, norm, max_score = jax.lax.fori_loop(first[i], i + 1, key_block, empty)
        out = (total / norm[..., None]).astype(query.dtype)
        return _tokens_first(out), max_score + jnp.log(norm)

    out, logsumexp = jax.lax.map(query_block, jnp.arange(T // C))
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape)
    return out, (query, key, value, tokens, out, logsumexp)


def _backward(settings: Settings, saved: tuple, d_out: Array) -> tuple:
    query, key, value, tokens, out, logsumexp = saved
    C = min(BLOCK, query.shape[1])
    first = _first_blocks(settings, tokens)
    deltas = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def query_block(carry: tuple, i: Array) -> tuple:
        q = _heads_first(block_of(query, i, C))
        d_o = _heads_first(block_of(d_out, i, C)).astype(jnp.float32)
        delta = jnp.moveaxis(block_of(deltas, i, C), 1, -1)

        def key_block(j: Array, carry: tuple) -> tuple:
            d_q, d_key, d_value = carry
            k, v = block_of(key, j, C), block_of(value, j, C)
            scores, softcap_grad = _scores(settings, q, k, tokens, i, j)
            weights = jnp.exp(scores - logsumexp[i][..., None])
            d_weights = jnp.einsum("BKGTH,BSKH->BKGTS", d_o, v.astype(jnp.float32))
            d_scores = weights * (d_weights - delta[..., None]) * softcap_grad
            d_q += _weighted_sum(d_scores, k)
            d_v = jnp.einsum("BKGTS,BKGTH->BSKH", weights, d_o)
            d_k = jnp.einsum("BKGTS,BKGTH->BSKH", d_scores, q.astype(jnp.float32))
            return d_q, _add_at(d_key, j, d_k), _add_at(d_value, j, d_v)

        d_q = jnp.zeros(q.shape, jnp.float32)
        d_q, *carry = jax.lax.fori_loop(first[i], i + 1, key_block, (d_q, *carry))
        return tuple(carry), _tokens_first(d_q)

    zeros = jnp.zeros(key.shape, jnp.float32)
    blocks = jnp.arange(query.shape[1] // C)
    (d_key, d_value), d_query = jax.lax.scan(query_block, (zeros, zeros), blocks)
    d_query = jnp.moveaxis(d_query, 0, 1).reshape(query.shape)
    grads = zip((d_query, d_key, d_value), (query, key, value))
    return *(grad.astype(x.dtype) for grad, x in grads), None


_attend.defvjp(_forward, _backward)


def _first_blocks(settings: Settings, tokens: Tokens) -> Array:
    """For each block of queries, the first block of keys that any query attends to."""
    distance = tokens.positions
    if settings.window is not None:
        limited = jnp.minimum(distance, settings.window - 1)
        distance = jnp.where(tokens.windowed, limited, distance)
    B, T = distance.shape
    C = min(BLOCK, T)
    first_key = (jnp.arange(T) - distance).reshape(B, T // C, C)
    return first_key.min(axis=(0, 2)) // C


def _scores(
    settings: Settings, query: Array, key: Array, tokens: Tokens, i: Array, j: Array
) -> tuple[Array, Array | float]:
    """Masked scores [B, K, G, C, C] of one block, and the gradient of the soft cap."""
    C = query.shape[-2]
    scores = jnp.einsum(
        "BKGTH,BSKH->BKGTS", query, key, preferred_element_type=jnp.float32
    )
    softcap_grad: Array | float = 1.0
    if settings.softcap is not None:
        tanh = jnp.tanh(scores / settings.softcap)
        scores, softcap_grad = settings.softcap * tanh, 1 - tanh**2

    def pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return block_of(x, i, C)[:, :, None], block_of(x, j, C)[:, None, :]

    distance = jnp.subtract(*pair(tokens.positions))
    same_segment = jnp.equal(*pair(tokens.segment_ids))
    # Padding tokens all have position 0, so they attend to their own block only.
    visible = same_segment & (distance >= 0)
    if settings.window is not None:
        visible &= (distance < settings.window) | ~tokens.windowed
    return jnp.where(visible[:, None, None], scores, MASKED), softcap_grad


def block_of(x: Array, block: Array, size: int) -> Array:
    """Slice of one block of tokens: [B, T, ...] -> [B, C, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis=1)


def _add_at(x: Array, block: Array, update: Array) -> Array:
    size = update.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(
        x, block_of(x, block, size) + update, block * size, axis=1
    )


def _weighted_sum(weights: Array, value: Array) -> Array:
    return jnp.einsum(
        "BKGTS,BSKH->BKGTH",
        weights.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )


def _heads_first(x: Array) -> Array:
    """[B, C, K, G, H] -> [B, K, G, C, H]."""
    return jnp.moveaxis(x, 1, 3)


def _tokens_first(x: Array) -> Array:
    """[B, K, G, C, H] -> [B, C, K, G, H]."""
    return jnp.moveaxis(x, 3, 1)
