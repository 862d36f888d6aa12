"""Problems and traces from JSON Lines, JSON, CSV and Parquet files.

A record has either plain columns or one conversation:

    {"question": q, "solution": s, "reasoning_trace": z, "answer": a}
    {"conversations": [{"from": "user", "value": q}, {"from": "assistant", "value":
      <thought> z </thought> delimiter <solution> s </solution>}], "answer": a}

`prompt` can be used for `question`, and `role` and `content` for `from` and `value`.
`reasoning_trace` is required for traces, `answer` is optional. Null values count as
missing, other columns are ignored, and of a record with a conversation only that and
`answer` are read. Texts are not changed: in a conversation, they are all that is between
the tags, including whitespace.
"""

import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

from rlt_jax.data.tables import read_records, shown
from rlt_jax.data.templates import Template
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Record, Trace

COLUMNS = (
    *("question", "prompt", "solution", "reasoning_trace", "answer"),
    *("conversations", "completions", "closed"),
)
_LOG = logging.getLogger("rlt_jax")
USER = ("user", "human")
ASSISTANT = ("assistant", "gpt")


def read_traces(
    path: str, template: Template, limit: int | None = None, keep_cut_off: bool = False
) -> list[Trace]:
    """Reads traces, without those that were cut off (`closed` is false).

    Args:
      path: files, see `tables.read_records`.
      template: template whose tags separate the parts of a conversation.
      limit: maximum number of records to read.
      keep_cut_off: whether to keep traces that were cut off.

    Raises:
      UserError: see `tables.read_records`; or a record has no question, solution or trace.
    """
    records = list(itertools.islice(read_records(path, columns=COLUMNS), limit))
    kept = [item for item in records if keep_cut_off or not _was_cut_off(item[1])]
    if not kept:
        raise UserError(
            f"{path}: all {len(records)} traces were cut off (`closed` is false). Collect "
            "them with a larger sampling.max_new_tokens, or train on them with "
            "data.keep_cut_off=True."
        )
    total = len(records)
    if cut := total - len(kept):
        _LOG.warning(
            "%s: skipped %d of %d traces, which were cut off", path, cut, total
        )
    return [_trace(where, record, template) for where, record in kept]


def read_problems(
    path: str, template: Template, limit: int | None = None
) -> list[Problem]:
    """Reads problems from the same files as `read_traces`.

    If a record has an answer but no solution, the answer is used as the solution.

    Raises:
      UserError: see `tables.read_records`; or a record has no question or solution.
    """
    problems = []
    for where, record in itertools.islice(read_records(path, columns=COLUMNS), limit):
        answer = _answer(where, record.get("answer"))
        if record.get("solution") is None and answer is not None:
            record = record | {"solution": answer}
        problems.append(_problem(where, record, template))
    return problems


def read_completions(
    path: str, template: Template
) -> Iterator[tuple[str, Problem, list[str]]]:
    """Reads problems with completions to score, one record at a time.

    Args:
      path: see `read_traces`.
      template: see `read_traces`.

    Yields:
      The file and line of the record, its problem, and its `completions`; for a trace
      without `completions`, its explanation is the only completion.

    Raises:
      UserError: see `read_problems`; or `completions` is not a list of texts.
    """
    for where, record in read_records(path, columns=COLUMNS):
        completions = record.get("completions")
        if completions is None:
            trace = _trace(where, record, template)
            # As in the student sequence: padded, and closed unless it was cut off.
            text = template.body(trace.explanation).removeprefix(template.pad)
            if not _was_cut_off(record):
                text += template.explanation_tags[1]
            completions = [text]
        if not isinstance(completions, list) or not all(
            isinstance(text, str) for text in completions
        ):
            raise UserError(
                f"{where}: completions is {shown(completions)}; it must be a list of "
                "strings."
            )
        yield where, _problem(where, record, template), completions


def _was_cut_off(record: Record) -> bool:
    return record.get("closed") is False  # written by `collect`


def _trace(where: str, record: Record, template: Template) -> Trace:
    if record.get("conversations") is None:
        explanation = _text(where, record, "reasoning_trace")
    else:
        _, reply = _turns(where, record["conversations"])
        explanation = _body(where, reply, template.thought_tags)
    return Trace(_problem(where, record, template), explanation)


def _problem(where: str, record: Record, template: Template) -> Problem:
    if record.get("conversations") is None:
        question = _text(where, record, "question", "prompt")
        solution = _text(where, record, "solution")
    else:
        question, reply = _turns(where, record["conversations"])
        # A thought may quote the solution tags, so the search starts after it.
        _, closed, after = reply.partition(template.thought_tags[1])
        solution = _body(where, after if closed else reply, template.solution_tags)
    if not question.strip():
        raise UserError(f"{where}: the question is empty; remove the record.")
    return Problem(question, solution, _answer(where, record.get("answer")))


def _turns(where: str, turns: Any) -> tuple[str, str]:
    """The texts of the user's and the assistant's turn."""
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise UserError(
            f"{where}: conversations is {shown(turns)}; it must be a list of turns, each "
            "an object with from and value (or role and content)."
        )
    roles, texts = [], []
    for number, turn in enumerate(turns, 1):
        where_turn = f"{where}, turn {number}"
        role = _text(where_turn, turn, "from", "role")
        if role != "system":
            roles.append(role)
            texts.append(_text(where_turn, turn, "value", "content"))
    if len(roles) != 2 or roles[0] not in USER or roles[1] not in ASSISTANT:
        raise UserError(
            f"{where}: the roles in conversations are {roles}; there must be one turn of "
            f"{' or '.join(USER)}, then one of {' or '.join(ASSISTANT)}."
        )
    return texts[0], texts[1]


def _body(where: str, reply: str, tags: tuple[str, str]) -> str:
    """The text between the first opening tag and the next closing tag."""
    _, opened, rest = reply.partition(tags[0])
    body, closed, _ = rest.partition(tags[1])
    if not closed:
        raise UserError(
            f"{where}: {tags[1] if opened else tags[0]} is missing in the assistant's "
            "turn, or in the wrong place; it must have the thought, then the solution, "
            f"each between its tags (here {tags[0]} and {tags[1]}). If the data has other "
            "tags, use a template with these tags."
        )
    return body


def _text(where: str, values: Record, *names: str) -> str:
    """The value of the first of the names that has one."""
    name = next((name for name in names if values.get(name) is not None), None)
    if name is None:
        raise UserError(
            f"{where}: {' or '.join(names)} is missing; the keys are "
            f"{', '.join(values) or 'none'}. A record has question (or prompt) and "
            "solution, for traces also reasoning_trace, optionally answer and "
            "completions; or conversations, turns with from and value (or role and "
            "content)."
        )
    if not isinstance(values[name], str):
        raise UserError(
            f"{where}: {name} is {shown(values[name])}; it must be a string."
        )
    return values[name]


def _answer(where: str, answer: Any) -> str | None:
    if answer is None or isinstance(answer, str):
        return answer
    # A bool is an int in Python, and some files have NaN for a missing number.
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if not is_number or math.isnan(answer):
        raise UserError(
            f"{where}: answer is {shown(answer)}; it must be a string, a number or null."
        )
    return str(answer)
