"""Attention over packed rows, with memory linear in the length.

TPU and GPU use the kernels that ship with JAX where they support the sizes. Everything
else uses the online softmax of FlashAttention (arXiv 2205.14135) in plain XLA. A block of
queries visits only the blocks of keys from the start of its earliest segment (or window)
up to itself, so a packed row costs no more attention than its segments do alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlt_jax.models import attention_kernels as kernels
from rlt_jax.models.attention_kernels import Kernel, Settings, pad
from rlt_jax.types import Array

MASKED = -1e30  # finite, so that fully masked rows do not become NaN
BLOCK = 64  # tokens; twice as fast on CPU as one block for rows of 256
float_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


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
    query: Array, key: Array, value: Array, tokens: Tokens, settings: Settings
) -> Array:
    """Causal grouped-query attention within segments, with a float32 softmax.

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H]; query head n reads key head n // G with G = N / K.
      value: [B, T, K, H].
      tokens: positions and segments of the packed rows.
      settings: scale, soft cap and window.

    Returns:
      [B, T, N, H] in the dtype of the query.
    """
    tpu = cuda = xla = functools.partial(_blockwise, settings)
    if kernels.tpu_takes(query):
        tpu = _kernel(kernels.tpu_attention, settings, query)
    if kernels.gpu_takes(query, settings):
        cuda = _kernel(kernels.gpu_attention, settings, query)
    operands = (query, key, value, tokens)
    if tpu is cuda is xla:
        return xla(*operands)
    return jax.lax.platform_dependent(*operands, tpu=tpu, cuda=cuda, default=xla)


def _kernel(kernel: Kernel, settings: Settings, query: Array) -> Kernel:
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


def soft_cap(x: Array, cap: float | None) -> Array:
    """Limits values smoothly to (-cap, cap); None leaves them as they are."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class OnlineSoftmax(NamedTuple):
    """A softmax-weighted sum of values, accumulated block by block.

    Attributes:
      total: [..., T, H] float32, sum of exp(score - max_score) * value.
      norm: [..., T] float32, sum of exp(score - max_score).
      max_score: [..., T] float32.
    """

    total: Array
    norm: Array
    max_score: Array

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "OnlineSoftmax":
        """The state before the first block, for a result of the given shape."""
        zeros = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:-1], jnp.float32))
        return cls(*zeros, jnp.full(shape[:-1], MASKED, jnp.float32))

    def add(self, scores: Array, value: Array, equation: str) -> "OnlineSoftmax":
        """Adds a block of keys: scores [..., T, S], and values summed by `equation`."""
        new_max = jnp.maximum(self.max_score, scores.max(-1))
        weights = jnp.exp(scores - new_max[..., None])
        correction = jnp.exp(self.max_score - new_max)
        new = _weighted_sum(weights, value, equation)
        total = self.total * correction[..., None] + new
        return OnlineSoftmax(total, self.norm * correction + weights.sum(-1), new_max)

    def mean(self) -> Array:
        """The weighted mean of the values, [..., T, H] float32."""
        return self.total / self.norm[..., None]


def _forward(
    settings: Settings, query: Array, key: Array, value: Array, tokens: Tokens
) -> tuple[Array, tuple]:
    B, T, K, G, H = query.shape
    C, first = min(BLOCK, T), _first_blocks(settings, tokens)

    def query_block(i: Array) -> tuple[Array, Array]:
        q = jnp.moveaxis(block_of(query, i, C), 1, 3)

        def key_block(j: Array, state: OnlineSoftmax) -> OnlineSoftmax:
            scores, _ = _scores(settings, q, block_of(key, j, C), tokens, i, j)
            return state.add(scores, block_of(value, j, C), "BKGTS,BSKH->BKGTH")

        state = OnlineSoftmax.empty((B, K, G, C, H))
        state = jax.lax.fori_loop(first[i], i + 1, key_block, state)
        out = jnp.moveaxis(state.mean().astype(query.dtype), 3, 1)
        return out, state.max_score + jnp.log(state.norm)

    out, logsumexp = jax.lax.map(query_block, jnp.arange(T // C))
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape)
    return out, (query, key, value, tokens, out, logsumexp)


def _backward(settings: Settings, saved: tuple, d_out: Array) -> tuple:
    query, key, value, tokens, out, logsumexp = saved
    C, first = min(BLOCK, query.shape[1]), _first_blocks(settings, tokens)
    deltas = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def query_block(carry: tuple, i: Array) -> tuple:
        q = jnp.moveaxis(block_of(query, i, C), 1, 3)
        d_o = jnp.moveaxis(block_of(d_out, i, C), 1, 3).astype(jnp.float32)
        delta = jnp.moveaxis(block_of(deltas, i, C), 1, -1)

        def key_block(j: Array, carry: tuple) -> tuple:
            d_q, d_key, d_value = carry
            k, v = block_of(key, j, C), block_of(value, j, C)
            scores, softcap_grad = _scores(settings, q, k, tokens, i, j)
            weights = jnp.exp(scores - logsumexp[i][..., None])
            d_weights = jnp.einsum("BKGTH,BSKH->BKGTS", d_o, v.astype(jnp.float32))
            d_scores = weights * (d_weights - delta[..., None]) * softcap_grad
            d_q += _weighted_sum(d_scores, k, "BKGTS,BSKH->BKGTH")
            d_v = jnp.einsum("BKGTS,BKGTH->BSKH", weights, d_o)
            d_k = jnp.einsum("BKGTS,BKGTH->BSKH", d_scores, q.astype(jnp.float32))
            return d_q, _add_at(d_key, j, d_k), _add_at(d_value, j, d_v)

        d_q = jnp.zeros(q.shape, jnp.float32)
        d_q, *carry = jax.lax.fori_loop(first[i], i + 1, key_block, (d_q, *carry))
        return tuple(carry), jnp.moveaxis(d_q, 3, 1)

    zeros = jnp.zeros(key.shape, jnp.float32)
    blocks = jnp.arange(query.shape[1] // C)
    (d_key, d_value), d_query = jax.lax.scan(query_block, (zeros, zeros), blocks)
    d_query = jnp.moveaxis(d_query, 0, 1).reshape(query.shape)
    pairs = ((d_query, query), (d_key, key), (d_value, value))
    return *(gradient.astype(x.dtype) for gradient, x in pairs), None


_attend = jax.custom_vjp(lambda *inputs: _forward(*inputs)[0], nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)


def _first_blocks(settings: Settings, tokens: Tokens) -> Array:
    """For each block of queries, the first block of keys that any query attends to."""
    distance = tokens.positions
    if settings.window is not None:
        limited = jnp.minimum(distance, settings.window - 1)
        distance = jnp.where(tokens.windowed, limited, distance)
    B, T = distance.shape
    C = min(BLOCK, T)
    return (jnp.arange(T) - distance).reshape(B, T // C, C).min(axis=(0, 2)) // C


def _scores(
    settings: Settings, query: Array, key: Array, tokens: Tokens, i: Array, j: Array
) -> tuple[Array, Array | float]:
    """Masked scores [B, K, G, C, C] of one block, and the gradient of the soft cap."""
    C = query.shape[-2]
    scores = float_einsum("BKGTH,BSKH->BKGTS", query, key)
    softcap_grad: Array | float = 1.0
    if settings.softcap is not None:
        tanh = jnp.tanh(scores / settings.softcap)
        scores, softcap_grad = settings.softcap * tanh, 1 - tanh**2
    positions, segment_ids, windowed = tokens
    distance = block_of(positions, i, C)[..., None] - block_of(positions, j, C)[:, None]
    ids = block_of(segment_ids, i, C)[..., None]
    # Padding tokens all have position 0, so they attend to their own block only.
    visible = (ids == block_of(segment_ids, j, C)[:, None]) & (distance >= 0)
    if settings.window is not None:
        visible &= (distance < settings.window) | ~windowed
    return jnp.where(visible[:, None, None], scores, MASKED), softcap_grad


def block_of(x: Array, block: Array, size: int) -> Array:
    """Slice of one block of tokens: [B, T, ...] -> [B, C, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis=1)


def _add_at(x: Array, block: Array, update: Array) -> Array:
    size = update.shape[1]
    added = block_of(x, block, size) + update
    return jax.lax.dynamic_update_slice_in_dim(x, added, block * size, axis=1)


def _weighted_sum(weights: Array, value: Array, equation: str) -> Array:
    return float_einsum(equation, weights.astype(value.dtype), value)
