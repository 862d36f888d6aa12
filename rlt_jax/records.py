"""Records of data sets and of the files of a run; without JAX, as grading and reports are."""

from typing import Any, NamedTuple

Record = dict[str, Any]  # a line of a JSONL file, or the content of a JSON file


class Problem(NamedTuple):
    """A question with its known solution and, where it can be graded, its answer.

    Attributes:
      question: text of the question.
      solution: text that a student should generate as its solution.
      answer: the text that a grader compares with; None where there is none.
      grader: one of `rlt_jax.rl.grading.GRADERS`, or "module:function", or
        "module:function?argument".
      history: (role, text) of the turns before the question, in a longer conversation.
    """

    question: str
    solution: str
    answer: str | None = None
    grader: str = "math"
    history: tuple[tuple[str, str], ...] = ()

    @property
    def asked(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """The question with the turns before it."""
        return self.question, self.history


class Trace(NamedTuple):
    """A problem with an explanation (or reasoning trace) that leads to its solution."""

    problem: Problem
    explanation: str


def problem_record(problem: Problem) -> Record:
    """A problem as JSON columns that `data/traces.py` reads."""
    record = problem._asdict()
    del record["grader"], record["history"]
    if problem.history:
        turns = [*problem.history, ("user", problem.question)]
        record["prompt"] = [{"role": role, "content": text} for role, text in turns]
    return record


def history_of(record: Record) -> tuple[tuple[str, str], ...]:
    """The history of a problem in a record that `problem_record` made."""
    turns = record.get("prompt", ())[:-1]
    return tuple((turn["role"], turn["content"]) for turn in turns)
