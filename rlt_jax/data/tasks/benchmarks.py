"""Benchmarks of questions with short mathematical answers, in their published layouts.

The files differ in little but the names of their columns.
"""

import itertools
from typing import Any

from rlt_jax.data.boxes import last_box
from rlt_jax.data.tables import Row, read_rows
from rlt_jax.data.templates import Problem
from rlt_jax.errors import UserError

_HUB = "https://huggingface.co/datasets"
# Where each benchmark's files are.
SOURCES = {
    "math500": f"test.jsonl of {_HUB}/HuggingFaceH4/MATH-500",
    "aime24": f"{_HUB}/math-ai/aime24 or {_HUB}/Maxwell-Jia/AIME_2024",
    "aime25": f"{_HUB}/math-ai/aime25 or {_HUB}/opencompass/AIME2025",
    "amc23": f"{_HUB}/math-ai/amc23",
}
# Names of columns, lower case; the first that has a value counts.
QUESTION = ("problem", "question")
SOLUTION = ("solution",)
ANSWER = ("answer",)


def problems(name: str, path: str, limit: int | None = None) -> list[Problem]:
    """Reads a benchmark; a solution that the file lacks is the answer.

    Args:
      name: one of `SOURCES`.
      path: its file, or a pattern of several: JSON Lines, JSON, CSV or Parquet.
      limit: read no more questions than this.

    Raises:
      UserError: no file, or a row without question or answer.
    """
    rows = itertools.islice(read_rows(path, SOURCES[name]), limit)
    return [_problem(where, row) for where, row in rows]


def _problem(where: str, row: Row) -> Problem:
    values = {key.strip().lower(): value for key, value in row.items() if key}
    question, solution, answer = (
        next(
            (_text(values[name]) for name in names if values.get(name) is not None), ""
        )
        for names in (QUESTION, SOLUTION, ANSWER)
    )
    if not answer:  # some files have it in the solution alone
        answer = last_box(solution) or ""
    if not question.strip() or not answer.strip():
        raise UserError(
            f"{where}: needs {' or '.join(QUESTION)}, and {ANSWER[0]} or a solution "
            f"with its answer in \\boxed{{}}; found the columns {', '.join(row)}."
        )
    return Problem(question, solution or answer, answer)


def _text(value: Any) -> str:
    """Integers may be stored as floats, 27 as 27.0."""
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if is_whole else value)
