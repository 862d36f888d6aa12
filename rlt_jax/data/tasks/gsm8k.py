"""GSM8K in its published layout: `question`, and `answer` ending in `#### number`.

The worked answer serves as the trace, without its `<<48/2=24>>` marks; the solution is
its last line with the number marked.
"""

import json
import re
from pathlib import Path

from rlt_jax.data.templates import Problem, Trace
from rlt_jax.errors import UserError

_CALCULATION = re.compile(r"<<[^>]*>>")


def traces(path: str, limit: int | None = None) -> list[Trace]:
    """Reads problems with their worked answers as explanations.

    Args:
      path: `train.jsonl` or `test.jsonl` of the data set.
      limit: read no more than this many.

    Raises:
      UserError: the file is missing, a line is not JSON, or has no `####`.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"gsm8k: there is no file {file}; set data.path.")
    result = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and number > limit:
                break
            result.append(_parse(line, f"{file}:{number}"))
    return result


def problems(path: str, limit: int | None = None) -> list[Problem]:
    """Reads problems; see `traces`."""
    return [trace.problem for trace in traces(path, limit)]


def _parse(line: str, where: str) -> Trace:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: malformed JSON: {error}") from error
    worked, mark, number = str(row.get("answer", "")).rpartition("####")
    if not mark or "question" not in row:
        raise UserError(f"{where}: needs a question, and an answer with '#### number'.")
    answer = number.strip().replace(",", "")
    solution = f"The answer is \\boxed{{{answer}}}."
    explanation = _CALCULATION.sub("", worked).strip()
    return Trace(Problem(row["question"], solution, answer), explanation)
