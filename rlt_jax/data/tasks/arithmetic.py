"""The embedded task: a chain of single-digit operations, last digit only.

    question: "Start at 4: +3 *7 -2 +9 *3 -8. Last digit?"      solution: "0"

or, in another notation of the same, "From 4: a3 m7 s2 a9 m3 s8. Last digit?"
Every operation is a bijection of the digits (+ and - by 1..9, * by 3, 7 or 9), so the
answer of a chain is uniform and cannot be guessed without its steps. Explanations come
in kinds:

    careful   "4+3=7 7*7=9 9-2=7 ..."      one step at a time
    skipping  "4+3*7-2=7 7+9*3-8=0"        three operations at once, hard to check
    restating "it is 0"                    no steps
    wrong     careful, with one wrong step
    mistaken  careful, by someone who always takes * for +

Train and test questions are disjoint: a chain belongs to "test", in every notation, when
the checksum of its question in signs is 0 modulo 10.
"""

import dataclasses
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rlt_jax.data.templates import Problem, Trace
from rlt_jax.errors import UserError

KINDS = ("careful", "skipping", "restating", "wrong", "mistaken")
CHAIN_LENGTH = 6
STEPS_PER_SKIP = 3
# Notation -> what stands before the start, and for the signs + - *.
NOTATIONS = {"signs": ("Start at", "+-*"), "letters": ("From", "asm")}
_OPERANDS = {"+": range(1, 10), "-": range(1, 10), "*": (3, 7, 9)}


@dataclasses.dataclass(frozen=True)
class Chain:
    """A start digit and the operations applied to it, left to right."""

    start: int
    operations: tuple[tuple[str, int], ...]

    def question(self, notation: str = "signs") -> str:
        """The question as text, in one of `NOTATIONS`."""
        opening, letters = NOTATIONS[notation]
        written = dict(zip("+-*", letters, strict=True))
        steps = " ".join(f"{written[sign]}{x}" for sign, x in self.operations)
        return f"{opening} {self.start}: {steps}. Last digit?"

    @property
    def is_test(self) -> bool:
        """Whether the question is held out from all training."""
        return zlib.crc32(self.question().encode()) % 10 == 0

    def results(self) -> list[int]:
        """The digit after each operation."""
        digits, value = [], self.start
        for operation in self.operations:
            value = apply(value, operation)
            digits.append(value)
        return digits


_SIGNS = str.maketrans("asm", "+-*")


def apply(value: int, operation: tuple[str, int]) -> int:
    """One operation on a digit, modulo 10."""
    sign, operand = operation
    if sign == "+":
        return (value + operand) % 10
    return ((value - operand) if sign == "-" else value * operand) % 10


def sample_chain(rng: np.random.Generator, length: int = CHAIN_LENGTH) -> Chain:
    """A random chain of `length` operations."""
    signs = rng.choice(list(_OPERANDS), length)
    operations = tuple((str(s), int(rng.choice(list(_OPERANDS[s])))) for s in signs)
    return Chain(int(rng.integers(10)), operations)


def explain(
    chain: Chain, kind: str, rng: np.random.Generator, known_answer: bool
) -> tuple[str, int]:
    """An explanation of one kind, and the digit it arrives at.

    Args:
      chain: the problem.
      kind: one of `KINDS`.
      rng: places the wrong step.
      known_answer: after a false step the last one is made to reach the true answer, as
        by someone who was told it; otherwise its error is carried on.
    """
    answer = chain.results()[-1]
    if kind == "restating":
        return f"it is {answer}", answer
    if kind in ("wrong", "mistaken"):
        return _false_steps(chain, kind, rng, known_answer)
    size = 1 if kind == "careful" else STEPS_PER_SKIP
    lines, value = [], chain.start
    for i in range(0, len(chain.operations), size):
        group = chain.operations[i : i + size]
        written = "".join(f"{sign}{operand}" for sign, operand in group)
        before = value
        for operation in group:
            value = apply(value, operation)
        lines.append(f"{before}{written}={value}")
    return " ".join(lines), answer


def draw_kinds(
    rng: np.random.Generator,
    kinds: Mapping[str, float],
    known: Sequence[str],
    size: int,
) -> np.ndarray:
    """`size` kinds of explanations, each drawn by its share.

    Raises:
      UserError: a kind is not among the known, or the shares do not sum to 1.
    """
    shares = list(kinds.values())
    if set(kinds) - set(known) or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
        raise UserError(f"kinds {dict(kinds)}: shares of {known} that sum to 1.")
    return rng.choice(list(kinds), size, p=shares)


def kind_of(question: str, explanation: str) -> str:
    """The kind of an explanation that somebody wrote for a question.

    "wrong" is one with a step that is false, does not go on from the one before, or is
    not the question's; then "careful" has all single steps, "skipping" several at once,
    and "restating" none. "other" are right steps that do not cover the question.
    """
    operations = [
        (sign.translate(_SIGNS), int(operand))
        for sign, operand in re.findall(r" ([+\-*asm])(\d)", question)
    ]
    steps = re.findall(r"(\d)((?:[+\-*]\d)+)=(\d)", explanation)
    value, done, longest = int(re.search(r"\d", question)[0]), 0, 0
    for before, written, after in steps:
        group = [
            (sign, int(operand)) for sign, operand in re.findall(r"(.)(.)", written)
        ]
        if int(before) != value or group != operations[done : done + len(group)]:
            return "wrong"
        for operation in group:
            value = apply(value, operation)
        if int(after) != value:
            return "wrong"
        done += len(group)
        longest = max(longest, len(group))
    if not steps:
        return "restating"
    if done < len(operations):
        return "other"
    return "careful" if longest == 1 else "skipping"


def _false_steps(
    chain: Chain, kind: str, rng: np.random.Generator, known_answer: bool
) -> tuple[str, int]:
    place = int(rng.integers(len(chain.operations) - known_answer))
    lines, value = [], chain.start
    for i, operation in enumerate(chain.operations):
        before = value
        if kind == "mistaken":
            value = apply(value, (operation[0].replace("*", "+"), operation[1]))
        else:
            value = apply(value, operation)
            if i == place:
                value = (value + int(rng.integers(1, 10))) % 10
        if known_answer and i == len(chain.operations) - 1:
            value = chain.results()[-1]
        lines.append(f"{before}{operation[0]}{operation[1]}={value}")
    return " ".join(lines), value


def problems(
    split: str, size: int, seed: int, stream: int = 0, notation: str = "signs"
) -> list[Problem]:
    """`size` different problems of the split "train" or "test".

    Runs of one seed that shall see different problems name different streams.
    """
    _check_notation(notation)
    chains = _chains(split, size, seed, stream)
    return [_problem(chain, chain.results()[-1], notation) for chain in chains]


def traces(
    split: str,
    size: int,
    seed: int,
    kinds: Mapping[str, float],
    known_answer: bool,
    stream: int = 0,
    drills: int = 0,
    hinted: bool = False,
    notation: str = "signs",
) -> list[Trace]:
    """`size` different problems with explanations of the kinds in the given shares.

    Args:
      split: "train" or "test".
      size: number of traces.
      seed: of chains and kinds.
      stream: see `problems`.
      kinds: kind -> share; shares sum to 1.
      known_answer: see `explain`. Without it, the solution of a trace with a wrong step
        is the digit that follows from its steps.
      drills: so many careful traces of one or two operations are added, from which the
        single steps are learned.
      hinted: the questions tell the solution, "... Last digit? It is 4."
      notation: one of `NOTATIONS`.
    """
    _check_notation(notation)
    rng = np.random.default_rng([seed, 1, stream])
    chosen = draw_kinds(rng, kinds, KINDS, size)
    chains = _chains(split, size, seed, stream)
    result = []
    for chain, kind in zip(chains, chosen, strict=True):
        explanation, digit = explain(chain, str(kind), rng, known_answer)
        problem = _problem(chain, digit, notation)
        if hinted:
            told = f"{problem.question} It is {problem.solution}."
            problem = problem._replace(question=told)
        result.append(Trace(problem, explanation))
    return result + _drills(drills, seed, stream, notation)


def _drills(size: int, seed: int, stream: int, notation: str) -> list[Trace]:
    rng = np.random.default_rng([seed, 2, stream])
    result = []
    for _ in range(size):
        chain = sample_chain(rng, int(rng.integers(1, 3)))
        explanation, _ = explain(chain, "careful", rng, known_answer=False)
        problem = _problem(chain, chain.results()[-1], notation)
        result.append(Trace(problem, explanation))
    return result


def _problem(chain: Chain, digit: int, notation: str) -> Problem:
    return Problem(chain.question(notation), str(digit), str(digit), grader="exact")


def _check_notation(notation: str) -> None:
    if notation not in NOTATIONS:
        raise UserError(f"notation {notation!r}: one of {', '.join(NOTATIONS)}.")


def _chains(split: str, size: int, seed: int, stream: int) -> Iterator[Chain]:
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} of the arithmetic task: train or test.")
    rng = np.random.default_rng([seed, 0, stream])
    seen: set[Chain] = set()
    while len(seen) < size:
        chain = sample_chain(rng)
        if chain.is_test == (split == "test") and chain not in seen:
            seen.add(chain)
            yield chain
