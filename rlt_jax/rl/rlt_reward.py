"""The reward of a reinforcement-learned teacher (arXiv 2506.08388, section 3.2)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlt_jax import masked
from rlt_jax.errors import check_choice
from rlt_jax.inference.scoring import gather, segment_mask, segment_sums
from rlt_jax.rl import kl
from rlt_jax.types import Reward, ScoringBatch

Reduction = Callable[..., jax.Array]

REDUCTIONS: dict[str, Reduction] = {
    "mean": masked.mean,
    "min": masked.minimum,
    "max": masked.maximum,
    "median": masked.median,
    "first_quartile": lambda x, m, empty: masked.quantile(x, m, 0.25, empty),
    "last_quartile": lambda x, m, empty: masked.quantile(x, m, 0.75, empty),
    "sum": lambda x, m, empty: masked.total(x, m),
}

MAPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda x: x,
    "exp": jnp.exp,
    "exp_norm": lambda x: 1 - jnp.exp(-x),
}

OVER_VOCABULARY = ("full", "top_k")


@dataclasses.dataclass(frozen=True)
class RLTRewardConfig:
    """Weights and shapes of the terms; the defaults are the published ones.

    Attributes:
      student_temperature: tau_S, divides the student's logits.
      solution_coef: weight of the solution score.
      solution_reductions: reduction -> weight within the solution score.
      solution_map: applied to each solution log-prob, one of `MAPS`.
      solution_clip: mapped log-probs are kept above minus this; None for no clip.
      explanation_kl_coef: weight of the explanation KL, subtracted; "auto" balances
        its size to that of the solution score once, at the start of a run.
      kl_reductions: reduction -> weight within the explanation KL.
      kl_map: applied to each per-token KL.
      kl_clip: mapped KLs are kept below this; None for no clip.
      kl_estimator: "k1" (published), "k2" or "k3", from the sampled token; "full", over
        the whole vocabulary; "top_k", over the teacher's likeliest tokens and the rest as
        one (the last two need one tokenizer).
      kl_top_k: how many tokens "top_k" tells apart.
      kl_teacher_term: without it, the divergence is the student's surprise alone,
        -log p_S, and the estimator is not used.
      format_penalty: added when the closing tag is missing.
      empty_penalty: an empty span counts as minus this in every reduction of its
        log-probs, and as this in every reduction of its KL; its sum is 0.
    """

    student_temperature: float = 0.7
    solution_coef: float = 1.0
    solution_reductions: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"mean": 1.0, "min": 0.01}
    )
    solution_map: str = "none"
    solution_clip: float | None = None
    explanation_kl_coef: float | str = 3.0
    kl_reductions: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"mean": 1.0, "max": 0.01}
    )
    kl_map: str = "none"
    kl_clip: float | None = None
    kl_estimator: str = "k1"
    kl_top_k: int = 16
    kl_teacher_term: bool = True
    format_penalty: float = -1.0
    empty_penalty: float = 1.0

    def __post_init__(self) -> None:
        choices = {
            "solution_map": MAPS,
            "kl_map": MAPS,
            "kl_estimator": (*kl.ESTIMATORS, *OVER_VOCABULARY),
        }
        if isinstance(self.explanation_kl_coef, str):
            choices["explanation_kl_coef"] = ("auto",)
        for name, known in choices.items():
            check_choice(f"reward.{name}", getattr(self, name), known)
        for name in (*self.solution_reductions, *self.kl_reductions):
            check_choice("reward: reduction", name, REDUCTIONS)


class RewardTokens(NamedTuple):
    """The per-token values that one student's reward reduces, N completions.

    Attributes:
      solution: [N, T] float32 student log-probs of the solution tokens.
      solution_mask: [N, T] bool.
      student_explanation: [N, T] float32 log-prob of each segment of the explanation.
      teacher_explanation: [N, T] float32 likewise.
      divergence: [N, T] float32 KL of each segment, before map and clip.
      explanation_mask: [N, T] bool.
    """

    solution: jax.Array
    solution_mask: jax.Array
    student_explanation: jax.Array
    teacher_explanation: jax.Array
    divergence: jax.Array
    explanation_mask: jax.Array


def reward_tokens(
    config: RLTRewardConfig,
    student_log_probs: jax.Array,
    teacher_log_probs: jax.Array,
    batch: ScoringBatch,
    vocabulary_kl: jax.Array | None = None,
) -> RewardTokens:
    """Gathers solution log-probs and explanation KL from per-token arrays.

    Args:
      config: names the estimator.
      student_log_probs: [M, B, T] of the student rows at `student_temperature`.
      teacher_log_probs: [M, B, T] of the teacher rows at the sampling temperature.
      batch: spans of N completions.
      vocabulary_kl: [N, T] KL over the vocabulary at each explanation token, for the
        estimators "full" and "top_k".
    """
    in_student = segment_sums(
        gather(student_log_probs, batch.student_explanation), batch.student_explanation
    )
    in_teacher = segment_sums(
        gather(teacher_log_probs, batch.teacher_explanation), batch.teacher_explanation
    )
    if not config.kl_teacher_term:
        divergence = -in_student
    elif vocabulary_kl is not None:
        divergence = segment_sums(vocabulary_kl, batch.student_explanation)
    else:
        divergence = kl.ESTIMATORS[config.kl_estimator](in_teacher - in_student)
    return RewardTokens(
        gather(student_log_probs, batch.student_solution),
        batch.student_solution.mask,
        in_student,
        in_teacher,
        divergence,
        segment_mask(batch.student_explanation),
    )


def rlt_reward(
    config: RLTRewardConfig,
    tokens: RewardTokens,
    closed: jax.Array,
    kl_coef: float | jax.Array | None = None,
) -> Reward:
    """r = solution_coef * r_SS - explanation_kl_coef * r_KL + format penalty.

    r_SS reduces the student's log-probs of the solution tokens; r_KL reduces, per segment
    of the explanation, log p_T - log p_S, teacher in the teacher row and student in the
    student row (section 3.2; the reductions of mean with 0.01 min or max are published).

    Args:
      config: weights.
      tokens: per-token values of N completions.
      closed: [N] bool, whether the closing tag is there.
      kl_coef: replaces `explanation_kl_coef`, as one balanced to the data must.

    Returns:
      Values [N], and terms: solution_score, explanation_kl, format_penalty,
      `solution_<reduction>` and `kl_<reduction>` for each in use, and the indicators
      empty_explanation, empty_solution.
    """
    solution = MAPS[config.solution_map](tokens.solution)
    if config.solution_clip is not None:
        solution = jnp.maximum(solution, -config.solution_clip)
    divergence = MAPS[config.kl_map](tokens.divergence)
    if config.kl_clip is not None:
        divergence = jnp.minimum(divergence, config.kl_clip)
    penalty = config.empty_penalty
    parts: dict[str, jax.Array] = {}
    solution_score = explanation_kl = jnp.zeros(closed.shape)
    for name, weight in config.solution_reductions.items():
        score = REDUCTIONS[name](solution, tokens.solution_mask, empty=-penalty)
        parts[f"solution_{name}"] = score
        solution_score += weight * score
    for name, weight in config.kl_reductions.items():
        score = REDUCTIONS[name](divergence, tokens.explanation_mask, empty=penalty)
        parts[f"kl_{name}"] = score
        explanation_kl += weight * score
    format_penalty = jnp.where(closed, 0.0, config.format_penalty)
    coef = config.explanation_kl_coef if kl_coef is None else kl_coef
    value = config.solution_coef * solution_score - coef * explanation_kl
    terms = {
        "solution_score": solution_score,
        "explanation_kl": explanation_kl,
        "format_penalty": format_penalty,
        "empty_explanation": ~tokens.explanation_mask.any(-1),
        "empty_solution": ~tokens.solution_mask.any(-1),
        **parts,
    }
    terms = {name: term.astype(jnp.float32) for name, term in terms.items()}
    return Reward(value + format_penalty, terms)
