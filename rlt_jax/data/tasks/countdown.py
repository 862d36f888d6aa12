"""Countdown: reach a target from given numbers, each of them used exactly once.

    question: "Make 25 from 3, 4, 7."      solution: "7*4-3"

Intermediate results are positive integers, divisions are exact. Explanations come in
kinds:

    careful   "7*4=28 28-3=25"     one step at a time
    skipping  "7*4-3=25"           all of it at once
    restating "it is 7*4-3"        no steps
    wrong     careful, with one wrong step

Train and test questions are disjoint: a question belongs to "test" when the checksum of
its sorted numbers and its target is 0 modulo 10, so their order does not matter.
"""

import ast
import operator
import re
import zlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from rlt_jax.data.boxes import last_box
from rlt_jax.data.tasks.arithmetic import draw_kinds
from rlt_jax.data.templates import Problem, Trace
from rlt_jax.errors import UserError

KINDS = ("careful", "skipping", "restating", "wrong")
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
# Other ways to write them, and LaTeX that only changes the looks.
_WRITTEN = {"*": r"\\times|\\cdot|[×·⋅]", "/": r"\\div|÷", "-": "−"}
_LAYOUT = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[()\[\],;:! ]")
_LONGEST = 200  # characters of an expression; the parser's stack is finite


class Puzzle(NamedTuple):
    """Numbers in the order of the question, a target, and one way to reach it.

    Attributes:
      numbers: what is given.
      target: what is to be made.
      steps: the operations in order, each (left, sign, right, result).
      solution: the same as one expression.
    """

    numbers: tuple[int, ...]
    target: int
    steps: tuple[tuple[int, str, int, int], ...]
    solution: str

    @property
    def problem(self) -> Problem:
        """Question, solution, and numbers and target as the answer to grade by."""
        numbers = ", ".join(map(str, self.numbers))
        answer = f"{self.target} from {numbers}"
        return Problem(f"Make {answer}.", self.solution, answer, "countdown")

    @property
    def is_test(self) -> bool:
        """Whether the question is held out from all training."""
        key = f"{sorted(self.numbers)} {self.target}"
        return zlib.crc32(key.encode()) % 10 == 0


def is_solution(prediction: str, answer: str) -> bool:
    """Whether an expression makes the target of exactly the given numbers.

    Args:
      prediction: such as "7*4-3", "25 = (7 \\times 4) - 3" or the last box of a longer
        text; exact arithmetic, no powers, no signs, nothing evaluated as code.
      answer: such as "25 from 3, 4, 7".
    """
    target, *numbers = map(int, re.findall(r"\d+", answer))
    text = last_box(prediction)
    text = _LAYOUT.sub("", prediction if text is None else text)
    for sign, written in _WRITTEN.items():
        text = re.sub(written, sign, text)
    sides = [side.strip() for side in text.strip().strip("$").rstrip(".$ ").split("=")]
    if len(sides) == 2 and str(target) in sides:
        sides.remove(str(target))
    if len(sides) > 1:
        return False
    used: list[int] = []
    try:
        value = _evaluate(sides[0], used)
    except (ArithmeticError, SyntaxError, ValueError):
        return False
    return value == target and sorted(used) == sorted(numbers)


def _evaluate(expression: str, used: list[int]) -> Fraction:
    """The exact value; appends every number to `used`."""
    if len(expression) > _LONGEST or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        raise ValueError("no expression")

    def value_of(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))
        raise ValueError("no such operation")

    return value_of(ast.parse(expression, mode="eval").body)


def problems(
    split: str,
    size: int,
    seed: int,
    stream: int = 0,
    numbers: int = 4,
    max_number: int = 25,
    max_target: int = 100,
    signs: str = "+-*/",
) -> list[Problem]:
    """`size` different solvable problems of the split "train" or "test".

    Args:
      split: "train" or "test".
      size: how many.
      seed: of everything random.
      stream: runs of one seed that shall see different problems name different streams.
      numbers: how many are given.
      max_number: the largest of them; the smallest is 1.
      max_target: the largest target; no intermediate result is larger than its square.
      signs: operations, of "+-*/".
    """
    limits = (numbers, max_number, max_target, signs)
    return [puzzle.problem for puzzle in _puzzles(split, size, [seed, stream], *limits)]


def traces(
    split: str,
    size: int,
    seed: int,
    kinds: Mapping[str, float],
    stream: int = 0,
    numbers: int = 4,
    max_number: int = 25,
    max_target: int = 100,
    signs: str = "+-*/",
    hinted: bool = False,
) -> list[Trace]:
    """The same with explanations, of each kind in its share; shares sum to 1.

    A wrong step is the last one. Where they are `hinted`, the questions tell the
    solution, "... from 3, 4, 7. It is 7*4-3."
    """
    rng = np.random.default_rng([seed, 1, stream])
    chosen = draw_kinds(rng, kinds, KINDS, size)
    limits = (numbers, max_number, max_target, signs)
    puzzles = _puzzles(split, size, [seed, stream], *limits)
    result = []
    for puzzle, kind in zip(puzzles, chosen, strict=True):
        problem = puzzle.problem
        told = problem.question + f" It is {problem.solution}." * hinted
        problem = problem._replace(question=told)
        result.append(Trace(problem, explain(puzzle, str(kind), rng)))
    return result


def explain(puzzle: Puzzle, kind: str, rng: np.random.Generator) -> str:
    """An explanation of one of `KINDS`; `rng` chooses the wrong step's mistake."""
    if kind == "restating":
        return f"it is {puzzle.solution}"
    if kind == "skipping":
        return f"{puzzle.solution}={puzzle.target}"
    steps = [list(step) for step in puzzle.steps]
    if kind == "wrong":
        place = int(rng.integers(3))
        steps[-1][place and 2] += int(rng.integers(1, 10))
    return " ".join(f"{a}{sign}{b}={result}" for a, sign, b, result in steps)


def _puzzles(
    split: str,
    size: int,
    seed: list[int],
    numbers: int,
    max_number: int,
    max_target: int,
    signs: str,
) -> Iterator[Puzzle]:
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} of countdown: train or test.")
    if not signs or set(signs) - set("+-*/") or numbers < 2 or max_number < 1:
        raise UserError(
            f"countdown: {numbers} numbers up to {max_number}, signs {signs!r}: at least "
            "two numbers, positive, and signs of '+-*/'."
        )
    rng = np.random.default_rng([*seed, 0])
    seen: set[str] = set()
    tries = 0
    while len(seen) < size:
        tries += 1
        if tries > 100 * (size + 10):
            raise UserError(
                f"countdown: found {len(seen)} different questions of {size}; allow more "
                "numbers, larger ones, or larger targets."
            )
        given = rng.integers(1, max_number + 1, numbers)
        puzzle = _reach(rng, [int(n) for n in given], max_target, signs)
        if puzzle is None or puzzle.is_test != (split == "test"):
            continue
        question = puzzle.problem.question
        if question not in seen:
            seen.add(question)
            yield puzzle


def _reach(
    rng: np.random.Generator, given: list[int], max_target: int, signs: str
) -> Puzzle | None:
    """Joins two random numbers at a time; None where a result is not allowed."""
    parts = [(number, str(number), "") for number in given]  # value, text, last sign
    steps = []
    while len(parts) > 1:
        first, second = rng.choice(len(parts), 2, replace=False)
        a, b = parts[first], parts[second]
        sign = signs[rng.integers(len(signs))]
        result = _join(a[0], sign, b[0])
        if result is None or result > max_target**2:
            return None
        steps.append((a[0], sign, b[0], result))
        text = f"{_wrap(a, sign, False)}{sign}{_wrap(b, sign, True)}"
        rest = [part for i, part in enumerate(parts) if i not in (first, second)]
        parts = [*rest, (result, text, sign)]
    target, solution, _ = parts[0]
    if target > max_target:
        return None
    return Puzzle(tuple(given), target, tuple(steps), solution)


def _join(a: int, sign: str, b: int) -> int | None:
    """The result, None where it is no positive integer."""
    if sign == "/":
        return a // b if a % b == 0 else None
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return result if result > 0 else None


def _wrap(part: tuple[int, str, str], sign: str, is_right: bool) -> str:
    """The part's text, in brackets where the sign beside it binds more strongly."""
    _, text, inner = part
    weak = inner in ("+", "-")
    if weak and (sign in "*/" or (is_right and sign == "-")):
        return f"({text})"
    if inner and inner in "*/" and is_right and sign == "/":
        return f"({text})"
    return text
