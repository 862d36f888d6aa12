"""Which of the scored traces a student is trained on."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from rlt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """What to keep; applied in the order of the attributes.

    Attributes:
      max_tokens: only traces whose student row has at most so many tokens, 0 for all.
      best_per_question: so many of the highest reward for each question, 0 for all.
      top_fraction: this share of the rest, of the highest reward.
    """

    max_tokens: int = 0
    best_per_question: int = 0
    top_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.top_fraction <= 1:
            raise UserError(f"select.top_fraction={self.top_fraction}: 0 < x <= 1.")


class Candidate(NamedTuple):
    """What selection looks at."""

    question: str
    reward: float
    tokens: int


def select(config: SelectionConfig, candidates: Sequence[Candidate]) -> list[int]:
    """Indices of the chosen candidates, in their own order; ties go to the earlier."""
    kept = list(range(len(candidates)))
    if config.max_tokens:
        kept = [i for i in kept if candidates[i].tokens <= config.max_tokens]
    kept.sort(key=lambda i: -candidates[i].reward)
    if config.best_per_question:
        taken: dict[str, int] = defaultdict(int)
        best = []
        for i in kept:
            question = candidates[i].question
            taken[question] += 1
            if taken[question] <= config.best_per_question:
                best.append(i)
        kept = best
    count = max(1, round(config.top_fraction * len(kept))) if kept else 0
    return sorted(kept[:count])
