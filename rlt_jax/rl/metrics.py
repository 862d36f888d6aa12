"""Metrics of rewards, rollouts and updates, computed on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlt_jax import masked
from rlt_jax.inference.engine import Occupancy
from rlt_jax.inference.scoring import gather
from rlt_jax.rl import losses
from rlt_jax.rl.advantages import has_signal
from rlt_jax.types import Completion, Reward, TokenSpans

# How a metric is put together over several updates, by the end of its name; the mean
# if none fits.
REDUCERS = {"_max": jnp.max, "_in_a_row": jnp.max, "/skipped": jnp.sum}


def reward_metrics(reward: Reward) -> dict[str, jax.Array]:
    """Mean, std, min and max of the reward ("value") and every term, device scalars."""
    return {
        f"reward/{name}_{statistic}": getattr(term, statistic)()
        for name, term in {"value": reward.value, **reward.terms}.items()
        for statistic in ("mean", "std", "min", "max")
    }


def over_updates(updates: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The metrics of several updates on the same completions as one row."""
    if len(updates) == 1:
        return updates[0]

    def reduced(name: str) -> jax.Array:
        reducers = (reduce for end, reduce in REDUCERS.items() if name.endswith(end))
        return next(reducers, jnp.mean)(jnp.stack([row[name] for row in updates]))

    return {name: reduced(name) for name in updates[0]}


def group_metrics(
    rewards: jax.Array, advantages: jax.Array, group_size: int
) -> dict[str, jax.Array]:
    """Share of groups whose rewards differ, and spread of the advantages [N]."""
    return {
        "group/signal_fraction": has_signal(rewards, group_size).mean(),
        "group/advantage_std": advantages.std(),
    }


def rollout_metrics(
    rollout: Sequence[Completion], occupancy: Occupancy
) -> dict[str, float]:
    """Length and end of the completions, and how full the decode slots were."""
    lengths = [len(completion.tokens) for completion in rollout]
    return {
        "rollout/length_mean": float(np.mean(lengths)),
        "rollout/length_max": max(lengths),
        "rollout/finished_fraction": float(np.mean([c.finished for c in rollout])),
        "rollout/occupancy": occupancy.used / occupancy.run if occupancy.run else 0.0,
    }


def policy_metrics(
    objective: losses.ObjectiveConfig,
    log_probs: jax.Array,
    entropy: jax.Array,
    tokens: losses.LossTokens,
    spans: TokenSpans,
) -> dict[str, jax.Array]:
    """How far the policy is from the others, before the step.

    Means are over the tokens of each completion, then over completions, whatever the
    objective weighs and leaves out. All but the spans [N, T] is [M, B, T] float32.
    """

    def mean(values: jax.Array) -> jax.Array:
        return masked.mean(gather(values, spans), spans.mask).mean()

    ratio, bounded = losses.importance_ratio(objective, log_probs, tokens)
    cut = bounded * tokens.advantages < ratio * tokens.advantages
    metrics = {
        "policy/entropy": mean(entropy),
        "policy/ratio_mean": mean(ratio),
        "policy/ratio_max": gather(ratio, spans).max(),
        "policy/clip_fraction": mean(cut.astype(jnp.float32)),
    }
    if tokens.ref_log_probs is not None:
        metrics["policy/kl_to_reference"] = mean(log_probs - tokens.ref_log_probs)
    if tokens.sampler_log_probs is not None:
        difference = jnp.abs(tokens.old_log_probs - tokens.sampler_log_probs)
        metrics["policy/sampler_difference"] = mean(difference)
    if objective.importance_cap is not None:
        weights = losses.importance_weights(objective.importance_cap, tokens)
        metrics["policy/importance_weight_mean"] = mean(weights)
    return metrics
