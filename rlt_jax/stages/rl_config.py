"""Settings of the RL loop."""

import dataclasses
from typing import Annotated

from rlt_jax import ranges, stores
from rlt_jax.data.examples import ROLES

_FOLDER = ranges.Condition("a folder on this host", lambda x: not stores.is_url(x))


@dataclasses.dataclass(frozen=True)
class RLConfig(ranges.Checked):
    """Settings of the loop.

    Attributes:
      steps: number of rollouts.
      batch_size: P, prompts per step, over all devices.
      group_size: R, completions per prompt.
      role: "teacher", which sees the solution and explains it, or "student".
      updates_per_rollout: optimizer steps on the same completions.
      sync_every: steps between two updates of the reference; 0 keeps it fixed.
      sync_alpha: fraction of the policy in the updated reference.
      self_teaching: the reward's student is a copy of the policy.
      student_sync_every: steps between two updates of that copy; 0 keeps it fixed.
      student_sync_alpha: fraction of the policy in the updated copy.
      offload: keep reference, students and teacher in the host's memory between uses.
      sample_every: steps between completions written to samples.jsonl.
      evaluate_every: steps between evaluations on the held-out problems, besides the
        first and the last; the best checkpoint among them is kept in `best`.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: number of checkpoints to keep.
      max_skipped: consecutive updates that may be skipped before the run stops.
      profile_steps: the first step to profile, and the one after the last.
      rollouts: folder in which the completions of every step are kept; completions that
        are there already are used again, which replays a run.
    """

    steps: ranges.PositiveInt
    batch_size: ranges.Count
    group_size: Annotated[int, ranges.Range(2, 2**16)]
    role: Annotated[str, ranges.OneOf(ROLES)] = "teacher"
    updates_per_rollout: ranges.PositiveInt = 1
    sync_every: ranges.NonNegativeInt = 32
    sync_alpha: ranges.Fraction = 0.9
    self_teaching: bool = False
    student_sync_every: ranges.NonNegativeInt = 1
    student_sync_alpha: ranges.Fraction = 1.0
    offload: bool = False
    sample_every: ranges.PositiveInt = 10
    evaluate_every: ranges.NonNegativeInt = 0
    checkpoint_every: ranges.PositiveInt = 20
    keep_checkpoints: ranges.PositiveInt = 1
    max_skipped: ranges.NonNegativeInt = 5
    profile_steps: ranges.Steps = ()
    rollouts: Annotated[str, _FOLDER] = ""
