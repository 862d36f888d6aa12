"""Log-probabilities of packed rows, micro-batch by micro-batch."""

import jax
import jax.numpy as jnp

from rlt_jax.inference.log_probs import token_stats
from rlt_jax.models.transformer import Transformer
from rlt_jax.types import PackedRows, Params, TokenSpans


def score_rows(
    model: Transformer,
    temperature: float,
    params: Params,
    rows: PackedRows,
    *spans: TokenSpans,
) -> jax.Array:
    """Log-probability of the tokens of spans in packed rows.

    Args:
      model: the transformer.
      temperature: logits are divided by it.
      params: parameters.
      rows: [M, B, T]; micro-batches after `num_micro_batches` are not computed.
      spans: which tokens it is about; all without any.

    Returns:
      [M, B, T] float32, 0 for padding, the first token of each segment, and others.
    """
    wanted = jnp.full(rows.tokens.shape, not spans)
    for one_kind in spans:
        wanted |= scatter(jnp.ones(len(one_kind.mask)), one_kind, wanted.shape) > 0

    def one(m: jax.Array, log_probs: jax.Array) -> jax.Array:
        stats = token_stats(
            model,
            params,
            rows.tokens[m],
            rows.segment_ids[m],
            rows.positions[m],
            temperature,
            wanted[m],
        )
        return log_probs.at[m].set(stats.log_probs)

    zeros = jnp.zeros(rows.tokens.shape, jnp.float32)
    return jax.lax.fori_loop(0, rows.num_micro_batches, one, zeros)


def gather(per_token: jax.Array, spans: TokenSpans) -> jax.Array:
    """Values of the spans: [M, B, T] -> [N, T], 0 outside the mask."""
    return jnp.where(spans.mask, per_token.reshape(-1)[spans.index], 0.0)


def segment_sums(values: jax.Array, spans: TokenSpans) -> jax.Array:
    """Adds the tokens of each segment: [N, T] -> [N, T] by segment number."""
    row = jnp.arange(values.shape[0])[:, None]
    masked = jnp.where(spans.mask, values, 0.0)
    return jnp.zeros_like(values).at[row, spans.segment].add(masked)


def segment_mask(spans: TokenSpans) -> jax.Array:
    """Which segment numbers occur: [N, T] bool."""
    return segment_sums(jnp.ones(spans.mask.shape), spans) > 0


def scatter(values: jax.Array, spans: TokenSpans, shape: tuple[int, ...]) -> jax.Array:
    """Values of completions [N], or of span tokens [N, T], to [M, B, T]; else 0."""
    on_tokens = jnp.where(spans.mask, values.reshape(len(values), -1), 0.0)
    flat = jnp.zeros(shape, values.dtype).reshape(-1)
    return flat.at[spans.index].add(on_tokens).reshape(shape)
