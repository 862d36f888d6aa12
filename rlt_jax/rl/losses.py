"""Objectives of the policy: the loss of a token, and what the token weighs.

The loss of a batch is the sum of weight times loss over its tokens.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlt_jax.errors import UserError, check_choice
from rlt_jax.inference.scoring import scatter
from rlt_jax.rl import kl
from rlt_jax.rl.advantages import ADVANTAGES, has_signal
from rlt_jax.types import TokenSpans


class LossTokens(NamedTuple):
    """What is known of every token, arrays [..., B, T].

    Attributes:
      advantages: float32, that of the token's completion.
      shares: float32, 1 / length of the completion on its tokens, 0 on all others.
      segment_ids: int32, one completion a segment.
      old_log_probs: float32, of the policy at the time of the rollout; None where it is
        the policy itself.
      ref_log_probs: float32, of the reference; None without one.
      sampler_log_probs: float32, as the sampler gave them; None if unknown.
    """

    advantages: jax.Array
    shares: jax.Array
    segment_ids: jax.Array
    old_log_probs: jax.Array | None
    ref_log_probs: jax.Array | None
    sampler_log_probs: jax.Array | None


def token_ratio(log_ratio: jax.Array, tokens: LossTokens) -> jax.Array:
    """p / p_old of each token (PPO, arXiv 1707.06347, section 3)."""
    return jnp.exp(log_ratio)


def sequence_ratio(log_ratio: jax.Array, tokens: LossTokens) -> jax.Array:
    """exp(mean of log(p / p_old) over the completion), on all tokens of its segment.

    GSPO (arXiv 2507.18071, equation 7). A completion is whole within its line.
    """

    def line(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
        sums = jax.ops.segment_sum(values, segment_ids, len(values) + 1)
        return sums[segment_ids]

    lines = jnp.vectorize(line, signature="(t),(t)->(t)")
    return jnp.exp(lines(log_ratio * tokens.shares, tokens.segment_ids))


def per_completion(lengths: jax.Array, counted: jax.Array, longest: int) -> jax.Array:
    """1 / (|o_i| N): mean over tokens, then over completions (GRPO, equation 3)."""
    return 1 / (jnp.maximum(lengths, 1).astype(jnp.float32) * len(lengths))


def per_batch(lengths: jax.Array, counted: jax.Array, longest: int) -> jax.Array:
    """1 / sum_i |o_i|: mean over all counted tokens (DAPO, arXiv 2503.14476, 3.3)."""
    total = jnp.where(counted, lengths, 0).sum()
    return jnp.full(lengths.shape, 1 / jnp.maximum(total, 1).astype(jnp.float32))


def per_constant(lengths: jax.Array, counted: jax.Array, longest: int) -> jax.Array:
    """1 / (longest N): free of length bias (Dr. GRPO, arXiv 2503.20783, section 3.2)."""
    return jnp.full(lengths.shape, 1 / (longest * len(lengths)), jnp.float32)


# Name of the loss -> importance ratio, and weight of a token.
LOSSES = {
    "grpo": (token_ratio, per_completion),
    "dr_grpo": (token_ratio, per_constant),
    "dapo": (token_ratio, per_batch),
    "gspo": (sequence_ratio, per_completion),
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The objective; the defaults are GRPO as it trains reinforcement-learned teachers.

    Attributes:
      loss: one of `LOSSES`.
      advantage: one of `ADVANTAGES`; Dr. GRPO takes "centred".
      clip_low: the ratio gains nothing below 1 - clip_low; None for no bound.
      clip_high: nor above 1 + clip_high; None for no bound. PPO has 0.2 for both, DAPO
        0.2 and 0.28, GSPO 3e-4 and 4e-4. With one update per rollout the ratio is 1.
      beta: weight of the KL to the reference; 0 for none.
      kl_estimator: of that KL, one of `kl.ESTIMATORS`.
      importance_cap: weighs tokens by p_old / p_sampler, at most this; None for 1.
      truncated: "keep" completions without a stop token, or "mask" them: they count
        in the baseline of their group, but have no gradient.
      skip_equal_groups: groups whose rewards are all the same weigh nothing; otherwise
        their KL to the reference still counts.
      skip_gradient_norm: a step with a longer gradient changes nothing; None for never.
    """

    loss: str = "grpo"
    advantage: str = "group"
    clip_low: float | None = None
    clip_high: float | None = None
    beta: float = 0.04
    kl_estimator: str = "k3"
    importance_cap: float | None = None
    truncated: str = "keep"
    skip_equal_groups: bool = False
    skip_gradient_norm: float | None = None

    def __post_init__(self) -> None:
        choices = {
            "loss": LOSSES,
            "advantage": ADVANTAGES,
            "kl_estimator": kl.ESTIMATORS,
            "truncated": ("keep", "mask"),
        }
        for name, known in choices.items():
            check_choice(f"objective.{name}", getattr(self, name), known)
        if not 0 <= self.beta < math.inf:
            raise UserError(f"objective.beta={self.beta}: at least 0, and finite.")
        for name in ("clip_low", "clip_high", "importance_cap", "skip_gradient_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"objective.{name}={value}: above 0, or None for off.")


def counted_completions(
    objective: ObjectiveConfig, rewards: jax.Array, finished: jax.Array, group_size: int
) -> jax.Array:
    """Which completions have a gradient: [N] bool of rewards [N] and finished [N] bool.

    DAPO (arXiv 2503.14476, sections 3.2 and 3.4) has both filters, for groups that are
    all right or all wrong and for overlong completions.
    """
    kept = finished if objective.truncated == "mask" else jnp.ones_like(finished)
    if objective.skip_equal_groups:
        kept &= has_signal(rewards, group_size)
    return kept


def token_weights(
    objective: ObjectiveConfig,
    spans: TokenSpans,
    counted: jax.Array,
    longest: int,
    shape: tuple[int, ...],
) -> jax.Array:
    """The weight of every token in the loss of the batch.

    Args:
      objective: names the normalisation.
      spans: tokens of N completions.
      counted: [N] bool, False for completions of weight 0.
      longest: tokens that a completion can have, the constant of Dr. GRPO.
      shape: [M, B, T] of the float32 result, which is 0 outside completions.
    """
    _, weight = LOSSES[objective.loss]
    weights = weight(spans.mask.sum(-1), counted, longest)
    return scatter(jnp.where(counted, weights, 0.0), spans, shape)


def importance_ratio(
    objective: ObjectiveConfig, log_probs: jax.Array, tokens: LossTokens
) -> tuple[jax.Array, jax.Array]:
    """p / p_old as the objective takes it, and the same within its clips."""
    ratio_of, _ = LOSSES[objective.loss]
    ratio = ratio_of(log_probs - tokens.old_log_probs, tokens)
    low, high = objective.clip_low, objective.clip_high
    low = None if low is None else 1 - low
    return ratio, jnp.clip(ratio, low, None if high is None else 1 + high)


def importance_weights(cap: float, tokens: LossTokens) -> jax.Array:
    """min(p_old / p_sampler, cap) of each token, for a sampler with other numbers.

    Truncated importance sampling (Ionides, 2008; rho in arXiv 1802.01561, section 4.1).
    """
    ratio = jnp.exp(tokens.old_log_probs - tokens.sampler_log_probs)
    return jnp.minimum(ratio, cap)


def token_loss(
    objective: ObjectiveConfig, log_probs: jax.Array, tokens: LossTokens
) -> jax.Array:
    """-(w * min(ratio * A, clip(ratio) * A) - beta * KL(policy, reference)).

    GRPO (arXiv 2402.03300, equation 3), in which w is 1. On the policy that sampled the
    ratio is 1, and its gradient that of REINFORCE with a baseline.

    Args:
      objective: names ratio, clips, w and KL.
      log_probs: [..., B, T] float32 of the policy that is updated.
      tokens: the rest, in the same shape as the result.
    """
    ratio, bounded = importance_ratio(objective, log_probs, tokens)
    gain = jnp.minimum(ratio * tokens.advantages, bounded * tokens.advantages)
    if objective.importance_cap is not None:
        gain *= importance_weights(objective.importance_cap, tokens)
    if not objective.beta:
        return -gain
    divergence = kl.ESTIMATORS[objective.kl_estimator]
    return -(gain - objective.beta * divergence(log_probs - tokens.ref_log_probs))
