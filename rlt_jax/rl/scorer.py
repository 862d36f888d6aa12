"""From rows to rewards in one device program: models, log-probs, KL, reductions."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlt_jax.errors import UserError, check_choice
from rlt_jax.inference.scoring import score_rows
from rlt_jax.inference.vocabulary_kl import vocabulary_kl
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl.rlt_reward import (
    OVER_VOCABULARY,
    RewardTokens,
    RLTRewardConfig,
    reward_tokens,
    rlt_reward,
)
from rlt_jax.types import Params, Reward, ScoringBatch


@dataclasses.dataclass(frozen=True)
class StudentsConfig:
    """How the rewards of several students become one.

    Attributes:
      combine: "mean", "min" or "weights".
      weights: one per student, for "weights"; they are divided by their sum.
    """

    combine: str = "mean"
    weights: Sequence[float] = ()

    def __post_init__(self) -> None:
        check_choice("students.combine", self.combine, ("mean", "min", "weights"))
        if self.weights and not sum(self.weights) > 0:
            raise UserError(f"students.weights={self.weights}: their sum must be > 0.")


class Scored(NamedTuple):
    """What scoring N completions gives.

    Attributes:
      reward: value and terms, combined over the students.
      teacher_log_probs: [M, B, T] of the teacher rows.
      tokens: per-token values, one entry a student; () where nobody asked.
    """

    reward: Reward
    teacher_log_probs: jax.Array
    tokens: tuple[RewardTokens, ...]


def score(
    config: RLTRewardConfig,
    students: StudentsConfig,
    teacher_model: Transformer,
    student_models: tuple[Transformer, ...],
    teacher_temperature: float,
    teacher_params: Params,
    student_params: tuple[Params, ...],
    batches: tuple[ScoringBatch, ...],
    kl_coef: jax.Array,
) -> Scored:
    """The RLT reward of N completions.

    Args:
      config: of the reward.
      students: how several students are combined.
      teacher_model: the policy's transformer.
      student_models: one transformer a student.
      teacher_temperature: the sampling temperature.
      teacher_params: parameters of the policy.
      student_params: parameters of each student.
      batches: rows and spans for each student; the teacher rows are the same in all.
      kl_coef: [] float32, weight of the explanation KL.

    Returns:
      Reward, teacher log-probs and per-token values.
    """
    rows = batches[0].teacher
    in_teacher = score_rows(
        teacher_model,
        teacher_temperature,
        teacher_params,
        rows,
        batches[0].completion,
        *[batch.teacher_explanation for batch in batches],
    )
    tokens = []
    for model, params, batch in zip(
        student_models, student_params, batches, strict=True
    ):
        in_student = score_rows(
            model,
            config.student_temperature,
            params,
            batch.student,
            batch.student_explanation,
            batch.student_solution,
        )
        divergence = None
        if config.kl_estimator in OVER_VOCABULARY:
            divergence = vocabulary_kl(
                teacher_model,
                teacher_params,
                rows,
                batch.teacher_explanation,
                teacher_temperature,
                model,
                params,
                batch.student,
                batch.student_explanation,
                config.student_temperature,
                config.kl_top_k if config.kl_estimator == "top_k" else None,
            )
        tokens.append(reward_tokens(config, in_student, in_teacher, batch, divergence))
    rewards = [
        rlt_reward(config, values, batch.closed, kl_coef)
        for values, batch in zip(tokens, batches, strict=True)
    ]
    return Scored(combine(students, rewards), in_teacher, tuple(tokens))


def combine(config: StudentsConfig, rewards: Sequence[Reward]) -> Reward:
    """One reward from those of several students.

    With one student its reward is passed on. With more, every term is combined as the
    value is, and the value of student i is kept as the term `student_<i>`.
    """
    if len(rewards) == 1:
        return rewards[0]
    if config.combine == "weights":
        weights = jnp.array(config.weights, jnp.float32) / sum(config.weights)
    else:
        weights = jnp.full(len(rewards), 1 / len(rewards))

    def one(values: Sequence[jax.Array]) -> jax.Array:
        if config.combine == "min":
            return jnp.stack(values).min(axis=0)
        return jnp.einsum("iN,i->N", jnp.stack(values), weights)

    terms = {name: one([r.terms[name] for r in rewards]) for name in rewards[0].terms}
    each = {f"student_{i}": r.value for i, r in enumerate(rewards)}
    return Reward(one([r.value for r in rewards]), terms | each)


def balanced_kl_coef(
    solution_score: Sequence[float], explanation_kl: Sequence[float]
) -> float:
    """The KL weight that gives both terms the same mean absolute size.

    Args:
      solution_score: of the first completions of a run, times its weight.
      explanation_kl: of the same.

    Raises:
      UserError: the explanation KL of all of them is 0, or a number is not finite.
    """
    score = float(np.mean(np.abs(solution_score)))
    divergence = float(np.mean(np.abs(explanation_kl)))
    coef = score / divergence if divergence else math.inf
    if not math.isfinite(coef):
        raise UserError(
            f"explanation_kl_coef=auto: the solution score has size {score:.3g}, the "
            f"explanation KL {divergence:.3g}; give a number instead."
        )
    return coef
