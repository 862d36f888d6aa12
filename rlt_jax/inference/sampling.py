"""Drawing the next token."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlt_jax.errors import UserError

_BLOCK = 128  # tokens drawn from at once, after their block was drawn


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    Attributes:
      max_new_tokens: longest completion, stop token included.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only the k likeliest tokens; 0 is all.
      top_p: only the likeliest tokens that together reach this probability.
      min_p: only tokens at least this share as likely as the likeliest.
      repetition_penalty: the logits of tokens in the prompt or the completion are divided
        by it where positive and multiplied where negative (arXiv 1909.05858).
      stop: texts that end a completion when they occur in it.
      stop_ids: ids that end a completion, besides those of the tokenizer.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (good, what) in ranges.items():
            if not good:
                raise UserError(f"sampling.{name}={getattr(self, name)}: {what}.")
        if isinstance(self.stop, str) or "" in self.stop:
            raise UserError(
                f"sampling.stop={self.stop!r}: a list of texts, none empty."
            )
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))


def sample(
    logits: jax.Array, keys: jax.Array, config: SamplingConfig, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws a token per row.

    Args:
      logits: [B, V] float32.
      keys: [B] PRNG keys; a row's token depends on its own key and logits alone.
      config: how.
      seen: [B, V] bool, tokens that the repetition penalty holds for; read only if there
        is one.

    Returns:
      tokens [B] int32 and their log-probabilities [B] float32 at the temperature (at 1
      where it is 0), before penalty and filters: those that a trainer computes.
    """
    temperature = config.temperature or 1.0
    penalised = logits
    if config.repetition_penalty != 1:
        by = config.repetition_penalty
        less = jnp.where(logits > 0, logits / by, logits * by)
        penalised = jnp.where(seen, less, logits)
    if config.temperature == 0:
        # XLA's argmax is four times slower on CPU.
        V = logits.shape[-1]
        likeliest = penalised == penalised.max(-1, keepdims=True)
        tokens = jnp.where(likeliest, jnp.arange(V), V - 1).min(-1)
    else:
        tokens = _draw(_filtered(penalised / temperature, config), keys)
    scaled = logits / temperature
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, axis=-1)


def _filtered(scores: jax.Array, config: SamplingConfig) -> jax.Array:
    """Scores [B, V] of the tokens that stay, -inf for the others."""
    if config.top_k:
        least = _threshold(scores, lambda kept: kept.sum(-1) >= config.top_k)
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    if config.top_p < 1:
        probs = jax.nn.softmax(scores, axis=-1)

        def enough(kept: jax.Array) -> jax.Array:
            return jnp.where(kept, probs, 0.0).sum(-1) >= config.top_p

        scores = jnp.where(scores >= _threshold(scores, enough), scores, -jnp.inf)
    if config.min_p:
        least = scores.max(-1, keepdims=True) + jnp.log(config.min_p)
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    return scores


def _threshold(
    scores: jax.Array, enough: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The largest score [B, 1] such that the tokens not below it are enough.

    Halving an interval takes a pass over the logits for each bit and no sorting.
    """
    top = scores.max(-1, keepdims=True)
    bottom = jnp.where(jnp.isfinite(scores), scores, top).min(-1, keepdims=True)

    def halve(_: int, interval: tuple) -> tuple:
        low, high = interval
        middle = (low + high) / 2
        good = enough(scores >= middle)[:, None]
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    # The likeliest token may be enough by itself.
    alone = enough(scores >= top)[:, None]
    low, _ = jax.lax.fori_loop(0, 40, halve, (bottom, top))
    return jnp.where(alone, top, low)


def _draw(scores: jax.Array, keys: jax.Array) -> jax.Array:
    """A token [B] in proportion to exp(score): first its block, then the token.

    Two uniform numbers a row, where a Gumbel maximum takes one for every token.
    """
    B, V = scores.shape
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _pick(weights.sum(-1), uniform[:, 0])
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _pick(inside, uniform[:, 1])


def _pick(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index [B] in proportion to the weights [B, n], never one of weight 0."""
    sums = jnp.cumsum(weights, axis=-1)
    reached = (sums > uniform[:, None] * sums[:, -1:]) & (weights > 0)
    # Rounding may leave none reached.
    return jnp.where(reached.any(-1), reached.argmax(-1), weights.argmax(-1))
