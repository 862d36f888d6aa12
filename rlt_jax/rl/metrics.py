"""Metrics of rewards and rollouts, computed on the device."""

import jax

from rlt_jax.types import Reward, Rollout


def reward_metrics(reward: Reward) -> dict[str, jax.Array]:
    """Mean and spread of the reward, mean of every term, as device scalars."""
    value = reward.value
    metrics = {
        "reward/value_mean": value.mean(),
        "reward/value_std": value.std(),
        "reward/value_min": value.min(),
        "reward/value_max": value.max(),
    }
    terms = {f"reward/{name}_mean": term.mean() for name, term in reward.terms.items()}
    return metrics | terms


def rollout_metrics(rollout: Rollout) -> dict[str, jax.Array]:
    """Length and end of the completions, as device scalars."""
    lengths = rollout.completion_mask.sum(-1)
    return {
        "rollout/length_mean": lengths.mean(),
        "rollout/length_max": lengths.max(),
        "rollout/finished_fraction": rollout.finished.mean(),
    }
