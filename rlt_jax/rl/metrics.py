"""Metrics of rewards, rollouts and updates."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlt_jax.rl.baselines import ADVANTAGES, has_signal
from rlt_jax.types import Array, Metrics, Reward, Rollout

# How a metric is reduced over several updates, by the end of its name; the mean by default.
REDUCERS = {"_max": jnp.max, "_in_a_row": jnp.max, "/skipped": jnp.sum}


@functools.partial(jax.jit, static_argnums=(1, 2))
def reward_metrics(reward: Reward, advantage: str, group_size: int) -> Metrics:
    """Statistics of the reward and its terms, and of its groups.

    Args:
      reward: [E] each.
      advantage: name of the advantage function, one of `ADVANTAGES`.
      group_size: R.

    Returns:
      Mean, std, min and max of the value and of every term; fraction of groups whose
      rewards differ, and spread of the advantages.
    """
    metrics = {
        f"reward/{name}_{statistic}": getattr(term, statistic)()
        for name, term in reward.items()
        for statistic in ("mean", "std", "min", "max")
    }
    value = reward["value"]
    metrics["group/signal_fraction"] = has_signal(value, group_size).mean()
    metrics["group/advantage_std"] = ADVANTAGES[advantage](value, group_size).std()
    return metrics


def over_updates(updates: Sequence[Metrics]) -> Metrics:
    """The metrics of several updates on the same completions as one record."""
    if len(updates) == 1:
        return updates[0]

    def reduced(name: str) -> Array:
        values = jnp.stack([metrics[name] for metrics in updates])
        reducers = (reduce for end, reduce in REDUCERS.items() if name.endswith(end))
        return next(reducers, jnp.mean)(values)

    return {name: reduced(name) for name in updates[0]}


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Length and end of the completions, and the fraction of decode slots in use."""
    lengths = [len(tokens) for tokens in rollout.tokens]
    computed = rollout.steps_computed
    return {
        "rollout/length_mean": float(np.mean(lengths)),
        "rollout/length_p95": float(np.quantile(lengths, 0.95)),
        "rollout/length_max": max(lengths),
        "rollout/finished_fraction": float(np.mean(rollout.finished)),
        "rollout/occupancy": rollout.steps_used / computed if computed else 0.0,
    }
