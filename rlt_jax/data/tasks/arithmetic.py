"""Synthetic task: chains of operations on a digit, modulo 10.

    question: "Start at 4: +3 *7 -2 +9 *3 -8. Last digit?"      solution: "0"

The same question in letter notation is "From 4: a3 m7 s2 a9 m3 s8. Last digit?"
With several chains side by side the solution has a digit of each:

    question: "Start at 7, 1, 4: *7 *3 -8, +2 -9 +4, *3 -3 +7. Last digits?"  solution: "986"

Every operation is a bijection of the digits (+ and - by 1..9, * by 3, 7 or 9), so the
answers are uniformly distributed and cannot be guessed without the steps. There are five
kinds of explanations:

    careful   "4+3=7 7*7=9 9-2=7 ..."      one step at a time
    skipping  "4+3*7-2=7 7+9*3-8=0"        three operations at once, hard to check
    restating "it is 0"                    no steps
    wrong     careful, with one wrong step
    mistaken  careful, with every * taken for +

The steps of several chains are separated by ", ": "7*7=9 9*3=7 7-8=9, 1+2=3 ...".

Train and test questions are disjoint: a question belongs to "test", in both notations, if
the checksum of its text in sign notation is 0 modulo 10.
"""

import dataclasses
import itertools
import operator
import zlib
from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

import numpy as np

from rlt_jax import ranges
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Trace

KINDS = ("careful", "skipping", "restating", "wrong", "mistaken")
CHAIN_LENGTH = 6
STEPS_PER_SKIP = 3
# Notation -> text before the start digit, and symbols for + - *.
NOTATIONS = {"signs": ("Start at", "+-*"), "letters": ("From", "asm")}
Kind = Annotated[str, ranges.OneOf(KINDS)]
Length = Annotated[int, ranges.Range(1, 1000)]
ORDERED = ranges.Condition("the least, then the most", lambda x: x[0] <= x[1])
_OPERANDS = {"+": range(1, 10), "-": range(1, 10), "*": (3, 7, 9)}
_CHOICES = tuple(_OPERANDS.items())
_FUNCTIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Chain(NamedTuple):
    """A start digit and the operations applied to it, left to right."""

    start: int
    operations: tuple[tuple[str, int], ...]

    def results(self) -> list[int]:
        """The digit after each operation."""
        return [*itertools.accumulate(self.operations, apply, initial=self.start)][1:]


class Exercise(NamedTuple):
    """Chains that are asked for in one question."""

    chains: tuple[Chain, ...]

    def question(self, notation: str = "signs") -> str:
        """The question as text, in one of `NOTATIONS`."""
        opening, symbols = NOTATIONS[notation]
        starts = ", ".join(str(chain.start) for chain in self.chains)
        chains = [" ".join(f"{s}{x}" for s, x in one.operations) for one in self.chains]
        steps = ", ".join(chains).translate(str.maketrans("+-*", symbols))
        asked = "Last digit?" if len(self.chains) == 1 else "Last digits?"
        return f"{opening} {starts}: {steps}. {asked}"

    @property
    def is_test(self) -> bool:
        """Whether the question belongs to the test split."""
        return zlib.crc32(self.question().encode()) % 10 == 0

    @property
    def answer(self) -> str:
        """The last digit of each chain."""
        return "".join(str(chain.results()[-1]) for chain in self.chains)


def apply(value: int, operation: tuple[str, int]) -> int:
    """Applies one operation to a digit, modulo 10."""
    sign, operand = operation
    return _FUNCTIONS[sign](value, operand) % 10


def sample_chain(rng: np.random.Generator, length: int = CHAIN_LENGTH) -> Chain:
    """A random chain of `length` operations."""
    # rng.choice would choose the same, and take several times as long.
    chosen = [_CHOICES[i] for i in rng.integers(len(_CHOICES), size=length)]
    operations = tuple((sign, xs[rng.integers(len(xs))]) for sign, xs in chosen)
    return Chain(int(rng.integers(10)), operations)


def explain(
    exercise: Exercise, kind: str, rng: np.random.Generator, known_answer: bool
) -> tuple[str, str]:
    """An explanation of the given kind, and the digits that it ends with.

    Args:
      exercise: what is explained.
      kind: one of `KINDS`.
      rng: generator that chooses the wrong step.
      known_answer: whether the last step after a wrong one has the true digit, as if the
        answer were known; otherwise the error propagates to the answer.
    """
    chains = exercise.chains
    if kind == "restating":
        return f"it is {exercise.answer}", exercise.answer
    wrong_chain = int(rng.integers(len(chains))) if len(chains) > 1 else 0
    parts = []
    for n, chain in enumerate(chains):
        # Only one of several chains has the wrong step.
        of_chain = "careful" if kind == "wrong" and n != wrong_chain else kind
        parts.append(_explain_chain(chain, of_chain, rng, known_answer))
    return ", ".join(text for text, _ in parts), "".join(str(end) for _, end in parts)


def _explain_chain(
    chain: Chain, kind: str, rng: np.random.Generator, known_answer: bool
) -> tuple[str, int]:
    length = len(chain.operations)
    size = STEPS_PER_SKIP if kind == "skipping" else 1
    wrong = None
    if kind in ("wrong", "mistaken"):
        wrong = int(rng.integers(max(length - known_answer, 1)))
    steps, value = [], chain.start
    for i in range(0, length, size):
        step = str(value)
        for sign, operand in chain.operations[i : i + size]:
            step += f"{sign}{operand}"
            taken_for = sign.replace("*", "+") if kind == "mistaken" else sign
            value = apply(value, (taken_for, operand))
        if kind == "wrong" and i == wrong:
            value = (value + int(rng.integers(1, 10))) % 10
        if known_answer and i + size >= length:
            value = chain.results()[-1]
        steps.append(f"{step}={value}")
    return " ".join(steps), value


def sample_kinds(
    rng: np.random.Generator, kinds: Mapping[str, float], n: int
) -> np.ndarray:
    """Samples n kinds of explanations with the probabilities `kinds`."""
    return rng.choice(list(kinds), n, p=list(kinds.values()))


@dataclasses.dataclass(frozen=True)
class ProblemConfig(ranges.Checked):
    """Settings of `problems`.

    Attributes:
      split: "train" or "test".
      size: number of problems.
      seed: random seed.
      stream: number that gives runs with the same seed different problems.
      notation: one of `NOTATIONS`.
      chains: how many chains run side by side, the number of digits of the answer.
      operations: least and most operations of a chain; those of one question have the
        same number, so that questions with more are harder.
    """

    split: ranges.Split
    size: ranges.Amount
    seed: ranges.NonNegativeInt
    stream: ranges.NonNegativeInt = 0
    notation: Annotated[str, ranges.OneOf(NOTATIONS)] = "signs"
    chains: Annotated[int, ranges.Range(1, 100)] = 1
    operations: Annotated[tuple[Length, Length], ORDERED] = (CHAIN_LENGTH, CHAIN_LENGTH)


def problems(config: ProblemConfig) -> list[Problem]:
    """Samples distinct problems.

    Raises:
      UserError: an unknown split or notation, or too few distinct problems exist.
    """
    return [_problem(x, x.answer, config.notation) for x in _exercises(config)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceConfig(ProblemConfig):
    """Settings of `traces`: those of `problems` and four more.

    Attributes:
      kinds: kind of explanation -> its probability.
      known_answer: see `explain`. If False, the solution of a trace with a wrong step is
        what its steps lead to.
      drills: number of additional careful traces of one chain of one or two operations.
      hinted: whether questions include the solution: "... Last digit? It is 4."
    """

    kinds: Annotated[Mapping[Kind, ranges.Fraction], ranges.SHARES]
    known_answer: bool
    drills: ranges.Amount = 0
    hinted: bool = False


def traces(config: TraceConfig) -> list[Trace]:
    """Samples distinct problems with explanations; `size` does not count drills.

    Raises:
      UserError: too few distinct problems exist.
    """
    c = config
    rng = np.random.default_rng([c.seed, 1, c.stream])
    kinds, result = sample_kinds(rng, c.kinds, c.size), []
    for exercise, kind in zip(_exercises(c), kinds, strict=True):
        explanation, answer = explain(exercise, str(kind), rng, c.known_answer)
        problem = _problem(exercise, answer, c.notation)
        if c.hinted:
            problem = problem._replace(question=f"{problem.question} It is {answer}.")
        result.append(Trace(problem, explanation))
    rng = np.random.default_rng([c.seed, 2, c.stream])
    for _ in range(c.drills):
        exercise = Exercise((sample_chain(rng, int(rng.integers(1, 3))),))
        explanation, answer = explain(exercise, "careful", rng, known_answer=False)
        result.append(Trace(_problem(exercise, answer, c.notation), explanation))
    return result


def _problem(exercise: Exercise, answer: str, notation: str) -> Problem:
    return Problem(exercise.question(notation), answer, answer, grader="exact")


def _exercises(config: ProblemConfig) -> Iterator[Exercise]:
    c = config
    rng = np.random.default_rng([c.seed, 0, c.stream])
    low, high = c.operations
    seen, tries = set(), 0
    while len(seen) < c.size:
        tries += 1
        if tries > 100 * (c.size + 10):
            raise UserError(
                f"arithmetic: only {len(seen)} of {c.size} distinct questions exist or are "
                "likely; increase data.operations or data.chains."
            )
        length = low if low == high else int(rng.integers(low, high + 1))
        exercise = Exercise(tuple(sample_chain(rng, length) for _ in range(c.chains)))
        if exercise.is_test == (c.split == "test") and exercise not in seen:
            seen.add(exercise)
            yield exercise
