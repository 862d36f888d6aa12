"""Drawing the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from rlt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    Attributes:
      max_new_tokens: longest completion, stop token included.
      temperature: logits are divided by it; 0 takes the likeliest token.
    """

    max_new_tokens: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: at least 1.")
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature}: at least 0.")


def sample(
    logits: jax.Array, keys: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Draws a token per row.

    Args:
      logits: [B, V] float32.
      keys: [B] PRNG keys; a row's token depends on its own key alone.
      temperature: 0 for the likeliest token, whose log-probability is then taken at 1.

    Returns:
      tokens [B] int32 and their log-probabilities [B] float32 at the temperature.
    """
    scaled = logits / temperature if temperature else logits
    if temperature:
        tokens = jax.vmap(jax.random.categorical)(keys, scaled)
    else:
        tokens = jnp.argmax(scaled, axis=-1)
    log_probs = jax.nn.log_softmax(scaled, axis=-1)
    chosen = jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen
