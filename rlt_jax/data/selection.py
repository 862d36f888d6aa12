"""Which traces a student is trained on: by their scores, or as its context allows."""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import numpy as np

from rlt_jax.data.examples import EMPTY, Example
from rlt_jax.errors import UserError
from rlt_jax.ranges import Checked, NonNegativeInt, Range

# What happens to sequences that are too long.
OVERLONG = ("error", "drop", "shorter", "truncate")


@dataclasses.dataclass(frozen=True)
class SelectionConfig(Checked):
    """Which traces to keep; applied in the order of the attributes.

    Traces whose explanation is not closed are the last to be kept, whatever their reward:
    `sft` drops them.

    Attributes:
      max_tokens: maximum tokens of a trace's student sequence; 0 for no limit.
      best_per_question: traces with the highest reward to keep for each question; 0 for all.
      top_fraction: fraction of the remaining traces to keep, those of the highest reward.
    """

    max_tokens: NonNegativeInt = 0
    best_per_question: NonNegativeInt = 0
    top_fraction: Annotated[float, Range(0, 1, above=True)] = 1.0


class Candidate(NamedTuple):
    """A scored trace.

    Attributes:
      question: whatever tells questions apart, such as the text with the answer.
      reward: its reward.
      tokens: number of tokens of its student sequence.
      closed: whether the explanation has its closing tag.
    """

    question: str
    reward: float
    tokens: int
    closed: bool = True


def select(config: SelectionConfig, candidates: Sequence[Candidate]) -> list[int]:
    """Indices of the chosen candidates, in their own order; ties go to the earlier."""
    longest, most = config.max_tokens or math.inf, config.best_per_question or math.inf
    kept = [i for i, one in enumerate(candidates) if one.tokens <= longest]
    kept.sort(key=lambda i: (not candidates[i].closed, -candidates[i].reward))
    ranks: dict[str, Iterator[int]] = defaultdict(itertools.count)
    kept = [i for i in kept if next(ranks[candidates[i].question]) < most]
    count = max(1, round(config.top_fraction * len(kept)))
    return sorted(kept[:count])


def choose(
    questions: list[str], fits: list[bool], per_question: int, refill: bool, seed: int
) -> tuple[list[int], Counter[str]]:
    """Picks the traces of each question that a student is trained on.

    The seed shuffles the traces of a question. Those that fit are taken in that order, at
    most `per_question` of them.

    Args:
      questions: question of each trace.
      fits: whether the sequence of each trace fits.
      per_question: maximum traces of each question; 0 for all.
      refill: traces that fit replace those that do not, repeatedly if needed, so that a
        question keeps its number of sequences as long as any of its traces fits.
      seed: seed of the shuffle.

    Returns:
      Indices in ascending order; and numbers of traces: `dropped` do not fit and are not
      replaced; `replaced` do not fit and another trace takes their place; `surplus` are
      more than `per_question`.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i in np.random.default_rng(seed).permutation(len(questions)).tolist():
        groups[questions[i]].append(i)
    chosen, counts = [], Counter()
    for group in groups.values():
        places = group[: per_question or None]
        fitting = [i for i in group if fits[i]]
        if refill and fitting:
            chosen += itertools.islice(itertools.cycle(fitting), len(places))
            counts["replaced"] += sum(not fits[i] for i in places)
        else:
            chosen += fitting[: per_question or None]
            counts["dropped"] += len(group) - len(fitting)
    counts["surplus"] = len(questions) - len(chosen) - counts["dropped"]
    return sorted(chosen), counts


def fit_examples(
    made: Sequence[Example],
    questions: list[str],
    limit: int,
    overlong: str,
    per_question: int,
    seed: int,
    what: str,
) -> tuple[list[Example], dict[str, int]]:
    """Sequences of at most `limit` tokens, at most `per_question` of each question.

    Args:
      made: sequences of all traces.
      questions: question of each sequence.
      limit: longest allowed length.
      overlong: for longer sequences, one of `OVERLONG`. "error" raises, "drop" leaves
        them out, "shorter" uses others of the same question instead (see `choose`),
        "truncate" cuts them; a sequence that is cut before its first learned token is
        dropped. Spans of truncated sequences are empty.
      per_question: applied to the sequences that fit; 0 for all.
      seed: seed of the choice.
      what: names the sequences and the limit's setting in messages.

    Returns:
      The sequences, and numbers of traces: read = used + dropped + surplus; among those
      used, `truncated` and `replaced`.

    Raises:
      UserError: a sequence is too long, or none fits.
    """
    lengths = [len(one.tokens) for one in made]
    fits = [length <= limit for length in lengths]
    if overlong == "error" and not all(fits):
        n = fits.index(False)
        raise UserError(
            f"{what}: sequence {n} has {lengths[n]} tokens, the limit is {limit} "
            f"({fits.count(False)} of {len(fits)} sequences are longer). Raise the limit or "
            "drop the sequence."
        )
    if overlong == "truncate":
        fits = [bool(one.loss_mask[1:limit].any()) for one in made]
    chosen, counts = choose(questions, fits, per_question, overlong == "shorter", seed)
    if not chosen:
        raise UserError(
            f"{what}: none of {len(made)} traces is left, as overlong={overlong!r} "
            f"leaves out what does not fit into {limit} tokens. Raise the limit."
        )
    used = [made[i] for i in chosen]
    for i, one in enumerate(used):
        if len(one.tokens) > limit:
            used[i] = Example(one.tokens[:limit], one.loss_mask[:limit], EMPTY, EMPTY)
            counts["truncated"] += 1
    counts |= {"read": len(made), "used": len(used)}
    names = ("read", "used", "truncated", "dropped", "replaced", "surplus")
    return used, {name: counts[name] for name in names}
