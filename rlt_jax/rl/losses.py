"""Objectives of the policy: the loss of a token, and its weight in the batch.

The loss of a batch is the sum of weight times loss over its tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from rlt_jax.inference import divergence, head
from rlt_jax.models.transformer import Transformer
from rlt_jax.ranges import Checked, NonNegativeFloat, OneOf, PositiveFloat
from rlt_jax.rl import baselines, kl
from rlt_jax.training.learner import LossFn
from rlt_jax.types import Array, Batch, Metrics, Params


def token_ratio(log_ratio: Array, batch: Batch) -> Array:
    """p / p_old of each token (PPO, arXiv 1707.06347, section 3)."""
    return jnp.exp(log_ratio)


def sequence_ratio(log_ratio: Array, batch: Batch) -> Array:
    """exp(mean of log(p / p_old) over the completion), on all tokens of its sequence.

    GSPO (arXiv 2507.18071, equation 7). A completion is whole within its row.
    """

    def row(values: Array, segment_ids: Array) -> Array:
        return jax.ops.segment_sum(values, segment_ids, len(values) + 1)[segment_ids]

    rows = jnp.vectorize(row, signature="(t),(t)->(t)")
    return jnp.exp(rows(log_ratio * batch.inverse_length, batch.segment_ids))


def per_completion(lengths: Array, kept: Array, max_new_tokens: int) -> Array:
    """1 / (|o_i| E): mean over tokens, then over completions (GRPO, equation 3)."""
    return 1 / (jnp.maximum(lengths, 1).astype(jnp.float32) * len(lengths))


def per_batch(lengths: Array, kept: Array, max_new_tokens: int) -> Array:
    """1 / sum_i |o_i|: mean over all tokens with a gradient (DAPO, 2503.14476, 3.3)."""
    total = jnp.where(kept, lengths, 0).sum()
    return jnp.full(lengths.shape, 1 / jnp.maximum(total, 1).astype(jnp.float32))


def per_constant(lengths: Array, kept: Array, max_new_tokens: int) -> Array:
    """1 / (max_new_tokens E): free of length bias (Dr. GRPO, arXiv 2503.20783, 3.2)."""
    return jnp.full(lengths.shape, 1 / (max_new_tokens * len(lengths)), jnp.float32)


class Loss(NamedTuple):
    """A loss of the policy.

    Attributes:
      ratio: (log ratio, batch) -> importance ratio of each token.
      weight: (lengths [E], completion mask [E], max_new_tokens) -> weight [E] of each
        token of a completion in the loss of the batch.
    """

    ratio: Callable[[Array, Batch], Array]
    weight: Callable[[Array, Array, int], Array]


LOSSES = {
    "grpo": Loss(token_ratio, per_completion),
    "dr_grpo": Loss(token_ratio, per_constant),
    "dapo": Loss(token_ratio, per_batch),
    "gspo": Loss(sequence_ratio, per_completion),
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Checked):
    """The objective; the defaults are GRPO as it trains reinforcement-learned teachers.

    Attributes:
      loss: one of `LOSSES`.
      advantage: one of `baselines.ADVANTAGES`; Dr. GRPO takes "centred".
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

    loss: Annotated[str, OneOf(LOSSES)] = "grpo"
    advantage: Annotated[str, OneOf(baselines.ADVANTAGES)] = "group"
    clip_low: PositiveFloat | None = None
    clip_high: PositiveFloat | None = None
    beta: NonNegativeFloat = 0.04
    kl_estimator: Annotated[str, OneOf(kl.ESTIMATORS)] = "k3"
    importance_cap: PositiveFloat | None = None
    truncated: Annotated[str, OneOf(("keep", "mask"))] = "keep"
    skip_equal_groups: bool = False
    skip_gradient_norm: PositiveFloat | None = None


class Divergence(NamedTuple):
    """A divergence from a teacher over the vocabulary, as a loss.

    Attributes:
      weight: in the loss of a token.
      config: the divergence.
      models: student and teacher.
    """

    weight: float
    config: divergence.DivergenceConfig
    models: divergence.Models


def policy_loss(
    objective: ObjectiveConfig,
    temperature: float,
    num_completions: int,
    teaching: Divergence | None = None,
) -> LossFn:
    """The loss of a micro-batch for the learner, with its metrics.

    Every token carries its weight in the batch's loss, so micro-batches simply add up and
    packing changes nothing.

    Args:
      objective: the loss that is minimised.
      temperature: divides the policy's logits, as it did in sampling.
      num_completions: E, of the whole batch.
      teaching: a further loss, from a teacher; None for none.
    """

    def loss(model: Transformer, params: Params, batch: Batch) -> tuple[Array, Metrics]:
        wanted, args = batch.inverse_length > 0, (model, params, batch)
        if teaching is None:
            log_probs, entropy = head.log_probs_and_entropy(*args, temperature, wanted)
        else:
            _, config, models = teaching
            found = divergence.log_probs_and_divergence(config, models, *args, wanted)
            log_probs, entropy, distance = found
        if batch.log_probs is None:
            # The only update of a rollout: the policy is the one that sampled.
            batch = batch._replace(log_probs=jax.lax.stop_gradient(log_probs))
        total = (token_loss(objective, log_probs, batch) * batch.loss_weights).sum()
        metrics = policy_metrics(objective, log_probs, batch, num_completions)
        if teaching is not None:
            distance *= batch.taught
            total += teaching.weight * (distance * batch.loss_weights).sum()
            mean = (distance * batch.inverse_length).sum() / num_completions
            metrics["policy/divergence"] = mean
        entropy = (entropy * batch.inverse_length).sum() / num_completions
        return total, {"policy/loss": total, "policy/entropy": entropy, **metrics}

    return loss


def importance_ratio(
    objective: ObjectiveConfig, log_probs: Array, batch: Batch
) -> tuple[Array, Array]:
    """p / p_old as the objective defines it, and the same within its clips."""
    ratio = LOSSES[objective.loss].ratio(log_probs - batch.log_probs, batch)
    low, high = objective.clip_low, objective.clip_high
    low = None if low is None else 1 - low
    return ratio, jnp.clip(ratio, low, None if high is None else 1 + high)


def importance_weights(cap: float, batch: Batch) -> Array:
    """min(p_old / p_sampler, cap) of each token, for a sampler with other numerics.

    Truncated importance sampling (Ionides, 2008; rho in arXiv 1802.01561, section 4.1).
    """
    return jnp.minimum(jnp.exp(batch.log_probs - batch.sampler_log_probs), cap)


def token_loss(objective: ObjectiveConfig, log_probs: Array, batch: Batch) -> Array:
    """-(w * min(ratio * A, clip(ratio) * A) - beta * KL(policy, reference)).

    GRPO (arXiv 2402.03300, equation 3), in which w is 1. On the policy that sampled the
    ratio is 1, and its gradient that of REINFORCE with a baseline.

    Args:
      objective: names ratio, clips, w and KL.
      log_probs: [..., B, T] float32 of the policy that is updated.
      batch: advantages and the other log-probs, in the same shape.
    """
    ratio, bounded = importance_ratio(objective, log_probs, batch)
    gain = jnp.minimum(ratio * batch.advantages, bounded * batch.advantages)
    if objective.importance_cap is not None:
        gain *= importance_weights(objective.importance_cap, batch)
    if objective.beta:
        estimate = kl.ESTIMATORS[objective.kl_estimator]
        gain -= objective.beta * estimate(log_probs - batch.ref_log_probs)
    return -gain


def policy_metrics(
    objective: ObjectiveConfig, log_probs: Array, batch: Batch, num_completions: int
) -> Metrics:
    """How far the policy is from the others before the step, for a micro-batch.

    Means are over the tokens of each completion, then over the E completions of the whole
    batch, whatever the objective weights and leaves out; micro-batches add up.
    """

    def mean(values: Array) -> Array:
        return (values * batch.inverse_length).sum() / num_completions

    ratio, bounded = importance_ratio(objective, log_probs, batch)
    clipped = bounded * batch.advantages < ratio * batch.advantages
    metrics = {
        "policy/ratio_mean": mean(ratio),
        "policy/ratio_max": jnp.where(batch.inverse_length > 0, ratio, 0.0).max(),
        "policy/clip_fraction": mean(clipped.astype(jnp.float32)),
    }
    if batch.ref_log_probs is not None:
        metrics["policy/kl_to_reference"] = mean(log_probs - batch.ref_log_probs)
    if batch.sampler_log_probs is not None:
        difference = jnp.abs(batch.log_probs - batch.sampler_log_probs)
        metrics["policy/sampler_difference"] = mean(difference)
    if objective.importance_cap is not None:
        weights = importance_weights(objective.importance_cap, batch)
        metrics["policy/importance_weight_mean"] = mean(weights)
    return metrics
