"""Between per-token arrays [M, B, T] of packed rows and arrays [E, S] of spans."""

import jax.numpy as jnp

from rlt_jax.types import Array, Spans


def mask(spans: Spans) -> Array:
    """[E, S] bool, where a span has a token."""
    return spans.segment >= 0


def _index(spans: Spans) -> Array:
    """[E, S] int32, place of each token in the flattened per-token arrays; 0 for none."""
    places = spans.start[:, None] + jnp.arange(spans.segment.shape[1])
    return jnp.where(mask(spans), places, 0)


def gather(per_token: Array, spans: Spans) -> Array:
    """Values on the tokens of spans: [M, B, T] -> [E, S], 0 where there is no token."""
    return jnp.where(mask(spans), per_token.reshape(-1)[_index(spans)], 0)


def scatter(values: Array, spans: Spans, shape: tuple[int, ...]) -> Array:
    """Values [E] of examples, or [E, S] of span tokens, onto their tokens; 0 elsewhere.

    Args:
      values: [E] or [E, S].
      spans: of E examples.
      shape: [M, B, T] of the result.
    """
    on_tokens = jnp.where(mask(spans), values.reshape(len(values), -1), 0)
    flat = jnp.zeros(shape, values.dtype).reshape(-1)
    return flat.at[_index(spans)].add(on_tokens).reshape(shape)


def on_tokens(shape: tuple[int, ...], *several: Spans | None) -> Array:
    """[M, B, T] bool, True on the tokens of any of the spans."""
    marked = jnp.zeros(shape, bool)
    for spans in several:
        if spans is not None:
            marked |= scatter(jnp.ones(spans.start.shape), spans, shape) > 0
    return marked


def segment_sums(values: Array, spans: Spans) -> Array:
    """Adds the tokens of each segment: [E, S] -> [E, S], indexed by segment number."""
    example = jnp.arange(values.shape[0])[:, None]
    kept = jnp.where(mask(spans), values, 0)
    return jnp.zeros_like(values).at[example, spans.segment].add(kept)


def segment_mask(spans: Spans) -> Array:
    """[E, S] bool, which segment numbers occur."""
    return segment_sums(jnp.ones(spans.segment.shape), spans) > 0


def segment_starts(spans: Spans) -> Array:
    """[E, S] int32, flattened place of the first token of each segment; -1 for none."""
    E, S = spans.segment.shape
    place = jnp.where(mask(spans), jnp.arange(S), S)
    example = jnp.arange(E)[:, None]
    first = jnp.full((E, S), S, jnp.int32).at[example, spans.segment].min(place)
    return jnp.where(first < S, spans.start[:, None] + first, -1)
