"""GSM8K as published: `question`, and `answer` ending in `#### number`.

The text of the answer before `####`, without annotations such as `<<48/2=24>>`, is the
explanation; the number is the answer, and in a box the solution.
"""

import re

from rlt_jax.data.tables import as_text, convert, read_records
from rlt_jax.errors import UserError
from rlt_jax.ranges import Limit, NonNegativeInt
from rlt_jax.records import Problem, Record, Trace

SOURCE = (
    "train.jsonl and test.jsonl of https://github.com/openai/grade-school-math, or "
    "the Parquet files of https://huggingface.co/datasets/openai/gsm8k"
)
_CALCULATION = re.compile(r"<<[^<>]*>>")


def traces(
    path: str, limit: Limit = None, max_calculations: NonNegativeInt | None = None
) -> list[Trace]:
    """Reads problems with explanations.

    Args:
      path: `train.jsonl` or `test.jsonl` of the data set, or its Parquet files.
      limit: maximum number of problems.
      max_calculations: leaves out problems whose explanation has more annotations such as
        `<<48/2=24>>`.

    Raises:
      UserError: the file is missing or invalid, or a record has no `####`.
    """

    def is_short(item: tuple[str, Record]) -> bool:
        found = max_calculations is not None and _CALCULATION.findall(_answer(*item))
        return not found or len(found) <= max_calculations

    records = convert(read_records(path, SOURCE, ("question", "answer")))
    return list(convert(filter(is_short, records), _trace, limit))


def problems(
    path: str, limit: Limit = None, max_calculations: NonNegativeInt | None = None
) -> list[Problem]:
    """Reads problems; see `traces`."""
    return [one.problem for one in traces(path, limit, max_calculations)]


def _trace(where: str, record: Record) -> Trace:
    question = as_text(where, "question", record.get("question"))
    steps, mark, number = _answer(where, record).rpartition("####")
    answer = number.strip().replace(",", "")
    if not mark or not answer or not question.strip():
        raise UserError(f"{where}: needs a question, and an answer with '#### number'.")
    solution = f"The answer is \\boxed{{{answer}}}."
    explanation = _CALCULATION.sub("", steps).strip()
    return Trace(Problem(question, solution, answer), explanation)


def _answer(where: str, record: Record) -> str:
    return as_text(where, "answer", record.get("answer"))
