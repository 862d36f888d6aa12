"""Benchmarks of questions with short mathematical answers, as published."""

from typing import Any

from rlt_jax.data.boxes import last_box
from rlt_jax.data.tables import as_text, convert, listed, read_records
from rlt_jax.errors import UserError
from rlt_jax.ranges import Limit
from rlt_jax.records import Problem, Record

_HUB = "https://huggingface.co/datasets"
# Benchmark -> where to download it.
SOURCES = {
    "math500": f"test.jsonl of {_HUB}/HuggingFaceH4/MATH-500",
    "aime24": f"{_HUB}/math-ai/aime24 or {_HUB}/Maxwell-Jia/AIME_2024",
    "aime25": f"{_HUB}/math-ai/aime25 or {_HUB}/opencompass/AIME2025",
    "amc23": f"{_HUB}/math-ai/amc23",
}

COLUMNS = ("problem", "question", "solution", "answer")


def problems(name: str, path: str, limit: Limit = None) -> list[Problem]:
    """Reads a benchmark; the answer is used if the file has no solution.

    Args:
      name: one of `SOURCES`.
      path: files, see `tables.read_records`.
      limit: maximum number of questions to read.

    Raises:
      UserError: no file, or a record without question or answer.
    """
    return list(convert(read_records(path, SOURCES[name], COLUMNS), _problem, limit))


def _problem(where: str, record: Record) -> Problem:
    given = {key: value for key, value in record.items() if value is not None}
    names = {key: name for key in given if (name := key.strip().lower()) in COLUMNS}
    texts = {name: _text(where, key, given[key]) for key, name in names.items()}
    if len(texts) < len(names):
        raise UserError(f"{where}: {listed(names)} are the same column; remove one.")
    question = texts.get("problem", texts.get("question", ""))
    solution = texts.get("solution", "")
    # Some files have the answer only in the solution.
    answer = texts.get("answer") or last_box(solution) or ""
    if not question.strip() or not answer.strip():
        raise UserError(
            f"{where}: needs problem or question, and answer or a solution with its "
            f"answer in \\boxed{{}}; the columns are {listed(record)}."
        )
    return Problem(question, solution or answer, answer)


def _text(where: str, name: str, value: Any) -> str:
    """The value as text; an integer that is stored as the float 27.0 becomes "27"."""
    return as_text(where, name, value).removesuffix(".0" * isinstance(value, float))
