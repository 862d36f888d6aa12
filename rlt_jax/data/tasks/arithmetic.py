"""Synthetic task: a chain of operations on a digit, modulo 10.

    question: "Start at 4: +3 *7 -2 +9 *3 -8. Last digit?"      solution: "0"

The same question in letter notation is "From 4: a3 m7 s2 a9 m3 s8. Last digit?"
Every operation is a bijection of the digits (+ and - by 1..9, * by 3, 7 or 9), so the
answers are uniformly distributed and cannot be guessed without the steps. There are five
kinds of explanations:

    careful   "4+3=7 7*7=9 9-2=7 ..."      one step at a time
    skipping  "4+3*7-2=7 7+9*3-8=0"        three operations at once, hard to check
    restating "it is 0"                    no steps
    wrong     careful, with one wrong step
    mistaken  careful, with every * taken for +

Train and test questions are disjoint: a chain belongs to "test", in both notations, if
the checksum of its question in sign notation is 0 modulo 10.
"""

import dataclasses
import itertools
import operator
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlt_jax.errors import UserError, check_choice
from rlt_jax.records import Problem, Trace

KINDS = ("careful", "skipping", "restating", "wrong", "mistaken")
CHAIN_LENGTH = 6
STEPS_PER_SKIP = 3
# Notation -> text before the start digit, and symbols for + - *.
NOTATIONS = {"signs": ("Start at", "+-*"), "letters": ("From", "asm")}
_OPERANDS = {"+": range(1, 10), "-": range(1, 10), "*": (3, 7, 9)}
_FUNCTIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Chain(NamedTuple):
    """A start digit and the operations applied to it, left to right."""

    start: int
    operations: tuple[tuple[str, int], ...]

    def question(self, notation: str = "signs") -> str:
        """The question as text, in one of `NOTATIONS`."""
        check_choice("data.notation", notation, NOTATIONS)
        opening, symbols = NOTATIONS[notation]
        symbol = dict(zip("+-*", symbols, strict=True))
        steps = " ".join(f"{symbol[sign]}{x}" for sign, x in self.operations)
        return f"{opening} {self.start}: {steps}. Last digit?"

    @property
    def is_test(self) -> bool:
        """Whether the question belongs to the test split."""
        return zlib.crc32(self.question().encode()) % 10 == 0

    def results(self) -> list[int]:
        """The digit after each operation."""
        digits = itertools.accumulate(self.operations, apply, initial=self.start)
        return list(digits)[1:]


def apply(value: int, operation: tuple[str, int]) -> int:
    """Applies one operation to a digit, modulo 10."""
    sign, operand = operation
    return _FUNCTIONS[sign](value, operand) % 10


def sample_chain(rng: np.random.Generator, length: int = CHAIN_LENGTH) -> Chain:
    """A random chain of `length` operations."""
    signs = rng.choice(list(_OPERANDS), length)
    operations = tuple((str(s), int(rng.choice(list(_OPERANDS[s])))) for s in signs)
    return Chain(int(rng.integers(10)), operations)


def explain(
    chain: Chain, kind: str, rng: np.random.Generator, known_answer: bool
) -> tuple[str, int]:
    """An explanation of the given kind, and its final digit.

    Args:
      chain: the problem.
      kind: one of `KINDS`.
      rng: generator that chooses the wrong step.
      known_answer: whether the last step after a wrong one has the true answer, as if the
        answer were known; otherwise the error propagates to the answer.
    """
    answer = chain.results()[-1]
    if kind == "restating":
        return f"it is {answer}", answer
    length = len(chain.operations)
    size = STEPS_PER_SKIP if kind == "skipping" else 1
    if kind in ("wrong", "mistaken"):
        wrong = int(rng.integers(length - known_answer))
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
            value = answer
        steps.append(f"{step}={value}")
    return " ".join(steps), value


def sample_kinds(
    rng: np.random.Generator, kinds: Mapping[str, float], known: Sequence[str], n: int
) -> np.ndarray:
    """Samples n kinds of explanations with the probabilities `kinds`.

    Raises:
      UserError: an unknown kind, or the probabilities do not sum to 1.
    """
    probs = list(kinds.values())
    if set(kinds) - set(known) or abs(sum(probs) - 1) > 1e-6 or min(probs) < 0:
        raise UserError(
            f"data.kinds={dict(kinds)}: must be probabilities of {', '.join(known)} that "
            "sum to 1."
        )
    return rng.choice(list(kinds), n, p=probs)


def problems(
    split: str, size: int, seed: int, stream: int = 0, notation: str = "signs"
) -> list[Problem]:
    """Samples distinct problems.

    Args:
      split: "train" or "test".
      size: number of problems.
      seed: random seed.
      stream: number that gives runs with the same seed different problems.
      notation: one of `NOTATIONS`.

    Raises:
      UserError: an unknown split or notation.
    """
    chains = _chains(split, size, seed, stream)
    return [_problem(chain, chain.results()[-1], notation) for chain in chains]


@dataclasses.dataclass(frozen=True)
class TraceConfig:
    """Settings of `traces`.

    Attributes:
      split: "train" or "test".
      size: number of traces, without drills.
      seed: random seed.
      kinds: kind of explanation -> its probability.
      known_answer: see `explain`. If False, the solution of a trace with a wrong step is
        the digit that its steps lead to.
      stream: number that gives runs with the same seed different problems.
      drills: number of additional careful traces of one or two operations.
      hinted: whether questions include the solution: "... Last digit? It is 4."
      notation: one of `NOTATIONS`.
    """

    split: str
    size: int
    seed: int
    kinds: Mapping[str, float]
    known_answer: bool
    stream: int = 0
    drills: int = 0
    hinted: bool = False
    notation: str = "signs"


def traces(config: TraceConfig) -> list[Trace]:
    """Samples distinct problems with explanations.

    Raises:
      UserError: an unknown split, notation or kind, or invalid probabilities.
    """
    c = config
    rng = np.random.default_rng([c.seed, 1, c.stream])
    kinds = sample_kinds(rng, c.kinds, KINDS, c.size)
    chains = _chains(c.split, c.size, c.seed, c.stream)
    result = []
    for chain, kind in zip(chains, kinds, strict=True):
        explanation, digit = explain(chain, str(kind), rng, c.known_answer)
        problem = _problem(chain, digit, c.notation)
        if c.hinted:
            problem = problem._replace(question=f"{problem.question} It is {digit}.")
        result.append(Trace(problem, explanation))
    rng = np.random.default_rng([c.seed, 2, c.stream])
    for _ in range(c.drills):
        chain = sample_chain(rng, int(rng.integers(1, 3)))
        explanation, digit = explain(chain, "careful", rng, known_answer=False)
        result.append(Trace(_problem(chain, digit, c.notation), explanation))
    return result


def _problem(chain: Chain, digit: int, notation: str) -> Problem:
    return Problem(chain.question(notation), str(digit), str(digit), grader="exact")


def _chains(split: str, size: int, seed: int, stream: int) -> Iterator[Chain]:
    check_choice("data.split", split, ("train", "test"))
    rng = np.random.default_rng([seed, 0, stream])
    seen: set[Chain] = set()
    while len(seen) < size:
        chain = sample_chain(rng)
        if chain.is_test == (split == "test") and chain not in seen:
            seen.add(chain)
            yield chain
