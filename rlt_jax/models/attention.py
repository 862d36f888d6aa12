"""Rotary positions, attention masks and attention itself."""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a fully masked row gives no NaN


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Applies rotary position embeddings (Su et al., arXiv 2104.09864).

    The first half of the head is paired with the second half, as in Llama and Qwen.

    Args:
      x: [B, T, N, H] queries or keys.
      positions: [B, T] int32.
      theta: base of the angles.

    Returns:
      [B, T, N, H] in the dtype of x; angles are float32.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return rotated.astype(x.dtype)


def packed_mask(segment_ids: jax.Array) -> jax.Array:
    """Causal mask within segments: [B, T] int32 -> [B, T, T] bool."""
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & causal


def cache_mask(positions: jax.Array, cache_length: int) -> jax.Array:
    """Queries see the slots up to their own position: [B, T] -> [B, T, S] bool."""
    return jnp.arange(cache_length) <= positions[:, :, None]


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """Grouped-query attention with a float32 softmax.

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H]; query head n reads key head n // G with G = N / K.
      value: [B, S, K, H].
      mask: [B, T, S] bool, True where the query sees the key.

    Returns:
      [B, T, N, H] in the dtype of the query.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    query = query.reshape(B, T, K, N // K, H) * H**-0.5
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", query, key, preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, value).reshape(B, T, N, H)
