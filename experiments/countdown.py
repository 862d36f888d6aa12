"""Countdown, a task outside the package: reach a target from given numbers.

    --config.data='{"task": "experiments.countdown:problems", "split": "test", "size": 500}'

Each number is used exactly once:

    question: "Make 25 from 3, 4, 7."      solution: "7*4-3"

Intermediate results are positive integers and divisions are exact. There are four kinds
of explanations:

    careful   "7*4=28 28-3=25"     one step at a time
    skipping  "7*4-3=25"           all steps at once
    restating "it is 7*4-3"        no steps
    wrong     careful, with a wrong last step

Train and test questions are disjoint: a question belongs to "test" if the checksum of its
sorted numbers and its target is 0 modulo 10, so the order of the numbers does not matter.
"""

import ast
import dataclasses
import operator
import re
import zlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, NamedTuple

import numpy as np

from rlt_jax import ranges
from rlt_jax.data.boxes import last_box
from rlt_jax.data.tasks.arithmetic import sample_kinds
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Trace

GRADER = "experiments.countdown:is_solution"
KINDS = ("careful", "skipping", "restating", "wrong")
Kind = Annotated[str, ranges.OneOf(KINDS)]
SOME = ranges.Condition("some of + - * /", lambda x: x and not set(x) - set("+-*/"))
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
# Alternative notations of the operators, and LaTeX that only affects the layout.
_NOTATIONS = {"*": r"\\times|\\cdot|[×·⋅]", "/": r"\\div|÷", "-": "−"}
_LAYOUT = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[()\[\],;:! ]")
_MAX_CHARACTERS = 200  # of an expression, so that the parser does not overflow


class Puzzle(NamedTuple):
    """A question with one of its solutions.

    Attributes:
      numbers: given numbers, in the order of the question.
      target: number to reach.
      steps: operations of the solution in order, each (left, sign, right, result).
      solution: the steps as one expression.
    """

    numbers: tuple[int, ...]
    target: int
    steps: tuple[tuple[int, str, int, int], ...]
    solution: str

    @property
    def problem(self) -> Problem:
        """The problem; its answer, "25 from 3, 4, 7", is what `is_solution` checks."""
        numbers = ", ".join(map(str, self.numbers))
        answer = f"{self.target} from {numbers}"
        return Problem(f"Make {answer}.", self.solution, answer, GRADER)

    @property
    def is_test(self) -> bool:
        """Whether the question belongs to the test split."""
        key = f"{sorted(self.numbers)} {self.target}"
        return zlib.crc32(key.encode()) % 10 == 0


def is_solution(prediction: str, answer: str) -> bool:
    """Whether an expression reaches the target with exactly the given numbers.

    Args:
      prediction: such as "7*4-3", "25 = (7 \\times 4) - 3", or a text whose last box has
        the expression. It is parsed, not run as code, and computed exactly; powers and
        unary signs are not allowed.
      answer: such as "25 from 3, 4, 7".
    """
    target, *numbers = map(int, re.findall(r"\d+", answer))
    text = last_box(prediction)
    text = _LAYOUT.sub("", prediction if text is None else text)
    for sign, notations in _NOTATIONS.items():
        text = re.sub(notations, sign, text)
    sides = [side.strip() for side in text.strip().strip("$").rstrip(".$ ").split("=")]
    if len(sides) == 2 and str(target) in sides:
        sides.remove(str(target))
    if len(sides) > 1:
        return False
    used: list[int] = []
    try:
        value = evaluate(sides[0], used)
    except (ArithmeticError, SyntaxError, ValueError):
        return False
    return value == target and sorted(used) == sorted(numbers)


def evaluate(expression: str, used: list[int]) -> Fraction:
    """The exact value of an expression; appends its numbers to `used`."""
    valid = re.fullmatch(r"[0-9+\-*/() ]+", expression)
    if not valid or len(expression) > _MAX_CHARACTERS:
        raise ValueError("not an expression")

    def value_of(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))
        raise ValueError("unsupported operation")

    return value_of(ast.parse(expression, mode="eval").body)


@dataclasses.dataclass(frozen=True)
class ProblemConfig(ranges.Checked):
    """Settings of `problems`.

    Attributes:
      split: "train" or "test".
      size: number of problems.
      seed: random seed.
      stream: number that gives runs with the same seed different problems.
      numbers: how many numbers are given.
      max_number: largest given number; the smallest is 1.
      max_target: largest target; intermediate results are at most its square.
      signs: allowed operations, a subset of "+-*/".
    """

    split: ranges.Split
    size: ranges.Amount
    seed: ranges.NonNegativeInt
    stream: ranges.NonNegativeInt = 0
    numbers: Annotated[int, ranges.Range(2, 100)] = 4
    max_number: ranges.PositiveInt = 25
    max_target: ranges.PositiveInt = 100
    signs: Annotated[str, SOME] = "+-*/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceConfig(ProblemConfig):
    """Settings of `traces`: those of `problems` and two more.

    Attributes:
      kinds: kind of explanation -> its probability.
      hinted: whether questions include the solution: "... from 3, 4, 7. It is 7*4-3."
    """

    kinds: Annotated[Mapping[Kind, ranges.Fraction], ranges.SHARES]
    hinted: bool = False


def problems(config: ProblemConfig) -> list[Problem]:
    """Samples distinct problems, each with a solution.

    Raises:
      UserError: too few distinct problems exist for the settings.
    """
    return [puzzle.problem for puzzle in _puzzles(config)]


def traces(config: TraceConfig) -> list[Trace]:
    """Samples distinct problems with explanations.

    Raises:
      UserError: too few distinct problems exist for the settings.
    """
    rng = np.random.default_rng([config.seed, 1, config.stream])
    kinds = sample_kinds(rng, config.kinds, config.size)
    result = []
    for puzzle, kind in zip(_puzzles(config), kinds, strict=True):
        problem = puzzle.problem
        if config.hinted:
            hinted = f"{problem.question} It is {problem.solution}."
            problem = problem._replace(question=hinted)
        result.append(Trace(problem, explain(puzzle, str(kind), rng)))
    return result


def explain(puzzle: Puzzle, kind: str, rng: np.random.Generator) -> str:
    """An explanation of one of `KINDS`; `rng` chooses the error of a wrong step."""
    if kind == "restating":
        return f"it is {puzzle.solution}"
    if kind == "skipping":
        return f"{puzzle.solution}={puzzle.target}"
    steps = [list(step) for step in puzzle.steps]
    if kind == "wrong":
        position = int(rng.integers(3))
        steps[-1][position and 2] += int(rng.integers(1, 10))
    return " ".join(f"{a}{sign}{b}={result}" for a, sign, b, result in steps)


def _puzzles(config: ProblemConfig) -> Iterator[Puzzle]:
    c = config
    rng = np.random.default_rng([c.seed, c.stream, 0])
    seen: set[str] = set()
    tries = 0
    while len(seen) < c.size:
        tries += 1
        if tries > 100 * (c.size + 10):
            raise UserError(
                f"countdown: only {len(seen)} of {c.size} distinct questions exist or are "
                "likely; increase data.numbers, data.max_number or data.max_target."
            )
        given = rng.integers(1, c.max_number + 1, c.numbers)
        puzzle = _reach(rng, [int(n) for n in given], c.max_target, c.signs)
        if puzzle is None or puzzle.is_test != (c.split == "test"):
            continue
        question = puzzle.problem.question
        if question not in seen:
            seen.add(question)
            yield puzzle


def _reach(
    rng: np.random.Generator, given: list[int], max_target: int, signs: str
) -> Puzzle | None:
    """Combines two random numbers at a time; None if a result is not allowed."""
    parts = [(number, str(number), "") for number in given]  # value, text, last sign
    steps = []
    while len(parts) > 1:
        first, second = rng.choice(len(parts), 2, replace=False)
        a, b = parts[first], parts[second]
        sign = signs[rng.integers(len(signs))]
        result = _compute(a[0], sign, b[0])
        if result is None or result > max_target**2:
            return None
        steps.append((a[0], sign, b[0], result))
        left, right = _parenthesize(a, sign, False), _parenthesize(b, sign, True)
        text = f"{left}{sign}{right}"
        rest = [part for i, part in enumerate(parts) if i not in (first, second)]
        parts = [*rest, (result, text, sign)]
    target, solution, _ = parts[0]
    if target > max_target:
        return None
    return Puzzle(tuple(given), target, tuple(steps), solution)


def _compute(a: int, sign: str, b: int) -> int | None:
    """The result of an operation; None if it is not a positive integer."""
    if sign == "/":
        return a // b if a % b == 0 else None
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return result if result > 0 else None


def _parenthesize(part: tuple[int, str, str], sign: str, is_right: bool) -> str:
    """The text of an operand, in parentheses if `sign` has the higher precedence."""
    _, text, inner = part
    is_sum = inner in ("+", "-")
    if is_sum and (sign in "*/" or (is_right and sign == "-")):
        return f"({text})"
    if inner and inner in "*/" and is_right and sign == "/":
        return f"({text})"
    return text
