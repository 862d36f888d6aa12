"""Sampling of the next token."""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from rlt_jax import ranges
from rlt_jax.types import Array

_BLOCK = 128  # tokens per block: a block is sampled first, then a token in it


@dataclasses.dataclass(frozen=True)
class SamplingConfig(ranges.Checked):
    """How completions are sampled.

    Attributes:
      max_new_tokens: maximum length of a completion in tokens, stop token included.
      temperature: divides the logits; 0 is greedy decoding.
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the smallest set of most likely tokens with at least this probability.
      min_p: keeps tokens with at least this fraction of the highest probability.
      repetition_penalty: divides the positive logits of tokens in the prompt or the
        completion and multiplies the negative ones (arXiv 1909.05858).
      stop: stop strings; a completion ends when it contains one.
      stop_ids: ids that end a completion, besides those of the tokenizer.
    """

    max_new_tokens: ranges.Size
    temperature: ranges.Temperature = 1.0
    top_k: ranges.NonNegativeInt = 0
    top_p: Annotated[float, ranges.Range(0, 1, above=True)] = 1.0
    min_p: ranges.Fraction = 0.0
    repetition_penalty: ranges.PositiveFloat = 1.0
    stop: tuple[Annotated[str, ranges.NOT_EMPTY], ...] = ()
    stop_ids: tuple[ranges.NonNegativeInt, ...] = ()


def sample(
    logits: Array, keys: Array, config: SamplingConfig, seen: Array
) -> tuple[Array, Array]:
    """Samples one token per row.

    Args:
      logits: [B, V] float32.
      keys: [B] PRNG keys; a row's token depends only on its own key and logits.
      config: sampling settings.
      seen: [B, V] bool, tokens that the repetition penalty applies to; [B, 0] without.

    Returns:
      tokens [B] int32 and their log-probabilities [B] float32 at the temperature (at 1
      for greedy decoding), before the penalty and the filters, as a trainer computes
      them.
    """
    temperature = config.temperature or 1.0
    penalized, penalty = logits, config.repetition_penalty
    if penalty != 1:
        lowered = jnp.where(logits > 0, logits / penalty, logits * penalty)
        penalized = jnp.where(seen, lowered, logits)
    if config.temperature == 0:
        # XLA's argmax is four times slower on CPU.
        V = logits.shape[-1]
        is_max = penalized == penalized.max(-1, keepdims=True)
        tokens = jnp.where(is_max, jnp.arange(V), V - 1).min(-1)
    else:
        tokens = _categorical(_filter(penalized / temperature, config), keys)
    scaled = logits / temperature
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, axis=-1)


def _filter(logits: Array, config: SamplingConfig) -> Array:
    """Logits [B, V] with those of the tokens that the filters drop set to -inf."""
    if config.top_k:
        logits = _keep(logits, lambda kept: kept.sum(-1) >= config.top_k)
    if config.top_p < 1:
        probs = jax.nn.softmax(logits, axis=-1)
        logits = _keep(logits, lambda kept: probs.sum(-1, where=kept) >= config.top_p)
    if config.min_p:
        cutoff = logits.max(-1, keepdims=True) + jnp.log(config.min_p)
        logits = jnp.where(logits >= cutoff, logits, -jnp.inf)
    return logits


def _keep(logits: Array, is_enough: Callable[[Array], Array]) -> Array:
    """Drops all but the most likely tokens of each row that are enough together.

    Bisection for the lowest logit takes one pass over the logits per bit and no sorting.
    """
    top = logits.max(-1, keepdims=True)
    bottom = jnp.where(jnp.isfinite(logits), logits, top).min(-1, keepdims=True)

    def bisect(_: int, interval: tuple) -> tuple:
        low, high = interval
        middle = (low + high) / 2
        enough = is_enough(logits >= middle)[:, None]
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 40, bisect, (bottom, top))
    # The most likely token may be enough by itself.
    cutoff = jnp.where(is_enough(logits >= top)[:, None], top, low)
    return jnp.where(logits >= cutoff, logits, -jnp.inf)


def _categorical(logits: Array, keys: Array) -> Array:
    """Samples a token [B] from softmax(logits): first its block, then the token.

    Takes two uniform numbers per row, where the Gumbel trick takes one per token.
    """
    B, V = logits.shape
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _inverse_cdf(weights.sum(-1), uniform[:, 0])
    in_block = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _inverse_cdf(in_block, uniform[:, 1])


def _inverse_cdf(weights: Array, uniform: Array) -> Array:
    """Index [B] with probability proportional to weights [B, n]; its weight is > 0."""
    cdf = jnp.cumsum(weights, axis=-1)
    reached = (cdf > uniform[:, None] * cdf[:, -1:]) & (weights > 0)
    # Rounding can leave no index reached.
    return jnp.where(reached.any(-1), reached.argmax(-1), weights.argmax(-1))
