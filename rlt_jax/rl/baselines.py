"""Rewards minus a baseline: the advantages of completions.

The functions of `ADVANTAGES` take rewards [E] float32, whose groups are consecutive, and
the group size R of at least 2, and return advantages [E] float32. Equal rewards have
exactly the advantage 0.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rlt_jax.types import Array


def group_advantages(rewards: Array, group_size: int) -> Array:
    """(r - mean) / (std + 1e-4) within each group, std with n - 1.

    GRPO (arXiv 2402.03300, section 4.1.2).
    """
    centred = centred_advantages(rewards, group_size).reshape(-1, group_size)
    return (centred / (centred.std(axis=1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)


def centred_advantages(rewards: Array, group_size: int) -> Array:
    """r - mean within each group.

    Dr. GRPO (arXiv 2503.20783, section 3.2): without the division by the std, groups
    that are nearly all right or all wrong weigh no more than others.
    """
    groups = rewards.reshape(-1, group_size)
    # The mean of equal numbers is rounded, their differences are exact.
    groups = groups - groups[:, :1]
    return (groups - groups.mean(axis=1, keepdims=True)).reshape(-1)


def rloo_advantages(rewards: Array, group_size: int) -> Array:
    """r - mean of the other rewards in the group, which is R / (R - 1) * (r - mean).

    RLOO, "REINFORCE leave-one-out" (arXiv 2402.14740).
    """
    return centred_advantages(rewards, group_size) * (group_size / (group_size - 1))


ADVANTAGES: dict[str, Callable[[Array, int], Array]] = {
    "group": group_advantages,
    "centred": centred_advantages,
    "rloo": rloo_advantages,
}


def has_signal(rewards: Array, group_size: int) -> Array:
    """[E] bool: whether the rewards in the group of a completion differ at all."""
    groups = rewards.reshape(-1, group_size)
    return jnp.repeat(groups.max(axis=1) > groups.min(axis=1), group_size)
