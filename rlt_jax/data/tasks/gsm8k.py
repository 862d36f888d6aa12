"""GSM8K in its published layout: `question`, and `answer` ending in `#### number`.

The worked answer serves as the trace, without its `<<48/2=24>>` marks; the solution is
its last line with the number marked.
"""

import itertools
import re

from rlt_jax.data.tables import Row, read_rows
from rlt_jax.data.templates import Problem, Trace
from rlt_jax.errors import UserError

SOURCE = (
    "train.jsonl and test.jsonl of https://github.com/openai/grade-school-math, or "
    "the Parquet files of https://huggingface.co/datasets/openai/gsm8k"
)
_CALCULATION = re.compile(r"<<[^>]*>>")


def traces(path: str, limit: int | None = None) -> list[Trace]:
    """Reads problems with their worked answers as explanations.

    Args:
      path: `train.jsonl` or `test.jsonl` of the data set, or its Parquet files.
      limit: read no more than this many.

    Raises:
      UserError: the file is missing or malformed, or a row has no `####`.
    """
    rows = itertools.islice(read_rows(path, SOURCE), limit)
    return [_trace(where, row) for where, row in rows]


def problems(path: str, limit: int | None = None) -> list[Problem]:
    """Reads problems; see `traces`."""
    return [trace.problem for trace in traces(path, limit)]


def _trace(where: str, row: Row) -> Trace:
    worked, mark, number = str(row.get("answer", "")).rpartition("####")
    if not mark or "question" not in row:
        raise UserError(f"{where}: needs a question, and an answer with '#### number'.")
    answer = number.strip().replace(",", "")
    solution = f"The answer is \\boxed{{{answer}}}."
    explanation = _CALCULATION.sub("", worked).strip()
    return Trace(Problem(row["question"], solution, answer), explanation)
