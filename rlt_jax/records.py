"""Records of data sets and of the files of a run; without JAX, as grading and reports are."""

from typing import Any, NamedTuple

Record = dict[str, Any]  # a line of a JSONL file, or the content of a JSON file


class Problem(NamedTuple):
    """A question with its known solution and, where it can be graded, its answer.

    Attributes:
      question: text of the question.
      solution: text that a student should generate as its solution.
      answer: the text that a grader compares with; None where there is none.
      grader: one of `rlt_jax.rl.grading.GRADERS`, or "module:function".
    """

    question: str
    solution: str
    answer: str | None = None
    grader: str = "math"


class Trace(NamedTuple):
    """A problem with an explanation (or reasoning trace) that leads to its solution."""

    problem: Problem
    explanation: str
