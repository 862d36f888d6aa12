"""The reward of a reinforcement-learned teacher (arXiv 2506.08388, section 3.2)."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import jax.numpy as jnp
import numpy as np

from rlt_jax import masked, ranges
from rlt_jax.errors import UserError
from rlt_jax.inference.spans import gather, mask, segment_mask, segment_sums
from rlt_jax.rl import kl
from rlt_jax.types import Array, Batch, Reward

REDUCTIONS: dict[str, Callable[..., Array]] = {
    "mean": masked.mean,
    "min": masked.minimum,
    "max": masked.maximum,
    "median": masked.median,
    "first_quartile": lambda x, m, empty: masked.quantile(x, m, 0.25, empty),
    "last_quartile": lambda x, m, empty: masked.quantile(x, m, 0.75, empty),
    "sum": lambda x, m, empty: masked.total(x, m),
}

MAPS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "exp": jnp.exp,
    "exp_norm": lambda x: 1 - jnp.exp(-x),
}

OVER_VOCABULARY = ("full", "top_k")
KL_ESTIMATORS = (*kl.ESTIMATORS, *OVER_VOCABULARY)
NOT_ALL_0 = ranges.Condition("not all 0", lambda x: not x or sum(x) > 0)
Auto = Annotated[str, ranges.OneOf(("auto",))]
Map = Annotated[str, ranges.OneOf(MAPS)]
Reductions = Mapping[Annotated[str, ranges.OneOf(REDUCTIONS)], ranges.Weight]


@dataclasses.dataclass(frozen=True)
class RLTRewardConfig(ranges.Checked):
    """Weights and reductions of the terms; the defaults are the published ones.

    Attributes:
      student_temperature: tau_S, divides the student's logits.
      solution_coef: weight of the solution score.
      solution_reductions: reduction -> weight within the solution score.
      solution_map: applied to each solution log-prob, one of `MAPS`.
      solution_clip: mapped log-probs are kept above minus this; None for no clip.
      explanation_kl_coef: weight of the explanation KL, which is subtracted; "auto" picks
        it once, at the start of a run, so that both terms have the same mean size.
      kl_reductions: reduction -> weight within the explanation KL.
      kl_map: applied to each per-token KL.
      kl_clip: mapped KLs are kept below this; None for no clip.
      kl_estimator: "k1" (published), "k2" or "k3", from the sampled token; "full", over
        the whole vocabulary; "top_k", over the teacher's likeliest tokens and the rest as
        one (the last two need one tokenizer).
      kl_top_k: number of tokens that "top_k" keeps apart.
      kl_teacher_term: without it, the divergence is the student's surprise alone,
        -log p_S, and the estimator is not used.
      format_penalty: added when the closing tag is missing.
      empty_penalty: an empty span counts as minus this in every reduction of its
        log-probs, and as this in every reduction of its KL; its sum is 0.
    """

    student_temperature: Annotated[float, ranges.Range(1e-3, 1e3)] = 0.7
    solution_coef: ranges.NonNegativeFloat = 1.0
    solution_reductions: Reductions = dataclasses.field(
        default_factory=lambda: {"mean": 1.0, "min": 0.01}
    )
    solution_map: Map = "none"
    solution_clip: ranges.Weight | None = None
    explanation_kl_coef: ranges.NonNegativeFloat | Auto = 3.0
    kl_reductions: Reductions = dataclasses.field(
        default_factory=lambda: {"mean": 1.0, "max": 0.01}
    )
    kl_map: Map = "none"
    kl_clip: ranges.Weight | None = None
    kl_estimator: Annotated[str, ranges.OneOf(KL_ESTIMATORS)] = "k1"
    kl_top_k: ranges.PositiveInt = 16
    kl_teacher_term: bool = True
    format_penalty: Annotated[float, ranges.Range(-(10**6), 0)] = -1.0
    empty_penalty: ranges.NonNegativeFloat = 1.0


@dataclasses.dataclass(frozen=True)
class EnsembleConfig(ranges.Checked):
    """How the rewards of several students become one.

    Attributes:
      combine: "mean", "min" or "weights".
      weights: one per student, for "weights"; they are divided by their sum.
    """

    combine: Annotated[str, ranges.OneOf(("mean", "min", "weights"))] = "mean"
    weights: Annotated[Sequence[ranges.NonNegativeFloat], NOT_ALL_0] = ()

    def check(self, num_students: int) -> None:
        """Raises UserError unless there is a weight for each student."""
        if self.combine == "weights" and len(self.weights) != num_students:
            numbers = f"{len(self.weights)} numbers for {num_students} students"
            raise UserError(f"ensemble.weights has {numbers}.")


def solution_log_probs(student: Batch) -> tuple[Array, Array]:
    """Log-probs [E, S] float32 of the solution's tokens, and their mask [E, S]."""
    return gather(student.log_probs, student.solution), mask(student.solution)


def explanation_log_probs(batch: Batch, student: Batch) -> tuple[Array, Array, Array]:
    """Log-probs of each segment of the explanation.

    Returns:
      Under the policy in its own sequence [E, S] float32, under the student in the
      student's sequence, and the mask [E, S] of the segments.
    """
    in_policy, in_student = student.policy_explanation, student.explanation
    of_policy = segment_sums(gather(batch.log_probs, in_policy), in_policy)
    of_student = segment_sums(gather(student.log_probs, in_student), in_student)
    return of_policy, of_student, segment_mask(in_student)


def explanation_divergence(
    config: RLTRewardConfig, batch: Batch, student: Batch
) -> tuple[Array, Array]:
    """KL of each segment of the explanation before map and clip, [E, S], and the mask.

    The policy's log-probs are at the sampling temperature, the student's at
    `student_temperature`.
    """
    in_policy, in_student, segments = explanation_log_probs(batch, student)
    if not config.kl_teacher_term:
        return -in_student, segments
    if config.kl_estimator in OVER_VOCABULARY:
        return student.vocabulary_kl, segments
    return kl.ESTIMATORS[config.kl_estimator](in_policy - in_student), segments


def rlt_reward(
    config: RLTRewardConfig,
    solution: tuple[Array, Array],
    divergence: tuple[Array, Array],
    closed: Array,
    kl_coef: float | Array | None = None,
) -> Reward:
    """r = solution_coef * r_SS - explanation_kl_coef * r_KL + format penalty.

    r_SS reduces the student's log-probs of the solution tokens; r_KL reduces, per segment
    of the explanation, log p_T - log p_S, teacher in the teacher's sequence and student in
    the student's (section 3.2; the reductions mean with 0.01 min or max are published).

    Args:
      config: weights.
      solution: log-probs [E, S] of the solution's tokens, and their mask.
      divergence: KL [E, S] of the explanation's segments, and their mask.
      closed: [E] bool, whether the closing tag is there.
      kl_coef: replaces `explanation_kl_coef`, for one that was balanced to the data.

    Returns:
      "value" [E] and the terms: solution_score, explanation_kl, format_penalty,
      `solution_<reduction>` and `kl_<reduction>` for each reduction in use, and the
      indicators empty_explanation, empty_solution.
    """
    scores, in_solution = solution
    kls, in_explanation = divergence
    lowest = None if config.solution_clip is None else -config.solution_clip
    scores = jnp.clip(MAPS[config.solution_map](scores), min=lowest)
    kls = jnp.clip(MAPS[config.kl_map](kls), max=config.kl_clip)
    penalty = config.empty_penalty
    parts: dict[str, Array] = {}
    solution_score = explanation_kl = jnp.zeros(closed.shape)
    for name, weight in config.solution_reductions.items():
        score = REDUCTIONS[name](scores, in_solution, empty=-penalty)
        parts[f"solution_{name}"] = score
        solution_score += weight * score
    for name, weight in config.kl_reductions.items():
        score = REDUCTIONS[name](kls, in_explanation, empty=penalty)
        parts[f"kl_{name}"] = score
        explanation_kl += weight * score
    format_penalty = jnp.where(closed, 0.0, config.format_penalty)
    coef = config.explanation_kl_coef if kl_coef is None else kl_coef
    value = config.solution_coef * solution_score - coef * explanation_kl
    reward = {
        "value": value + format_penalty,
        "solution_score": solution_score,
        "explanation_kl": explanation_kl,
        "format_penalty": format_penalty,
        "empty_explanation": ~in_explanation.any(-1),
        "empty_solution": ~in_solution.any(-1),
        **parts,
    }
    return {name: term.astype(jnp.float32) for name, term in reward.items()}


def ensemble_reward(
    config: RLTRewardConfig,
    ensemble: EnsembleConfig,
    batch: Batch,
    kl_coef: Array | None = None,
) -> Reward:
    """The RLT reward of a batch whose log-probs are filled in, over all its students."""
    rewards = []
    for student in batch.students:
        solution = solution_log_probs(student)
        divergence = explanation_divergence(config, batch, student)
        rewards.append(rlt_reward(config, solution, divergence, batch.closed, kl_coef))
    return combine(ensemble, rewards)


def combine(config: EnsembleConfig, rewards: Sequence[Reward]) -> Reward:
    """One reward from the rewards of several students.

    The reward of a single student is passed on. With more, every term is combined as the
    value is, and the value of student i is kept as the term `student_<i>`.
    """
    if len(rewards) == 1:
        return rewards[0]
    weights = config.weights if config.combine == "weights" else [1] * len(rewards)
    shares = jnp.array(weights, jnp.float32) / sum(weights)

    def one(values: Sequence[Array]) -> Array:
        if config.combine == "min":
            return jnp.stack(values).min(axis=0)
        return jnp.einsum("iE,i->E", jnp.stack(values), shares)

    combined = {name: one([r[name] for r in rewards]) for name in rewards[0]}
    return combined | {f"student_{i}": r["value"] for i, r in enumerate(rewards)}


def balanced_kl_coef(scores: Sequence[float], kls: Sequence[float]) -> float:
    """The KL weight that gives both terms the same mean absolute size.

    Args:
      scores: solution scores of the first completions of a run.
      kls: explanation KLs of the same completions.

    Raises:
      UserError: the explanation KL of all completions is 0, or a number is not finite.
    """
    score, divergence = (float(np.mean(np.abs(x))) for x in (scores, kls))
    coef = score / divergence if divergence else math.inf
    if not math.isfinite(coef):
        raise UserError(
            f"explanation_kl_coef=auto: the solution score has size {score:.3g}, the "
            f"explanation KL {divergence:.3g}; give a number instead."
        )
    return coef
