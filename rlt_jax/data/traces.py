"""Problems and traces from JSON Lines and Parquet files.

A row holds either plain columns or one conversation:

    {"question": q, "solution": s, "reasoning_trace": z, "answer": a}
    {"conversations": [{"from": "user", "value": q}, {"from": "assistant", "value":
      <thought> z </thought> delimiter <solution> s </solution>}], "answer": a}

`prompt` is another name for `question`, `role` and `content` for `from` and `value`.
Traces need `reasoning_trace`; nothing needs `answer`. A null is an absent value, other
columns are ignored, and a row with a conversation is read from that alone (and its
`answer`). Texts are kept verbatim: those of a conversation are bodies, whitespace next
to the tags included.
"""

import glob
import itertools
import json
import math
import os.path
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlt_jax.data.templates import Problem, Template, Trace
from rlt_jax.errors import UserError

COLUMNS = (
    "question",
    "prompt",
    "solution",
    "reasoning_trace",
    "answer",
    "conversations",
    "completions",
)
USER = ("user", "human")
ASSISTANT = ("assistant", "gpt")


def read_traces(path: str, template: Template, limit: int | None = None) -> list[Trace]:
    """Reads the traces of a file, of a directory's files, or of a glob's, in order.

    Args:
      path: a .jsonl, .json (one object a line) or .parquet file, a directory that holds
        such files, or a glob pattern.
      template: its tags divide the assistant's turn of a conversation.
      limit: read no more than this many.

    Raises:
      UserError: no such file, one that cannot be read or is empty, or a row without a
        question, a solution or a trace; the message names the file and line or row.
    """
    rows = itertools.islice(_rows(path), limit)
    return [_trace(where, row, template) for where, row in rows]


def read_problems(
    path: str, template: Template, limit: int | None = None
) -> list[Problem]:
    """Reads the problems of the same files as `read_traces`; traces are ignored.

    A row with an answer needs no solution: the answer is one.

    Raises:
      UserError: as `read_traces`, but a row needs no trace.
    """
    rows = itertools.islice(_rows(path), limit)
    return [
        _problem(where, _with_solution(where, row), template) for where, row in rows
    ]


def _with_solution(where: str, row: dict[str, Any]) -> dict[str, Any]:
    answer = _answer(where, row.get("answer"))
    if row.get("solution") is not None or answer is None:
        return row
    return row | {"solution": answer}


def read_completions(
    path: str, template: Template
) -> Iterator[tuple[str, Problem, list[str]]]:
    """Reads problems with completions to score, one row at a time.

    Args:
      path: as for `read_traces`.
      template: as for `read_traces`.

    Yields:
      Where the row stands, its problem, and the texts under `completions`; of a trace
      without them its explanation, as the only one.

    Raises:
      UserError: as `read_problems`, or `completions` is not a list of texts.
    """
    for where, row in _rows(path):
        completions = row.get("completions")
        if completions is None:
            completions = [_trace(where, row, template).explanation]
        if not isinstance(completions, list) or not all(
            isinstance(text, str) for text in completions
        ):
            raise UserError(
                f"{where}: completions is {_shown(completions)}; write a list of texts."
            )
        yield where, _problem(where, row, template), completions


def _trace(where: str, row: dict[str, Any], template: Template) -> Trace:
    if row.get("conversations") is None:
        explanation = _text(where, row, "reasoning_trace")
    else:
        _, reply = _exchange(where, row["conversations"])
        explanation = _body(where, reply, template.thought_tags)
    return Trace(_problem(where, row, template), explanation)


def _problem(where: str, row: dict[str, Any], template: Template) -> Problem:
    if row.get("conversations") is None:
        question = _text(where, row, "question", "prompt")
        solution = _text(where, row, "solution")
    else:
        question, reply = _exchange(where, row["conversations"])
        # A thought may quote the solution's tags, so the solution is sought after it.
        _, closed, after = reply.partition(template.thought_tags[1])
        solution = _body(where, after if closed else reply, template.solution_tags)
    if not question.strip():
        raise UserError(f"{where}: the question is empty; write one or drop the row.")
    return Problem(question, solution, _answer(where, row.get("answer")))


def _exchange(where: str, turns: Any) -> tuple[str, str]:
    """Texts of the user's and the assistant's turn."""
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise UserError(
            f"{where}: conversations is {_shown(turns)}, not a list of turns; write an "
            "object with from and value (or role and content) for each turn."
        )
    roles, texts = [], []
    for number, turn in enumerate(turns, 1):
        place = f"{where}, turn {number}"
        role = _text(place, turn, "from", "role")
        if role != "system":
            roles.append(role)
            texts.append(_text(place, turn, "value", "content"))
    if len(roles) != 2 or roles[0] not in USER or roles[1] not in ASSISTANT:
        raise UserError(
            f"{where}: the roles in conversations are {roles}; give one turn of "
            f"{' or '.join(USER)}, then one of {' or '.join(ASSISTANT)}."
        )
    return texts[0], texts[1]


def _body(where: str, reply: str, tags: tuple[str, str]) -> str:
    """Text from the first opening tag to the closing tag after it."""
    _, opened, rest = reply.partition(tags[0])
    body, closed, _ = rest.partition(tags[1])
    if not closed:
        raise UserError(
            f"{where}: the assistant's turn has no {tags[1] if opened else tags[0]} in "
            f"its place; write the thought, then the solution, each between its tags "
            f"(here {tags[0]} and {tags[1]}), or name the template with the tags used."
        )
    return body


def _text(where: str, values: dict[str, Any], *names: str) -> str:
    """The value under the first of the names that has one."""
    name = next((name for name in names if values.get(name) is not None), None)
    if name is None:
        raise UserError(
            f"{where}: no value for {' or '.join(names)}; found "
            f"{', '.join(values) or 'nothing'}. Rows hold question (or prompt), "
            "solution, for traces reasoning_trace, to score it or completions, and "
            "perhaps answer; or "
            "conversations: turns with from and value (or role and content)."
        )
    if not isinstance(values[name], str):
        raise UserError(
            f"{where}: {name} is {_shown(values[name])}, not text; write a string."
        )
    return values[name]


def _answer(where: str, answer: Any) -> str | None:
    if answer is None or isinstance(answer, str):
        return answer
    # A bool is an int in Python, and some writers store NaN for a missing number.
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if not is_number or math.isnan(answer):
        raise UserError(
            f"{where}: answer is {_shown(answer)}; write text, a number or null."
        )
    return str(answer)


def _shown(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of the files, and where it stands."""
    for file in _files(path):
        count = 0
        for count, (where, row) in enumerate(_READERS[file.suffix](file), 1):
            if not isinstance(row, dict):
                raise UserError(
                    f"{where}: the row is {_shown(row)}, not an object; write one JSON "
                    "object a line."
                )
            yield where, row
        if not count:
            raise UserError(f"{file}: the file has no rows; fill it or leave it out.")


def _files(path: str) -> list[Path]:
    endings = ", ".join(_READERS)
    if os.path.isdir(path):
        inside = (f for f in Path(path).iterdir() if f.suffix in _READERS)
        files = sorted(f for f in inside if f.is_file())
        if not files:
            raise UserError(f"{path}: no file in it ends in {endings}; add one.")
        return files
    names = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    files = sorted(Path(name) for name in names if os.path.isfile(name))
    if not files:
        raise UserError(
            f"{path!r}: no such file or directory, and as a pattern it matches none; "
            f"name a file that ends in {endings}, a directory of them, or a glob."
        )
    for file in files:
        if file.suffix not in _READERS:
            raise UserError(
                f"{file}: unknown ending {file.suffix!r}; convert to one of {endings}."
            )
    return files


def _read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise UserError(
                    f"{where}: not valid JSON: {error}. Write one JSON object a line, "
                    "each on a single line."
                ) from error
            yield where, row


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            # Other columns may be large, or of types that Python has no value for.
            wanted = [name for name in names if name in COLUMNS]
            batches = table.iter_batches(columns=wanted)
            rows = [row for batch in batches for row in batch.to_pylist()]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not a readable Parquet file: {error}. Write or download it again."
        ) from error
    for number, row in enumerate(rows, 1):
        # The names of all columns, so that a message can list what was found.
        yield f"{file}, row {number}", dict.fromkeys(names) | row


_READERS = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".parquet": _read_parquet}
