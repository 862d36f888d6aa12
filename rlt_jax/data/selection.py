"""Which traces a student is trained on: by their scores, or as its context allows."""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlt_jax.data.examples import EMPTY, Row, check_lengths
from rlt_jax.errors import UserError

# What becomes of rows that are too long.
OVERLONG = ("error", "drop", "shorter", "truncate")


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


def choose(
    questions: Sequence[str],
    fits: Sequence[bool],
    per_question: int,
    refill: bool,
    seed: int,
) -> tuple[list[int], Counter[str]]:
    """Picks those of each question's traces that a student is trained on.

    The seed puts the traces of a question into an order. Those that fit are taken in
    that order, `per_question` of them at most.

    Args:
      questions: of each trace.
      fits: whether its row does.
      per_question: how many traces of each question, 0 for all.
      refill: traces that fit stand in for those that do not, several times if need be,
        so that a question keeps its number of rows as long as any of its traces fits.
      seed: of the order.

    Returns:
      Indices, in their own order; and numbers of traces: `dropped` do not fit, and
      nothing stands in for them; `replaced` do not fit, and another one is used again or
      in their place; `surplus` are more than `per_question`.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i in np.random.default_rng(seed).permutation(len(questions)).tolist():
        groups[questions[i]].append(i)
    chosen, counts = [], Counter()
    for group in groups.values():
        places = group[: per_question or None]
        fitting = [i for i in group if fits[i]]
        if refill and fitting:
            taken = list(itertools.islice(itertools.cycle(fitting), len(places)))
            counts["replaced"] += sum(not fits[i] for i in places)
            counts["surplus"] += len(group) - len(places)
        else:
            taken = fitting[: per_question or None]
            counts["dropped"] += len(group) - len(fitting)
            counts["surplus"] += len(fitting) - len(taken)
        chosen += taken
    return sorted(chosen), counts


def fit_rows(
    rows: Sequence[Row],
    questions: Sequence[str],
    limit: int,
    overlong: str,
    per_question: int,
    seed: int,
    what: str,
) -> tuple[list[Row], dict[str, int]]:
    """Rows of at most `limit` tokens, at most `per_question` (0: all) of each question.

    Args:
      rows: of all traces.
      questions: of each.
      limit: longest allowed length.
      overlong: for longer rows, one of `OVERLONG`. "error" refuses them, "drop" leaves
        them out, "shorter" uses others of the same question in their place (see
        `choose`), "truncate" cuts them; a row that is cut before anything in it is
        learned is dropped. Spans of cut rows are empty.
      per_question: applied to the rows that fit.
      seed: of the choice.
      what: names the rows and the limit's setting in messages.

    Returns:
      The rows, and numbers of traces: read = used + dropped + surplus, and of those used
      that are `truncated`, or in the place of others (`replaced`).

    Raises:
      UserError: rows that are too long, or none that is not.
    """
    if overlong == "error":
        check_lengths([row.tokens for row in rows], limit, what)
    if overlong == "truncate":
        fits = [bool(row.loss_mask[1:limit].any()) for row in rows]
    else:
        fits = [len(row.tokens) <= limit for row in rows]
    refill = overlong == "shorter"
    chosen, counts = choose(questions, fits, per_question, refill, seed)
    if not chosen:
        raise UserError(
            f"{what}: none of {len(rows)} traces is left, as overlong={overlong!r} "
            f"leaves out what does not fit into {limit} tokens. Raise the limit."
        )

    def cut(row: Row) -> Row:
        return Row(row.tokens[:limit], row.loss_mask[:limit], EMPTY, EMPTY)

    long = [len(rows[i].tokens) > limit for i in chosen]
    used = [
        cut(rows[i]) if is_long else rows[i]
        for i, is_long in zip(chosen, long, strict=True)
    ]
    numbers = {"read": len(rows), "used": len(used), "truncated": sum(long)}
    names = ("dropped", "replaced", "surplus")
    return used, numbers | {name: counts[name] for name in names}
