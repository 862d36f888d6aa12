"""Advantages and loss weights, filled into a batch."""

import jax.numpy as jnp

from rlt_jax.inference import spans
from rlt_jax.rl.baselines import ADVANTAGES, has_signal
from rlt_jax.rl.losses import LOSSES, ObjectiveConfig
from rlt_jax.types import Array, Batch


def fill(
    config: ObjectiveConfig, group_size: int, limit: int, batch: Batch, rewards: Array
) -> Batch:
    """The batch with advantages, inverse lengths and loss weights of its tokens.

    Args:
      config: names advantage and normalisation, and what has no gradient.
      group_size: R.
      limit: most tokens that a completion can have, the constant of Dr. GRPO.
      batch: of E completions.
      rewards: [E] float32.
    """
    shape, completion = batch.tokens.shape, batch.completion
    lengths = spans.mask(completion).sum(-1)
    inverse = 1 / jnp.maximum(lengths, 1).astype(jnp.float32)
    kept = completion_mask(config, rewards, batch.finished, group_size)
    weight = LOSSES[config.loss].weight(lengths, kept, limit)
    advantages = ADVANTAGES[config.advantage](rewards, group_size)
    return batch._replace(
        advantages=spans.scatter(advantages, completion, shape),
        inverse_length=spans.scatter(inverse, completion, shape),
        loss_weights=spans.scatter(jnp.where(kept, weight, 0.0), completion, shape),
    )


def completion_mask(
    objective: ObjectiveConfig, rewards: Array, finished: Array, group_size: int
) -> Array:
    """Which completions have a gradient: [E] bool from rewards [E] and finished [E].

    DAPO (arXiv 2503.14476, sections 3.2 and 3.4) has both filters, for groups that are
    all right or all wrong and for overlong completions.
    """
    kept = finished if objective.truncated == "mask" else jnp.ones_like(finished)
    if objective.skip_equal_groups:
        kept &= has_signal(rewards, group_size)
    return kept
