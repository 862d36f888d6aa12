"""Per-token teaching: a teacher who knows more judges every token of a student's attempt.

Two ways to learn from log p_T - log p_S, teacher and student before the same token of the
student's own attempt (on-policy distillation, arXiv 2306.13649; with a solution that only
the teacher sees, arXiv 2601.18734 and 2601.20802):

- "advantage": the log-ratio of the sampled token is its advantage. On average the gradient
  is that of the reverse KL of whole attempts, one step ahead;
- a divergence of the two distributions over the vocabulary, as a loss of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax.numpy as jnp

from rlt_jax import masked, ranges
from rlt_jax.data.privileged import PROMPTS, SEES
from rlt_jax.errors import UserError
from rlt_jax.inference import divergence, spans
from rlt_jax.settings import build
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.types import Array, Batch, Reward

ADVANTAGE = "advantage"


@dataclasses.dataclass(frozen=True)
class TeachingConfig(divergence.DivergenceConfig):
    """How a student is taught on its own attempts; also the divergence, if that is how.

    Attributes:
      kind: "advantage", or a divergence, see `DivergenceConfig`.
      weight: of the teacher's judgement.
      reward_weight: of the reward's advantages beside it; 0 leaves the reward out.
      teacher: section of the teacher, like that of the policy; None is the policy itself.
      sync_every: where it is, steps between updates of the teacher's copy; 0 keeps it as
        the policy was at first.
      sync_alpha: fraction of the policy in the updated copy: 1 for the policy itself, less
        for its moving average.
      prompt: "privileged" or "teacher", see `privileged.py`.
      sees: "solution", "explanation", "attempt", "other" or "nothing", likewise.
      explanations: file of traces with the explanations, for "explanation".
      own_samples: fraction of the completions that the student samples; the others are
        those of `traces` (lambda of arXiv 2306.13649). Below 1 only for a divergence.
      traces: file of traces of the problems of `data`, for that.
      clip: bound of a token's advantage, or of what a vocabulary entry adds to a
        divergence, in nats; None for none.
      mask_above: tokens whose log-ratio is larger than this either way are not taught;
        None for all. Only for "advantage".
      baseline: of an advantage: "none"; or "group", the mean over the group's segments
        that are taught.
      mixture: see `DivergenceConfig`.
      top_k: likewise.
    """

    kind: Annotated[str, ranges.OneOf((ADVANTAGE, *divergence.KINDS))] = ADVANTAGE
    weight: ranges.PositiveFloat = 1.0
    reward_weight: ranges.NonNegativeFloat = 0.0
    teacher: Mapping[str, Any] | None = None
    sync_every: ranges.NonNegativeInt = 1
    sync_alpha: Annotated[float, ranges.Range(1e-6, 1)] = 1.0
    prompt: Annotated[str, ranges.OneOf(PROMPTS)] = "privileged"
    sees: Annotated[str, ranges.OneOf(SEES)] = "solution"
    explanations: str = ""
    own_samples: ranges.Fraction = 1.0
    traces: str = ""
    mask_above: ranges.PositiveFloat | None = None
    baseline: Annotated[str, ranges.OneOf(("none", "group"))] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is not None:
            build(ModelSource, self.teacher, "teaching.teacher")
        if self.prompt == "teacher" and self.sees in ("nothing", "attempt"):
            raise UserError(
                f"teaching.sees={self.sees!r} is for teaching.prompt='privileged': a teacher "
                "reads a solution between its tags."
            )
        if self.over_vocabulary and (self.mask_above or self.baseline != "none"):
            raise UserError(
                f"teaching.mask_above and teaching.baseline are for {ADVANTAGE!r}, not "
                f"for teaching.kind={self.kind!r}; set them to None and 'none'."
            )
        if (self.sees == "explanation") != bool(self.explanations):
            raise UserError(
                f"teaching.sees={self.sees!r} and teaching.explanations="
                f"{self.explanations!r}: an explanation needs a file of them, and only it."
            )
        by_reward = self.reward_weight or not self.over_vocabulary
        if (self.own_samples < 1) != bool(self.traces) or (self.traces and by_reward):
            raise UserError(
                f"teaching.own_samples={self.own_samples}, teaching.traces={self.traces!r}:"
                " a fraction below 1 needs traces, and traces need a fraction below 1, a "
                "divergence as teaching.kind, and teaching.reward_weight=0."
            )

    @property
    def over_vocabulary(self) -> bool:
        """Whether whole distributions are compared."""
        return self.kind != ADVANTAGE


def token_advantages(
    config: TeachingConfig, group_size: int, batch: Batch, teacher: Batch
) -> tuple[Array, Reward]:
    """Advantage of each token of the attempts, [M, B, T], 0 where none is taught.

    Where teacher and student tokenise a text differently, every token of a segment has the
    log-ratio of the whole segment: it is the segment that was more or less likely.

        student |3|+4|  teacher |3+|4|: one segment, both tokens get log p_T - log p_S of 3+4

    Args:
      config: clip, mask and baseline.
      group_size: R.
      batch: the student's attempts, with `log_probs` at the time of the rollout.
      teacher: the teacher's sequences with its `log_probs`; `policy_explanation` are the
        tokens of the attempts that it judges.

    Returns:
      The advantages, and for every attempt [E] the mean log-ratio of its segments and the
      fractions of them that are taught and clipped.
    """
    own, told = teacher.policy_explanation, teacher.explanation
    of_student = spans.segment_sums(spans.gather(batch.log_probs, own), own)
    of_teacher = spans.segment_sums(spans.gather(teacher.log_probs, told), told)
    judged = spans.segment_mask(own)
    ratio, taught = of_teacher - of_student, judged
    if config.mask_above is not None:
        taught &= jnp.abs(ratio) <= config.mask_above
    bound = config.clip
    bounded = ratio if bound is None else jnp.clip(ratio, -bound, bound)
    terms = {
        "teacher_log_ratio": masked.mean(ratio, judged),
        "taught_fraction": masked.mean(taught.astype(jnp.float32), judged),
        "clipped_fraction": masked.mean((bounded != ratio).astype(jnp.float32), taught),
    }
    if config.baseline == "group":
        size = group_size * own.segment.shape[1]
        mean = masked.mean(bounded.reshape(-1, size), taught.reshape(-1, size))
        bounded -= jnp.repeat(mean, group_size)[:, None]
    of_segment = jnp.where(taught, bounded, 0.0)
    of_token = jnp.take_along_axis(of_segment, jnp.maximum(own.segment, 0), axis=-1)
    return spans.scatter(of_token, own, batch.tokens.shape), terms


def mix_advantages(config: TeachingConfig, batch: Batch) -> Batch:
    """Advantages of the reward and of the teacher by their weights (2601.20802)."""
    advantages = config.reward_weight * batch.advantages
    if not config.over_vocabulary:
        advantages += config.weight * batch.taught
    return batch._replace(advantages=advantages)
