"""Benchmarks of questions with short mathematical answers, as published."""

import itertools
from typing import Any

from rlt_jax.data.boxes import last_box
from rlt_jax.data.tables import read_records
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Record

_HUB = "https://huggingface.co/datasets"
# Benchmark -> where to download it.
SOURCES = {
    "math500": f"test.jsonl of {_HUB}/HuggingFaceH4/MATH-500",
    "aime24": f"{_HUB}/math-ai/aime24 or {_HUB}/Maxwell-Jia/AIME_2024",
    "aime25": f"{_HUB}/math-ai/aime25 or {_HUB}/opencompass/AIME2025",
    "amc23": f"{_HUB}/math-ai/amc23",
}
# Names of columns in lower case; the first one with a value is used.
QUESTION = ("problem", "question")
SOLUTION = ("solution",)
ANSWER = ("answer",)


def problems(name: str, path: str, limit: int | None = None) -> list[Problem]:
    """Reads a benchmark; the answer is used if the file has no solution.

    Args:
      name: one of `SOURCES`.
      path: files, see `tables.read_records`.
      limit: maximum number of questions to read.

    Raises:
      UserError: no file, or a record without question or answer.
    """
    records = itertools.islice(read_records(path, SOURCES[name]), limit)
    return [_problem(where, record) for where, record in records]


def _problem(where: str, record: Record) -> Problem:
    values = {key.strip().lower(): value for key, value in record.items() if key}
    question, solution, answer = (
        next(
            (_text(values[name]) for name in names if values.get(name) is not None), ""
        )
        for names in (QUESTION, SOLUTION, ANSWER)
    )
    if not answer:  # some files have it only in the solution
        answer = last_box(solution) or ""
    if not question.strip() or not answer.strip():
        raise UserError(
            f"{where}: needs {' or '.join(QUESTION)}, and {ANSWER[0]} or a solution "
            f"with its answer in \\boxed{{}}; the columns are {', '.join(record)}."
        )
    return Problem(question, solution or answer, answer)


def _text(value: Any) -> str:
    """The value as text; an integer that is stored as the float 27.0 becomes "27"."""
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if is_whole else value)
