"""Log-probabilities of given tokens without ever holding [B, T, V].

Every per-token array is [B, T] and entry t is about `tokens[:, t]`: entry t comes from
the hidden state at t - 1, and the first token of a segment, which nothing predicts, has
log-probability 0. The shift is written here and nowhere else.

    tokens     a    b         c
    hidden     h0   h1        h2
    log_probs  0    p(b|h0)   p(c|h1)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlt_jax.models.transformer import Transformer, hidden_states, logits
from rlt_jax.types import Params

LOGITS_PER_CHUNK = 2**24  # 64 MiB of float32 at a time


class TokenStats(NamedTuple):
    """About every token of a batch of rows.

    Attributes:
      log_probs: [B, T] float32.
      entropy: [B, T] float32, of the distribution the token was drawn from, in nats.
    """

    log_probs: jax.Array
    entropy: jax.Array


def token_stats(
    model: Transformer,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    temperature: float = 1.0,
) -> TokenStats:
    """Log-probability and entropy of every token given those before it.

    The head runs over chunks of the length, and again in the backward pass, so memory
    grows with tokens times width and not with tokens times vocabulary.

    Args:
      model: the transformer.
      params: its parameters.
      tokens: [B, T] int32.
      segment_ids: [B, T] int32, 0 for padding.
      positions: [B, T] int32, from 0 within each segment.
      temperature: logits are divided by it; 0 counts as 1, as it does in `sample`.

    Returns:
      Both zero for padding and for the first token of each segment.
    """
    hidden, _ = hidden_states(model, params, tokens, positions, segment_ids)
    B, T = tokens.shape
    C = max(1, min(T, LOGITS_PER_CHUNK // (B * model.config.vocab_size)))
    pad = -T % C
    targets = jnp.pad(jnp.roll(tokens, -1, axis=1), ((0, 0), (0, pad)))
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))

    @jax.checkpoint
    def one_chunk(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, tuple]:
        states, target = chunk
        scaled = logits(model, params, states) / (temperature or 1.0)
        normaliser = jax.nn.logsumexp(scaled, axis=-1)
        chosen = jnp.take_along_axis(scaled, target[..., None], axis=-1)[..., 0]
        weights = jnp.exp(scaled - normaliser[..., None])
        entropy = normaliser - jnp.sum(weights * scaled, axis=-1)
        return None, (chosen - normaliser, entropy)

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, -1, C, *x.shape[2:]), 1, 0)

    _, stats = jax.lax.scan(one_chunk, None, (chunks(hidden), chunks(targets)))
    predicted = (positions > 0) & (segment_ids > 0)

    def about_token(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1).reshape(B, T + pad)[:, :T]
        return jnp.where(predicted, jnp.roll(x, 1, axis=1), 0.0)

    return TokenStats(*(about_token(x) for x in stats))


def token_log_probs(
    model: Transformer, params: Params, tokens: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Log-probabilities of unpacked rows, one segment each.

    Args:
      model: the transformer.
      params: its parameters.
      tokens: [B, T] int32.
      temperature: logits are divided by it.

    Returns:
      [B, T] float32; entry t is about tokens[:, t], entry 0 is 0.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = jnp.ones_like(tokens)
    stats = token_stats(model, params, tokens, segment_ids, positions, temperature)
    return stats.log_probs
