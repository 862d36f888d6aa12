"""From rewards to advantages."""

import jax
import jax.numpy as jnp

from rlt_jax import masked


def group_advantages(rewards: jax.Array, group_size: int) -> jax.Array:
    """(r - mean) / (std + 1e-4) within each group, std with n - 1.

    GRPO (arXiv 2402.03300, section 4.1.2). A group of equal rewards has advantage 0.

    Args:
      rewards: [N] float32, groups are consecutive.
      group_size: R, at least 2.

    Returns:
      [N] float32.
    """
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    std = masked.std(groups, jnp.ones(groups.shape, bool))[:, None]
    return (centred / (std + 1e-4)).reshape(-1)
