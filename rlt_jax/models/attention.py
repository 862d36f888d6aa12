"""Attention: who sees whom, and the weighted sum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlt_jax.models.blocked_attention import Settings, Tokens, blocked_attention

MASKED = -1e30  # finite, so that a fully masked row gives no NaN
LONG = 1024  # rows of at least so many tokens are attended to block by block
BLOCK = 512


class Visibility(NamedTuple):
    """A query sees the keys of its own segment up to its own position.

    Attributes:
      query_positions: [B, T] int32.
      query_segments: [B, T] int32.
      key_positions: [B, S] int32.
      key_segments: [B, S] int32.
    """

    query_positions: jax.Array
    query_segments: jax.Array
    key_positions: jax.Array
    key_segments: jax.Array


def packed_visibility(positions: jax.Array, segment_ids: jax.Array) -> Visibility:
    """Queries and keys are the same tokens of packed rows, both args [B, T] int32."""
    return Visibility(positions, segment_ids, positions, segment_ids)


def dense_mask(
    visibility: Visibility, window: int | None, windowed: jax.Array
) -> jax.Array:
    """[B, T, S] bool, True where the query sees the key; see `attention`."""
    v = visibility
    distance = v.query_positions[:, :, None] - v.key_positions[:, None, :]
    same = v.query_segments[:, :, None] == v.key_segments[:, None, :]
    mask = same & (distance >= 0)
    if window is not None:
        mask &= (distance < window) | ~windowed
    return mask


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    windowed: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Grouped-query attention with a float32 softmax.

    Long rows are computed block by block, with memory linear in their length. Queries
    and keys are then the same tokens, as they are whenever T equals S.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H]; query head n reads key head n // G with G = N / K.
      value: [B, S, K, H].
      visibility: of the T queries and S keys.
      windowed: [] bool, whether the window holds in this layer.
      scale: multiplies the queries.
      softcap: scores become softcap * tanh(score / softcap).
      window: how many tokens, its own included, a query sees in a windowed layer.

    Returns:
      [B, T, N, H] in the dtype of the query.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    query = query.reshape(B, T, K, N // K, H) * scale
    if T == key.shape[1] and T >= LONG:

        def whole(x: jax.Array) -> jax.Array:
            """Padded to whole blocks; what is added is padding's segment 0."""
            return jnp.pad(x, [(0, 0), (0, -T % BLOCK), *[(0, 0)] * (x.ndim - 2)])

        positions, segments = visibility.query_positions, visibility.query_segments
        tokens = Tokens(whole(positions), whole(segments), windowed)
        settings = Settings(BLOCK, softcap, window)
        out = blocked_attention(*map(whole, (query, key, value)), tokens, settings)
        return out[:, :T].reshape(B, T, N, H)
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", query, key, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    mask = dense_mask(visibility, window, windowed)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, value).reshape(B, T, N, H)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Squeezes values smoothly into (-cap, cap)."""
    return cap * jnp.tanh(x / cap)
