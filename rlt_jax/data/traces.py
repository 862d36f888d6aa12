"""Problems and traces from JSON Lines, JSON, CSV and Parquet files.

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

import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

from rlt_jax.data.tables import read_rows, shown
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
    "closed",
)
_LOG = logging.getLogger("rlt_jax")
USER = ("user", "human")
ASSISTANT = ("assistant", "gpt")


def read_traces(
    path: str,
    template: Template,
    limit: int | None = None,
    keep_cut_off: bool = False,
) -> list[Trace]:
    """Reads traces in order; those with `closed` false were cut off, and are left out.

    Args:
      path: files as of `tables.read_rows`.
      template: its tags divide the assistant's turn of a conversation.
      limit: read no more than this many.
      keep_cut_off: do not leave them out.

    Raises:
      UserError: as of `tables.read_rows`, or a row without a question, a solution or a
        trace.
    """
    rows = list(itertools.islice(read_rows(path, columns=COLUMNS), limit))
    whole = [
        (where, row) for where, row in rows if keep_cut_off or not _was_cut_off(row)
    ]
    if not whole:
        raise UserError(
            f"{path}: all {len(rows)} traces were cut off before their end (`closed` is "
            "false). Collect them with a larger sampling.max_new_tokens, or learn from "
            "them all the same with data.keep_cut_off=True."
        )
    if len(whole) < len(rows):
        cut = len(rows) - len(whole)
        _LOG.warning("%s: %d of %d traces were cut off, left out", path, cut, len(rows))
    return [_trace(where, row, template) for where, row in whole]


def read_problems(
    path: str, template: Template, limit: int | None = None
) -> list[Problem]:
    """Reads the problems of the same files as `read_traces`; traces are ignored.

    A row with an answer needs no solution: the answer is one.

    Raises:
      UserError: as `read_traces`, but a row needs no trace.
    """
    rows = itertools.islice(read_rows(path, columns=COLUMNS), limit)
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
    for where, row in read_rows(path, columns=COLUMNS):
        completions = row.get("completions")
        if completions is None:
            trace = _trace(where, row, template)
            # As a student is trained on it: padded, and closed unless it was cut off.
            text = template.body(trace.explanation).removeprefix(template.pad)
            if not _was_cut_off(row):
                text += template.explanation_tags[1]
            completions = [text]
        if not isinstance(completions, list) or not all(
            isinstance(text, str) for text in completions
        ):
            raise UserError(
                f"{where}: completions is {shown(completions)}; write a list of texts."
            )
        yield where, _problem(where, row, template), completions


def _was_cut_off(row: dict[str, Any]) -> bool:
    """`collect` says so; rows from elsewhere are whole unless they do, too."""
    return row.get("closed") is False


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
            f"{where}: conversations is {shown(turns)}, not a list of turns; write an "
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
            f"{where}: {name} is {shown(values[name])}, not text; write a string."
        )
    return values[name]


def _answer(where: str, answer: Any) -> str | None:
    if answer is None or isinstance(answer, str):
        return answer
    # A bool is an int in Python, and some writers store NaN for a missing number.
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if not is_number or math.isnan(answer):
        raise UserError(
            f"{where}: answer is {shown(answer)}; write text, a number or null."
        )
    return str(answer)
