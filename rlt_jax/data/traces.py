"""Problems and traces from JSON Lines, JSON, CSV and Parquet files.

A record has plain columns, or one conversation in a list of messages:

    {"question": q, "solution": s, "reasoning_trace": z, "answer": a}
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content":
      <thought> z </thought> delimiter <solution> s </solution>}], "answer": a}
    {"prompt": [{"role": "user", "content": q}], "reward_model": {"ground_truth": a}}

`prompt` can be a text, too, for `question`. `conversations` can be used for `messages`,
and `from` and `value` for `role` and `content`. The last user's message is the question,
turns before it are its history, and system messages are left out, as the template has its
own. An assistant's last message without any tags is the solution as a whole. Of a record
whose conversation ends with an assistant's message only that and `answer` are read. In CSV
files lists and objects are JSON texts.

`reasoning_trace` is required for traces, unless `missing_trace="solution"` says that the
solution's own working is the explanation; `answer` is optional. Null values count as
missing, other columns are ignored. Texts are not changed: in a conversation, they are all
that is between the tags, including whitespace.

A row that is none of these, or no row of its format at all, is an error with its file and
line, or is left out and counted with `on_bad_row="skip"`.
"""

import dataclasses
import reprlib
from collections.abc import Iterator
from typing import Annotated, Any

from rlt_jax.data.formats import parse_json, shown
from rlt_jax.data.tables import OnBadRow, as_text, convert, listed, read_records
from rlt_jax.data.templates import Template
from rlt_jax.errors import LOG, UserError
from rlt_jax.ranges import Checked, Limit, OneOf
from rlt_jax.records import Problem, Record, Trace

CONVERSATIONS = ("messages", "conversations", "prompt")
TEXTS = ("question", "solution", "reasoning_trace", "answer")
COLUMNS = (*TEXTS, "reward_model", "completions", "closed", *CONVERSATIONS)
CLOSED = {True: True, False: False, "true": True, "false": False, "": True, None: True}
USER = ("user", "human")
ASSISTANT = ("assistant", "gpt")
ROLES = dict.fromkeys(USER, "user") | dict.fromkeys(ASSISTANT, "assistant")


def read_traces(
    path: str,
    template: Template,
    limit: Limit = None,
    keep_cut_off: bool = False,
    missing_trace: Annotated[str, OneOf(("error", "solution"))] = "error",
    on_bad_row: OnBadRow = "error",
) -> list[Trace]:
    """Reads traces, without those that were cut off (`closed` is false).

    Args:
      path: files, see `tables.read_records`.
      template: template whose tags separate the parts of a conversation.
      limit: maximum number of rows to read, with those that are left out.
      keep_cut_off: whether to keep traces that were cut off.
      missing_trace: what a record without reasoning_trace is: an "error", or a trace whose
        explanation is the "solution", which then has to show its working.
      on_bad_row: whether a bad row is an "error" or "skip" leaves it out, see
        `tables.read_records`.

    Raises:
      UserError: see `tables.read_records`; or a record has no question, solution or trace.
    """

    def make(where: str, record: Record) -> Trace | None:
        if not keep_cut_off and _was_cut_off(where, record):
            return None
        return _trace(where, record, template, missing_trace == "solution")

    found = list(convert(read_records(path, "", COLUMNS), make, limit, on_bad_row))
    kept = [trace for trace in found if trace is not None]
    if not kept:
        raise UserError(
            f"{path}: all {len(found)} traces were cut off (`closed` is false). Collect "
            "them with a larger sampling.max_new_tokens, or train on them with "
            "data.keep_cut_off=True."
        )
    if cut := len(found) - len(kept):
        LOG.warning("%s: skipped %d of %d traces, cut off", path, cut, len(found))
    return kept


def read_problems(
    path: str,
    template: Template,
    limit: Limit = None,
    grader: str = "math",
    on_bad_row: OnBadRow = "error",
) -> list[Problem]:
    """Reads problems from the same files as `read_traces`.

    If a record has an answer but no solution, the answer is used as the solution.

    Raises:
      UserError: see `tables.read_records`; or a record has no question or solution.
    """

    def make(where: str, record: Record) -> Problem:
        return _problem(where, record, template)._replace(grader=grader)

    return list(convert(read_records(path, "", COLUMNS), make, limit, on_bad_row))


@dataclasses.dataclass(frozen=True)
class CompletionsConfig(Checked):
    """Where completions are; see `read_completions`."""

    path: str
    on_bad_row: OnBadRow = "error"


def read_completions(
    path: str, template: Template, on_bad_row: OnBadRow = "error"
) -> Iterator[tuple[Problem, list[str]]]:
    """Reads problems with completions to score, one record at a time.

    Args:
      path: see `read_traces`.
      template: see `read_traces`.
      on_bad_row: see `read_traces`.

    Yields:
      The problem of a record and its `completions`; for a trace without `completions`, its
      explanation is the only completion.

    Raises:
      UserError: see `read_problems`; or `completions` is not a list of texts.
    """

    def make(where: str, record: Record) -> tuple[Problem, list[str]]:
        completions = _parsed(where, record, "completions")
        if completions is None:
            trace = _trace(where, record, template)
            # As in the student sequence: padded, and closed unless it was cut off.
            closed = not _was_cut_off(where, record)
            completions = [template.teacher_turn(trace.explanation, closed)]
        texts = completions if isinstance(completions, list) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}: completions is {shown(completions)}; give a list of texts."
            )
        return _problem(where, record, template), completions

    return convert(read_records(path, columns=COLUMNS), make, None, on_bad_row)


def _was_cut_off(where: str, record: Record) -> bool:
    """Whether `closed`, as `collect` writes it, is false; CSV has it as a text."""
    closed = record.get("closed")
    key = closed.strip().lower() if isinstance(closed, str) else closed
    if isinstance(key, list | dict) or key not in CLOSED:
        raise UserError(f"{where}: closed is {shown(closed)}; write true or false.")
    return not CLOSED[key]


def _trace(
    where: str, record: Record, template: Template, from_solution: bool = False
) -> Trace:
    problem = _problem(where, record, template)
    _, reply = _turns(where, record)
    tagged = reply is not None and any(tag in reply for tag in template.thought_tags)
    if not tagged and record.get("reasoning_trace") is None and from_solution:
        return Trace(problem, problem.solution)
    if reply is None or not tagged and record.get("reasoning_trace") is not None:
        return Trace(problem, _text(where, record, "reasoning_trace"))
    return Trace(problem, _body(where, reply, template.thought_tags))


def _problem(where: str, record: Record, template: Template) -> Problem:
    turns, reply = _turns(where, record)
    answer = _answer(where, record)
    question = turns[-1][1] if turns else _text(where, record, "question", "prompt")
    if reply is not None:
        # A thought may quote the solution tags, so the search starts after it.
        _, closed, after = reply.partition(template.thought_tags[1])
        tags = (*template.thought_tags, *template.solution_tags)
        solution = reply
        if any(tag in reply for tag in tags):
            solution = _body(where, after if closed else reply, template.solution_tags)
    elif record.get("solution") is None and answer is not None:
        solution = answer
    else:
        solution = _text(where, record, "solution")
    if not question.strip():
        raise UserError(f"{where}: the question is empty; remove the record.")
    return Problem(question, solution, answer, history=tuple(turns[:-1]))


def _turns(where: str, record: Record) -> tuple[list[tuple[str, str]], str | None]:
    """Turns of a record's conversation: up to the last user's, and the reply to it.

    There are no turns in a record of plain columns, and perhaps no reply.
    """
    found = ((name, _parsed(where, record, name)) for name in CONVERSATIONS)
    given = ((n, x) for n, x in found if x is not None and not isinstance(x, str))
    name, turns = next(given, ("", []))
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise UserError(
            f"{where}: {name} is {shown(turns)}; it must be a list of turns, each an "
            "object with role and content (or from and value)."
        )
    read = []
    for number, turn in enumerate(turns, 1):
        where_turn = f"{where}, turn {number}"
        role = _text(where_turn, turn, "role", "from")
        if role != "system":
            text = _text(where_turn, turn, "content", "value")
            read.append((ROLES.get(role, role), text))
    roles = [role for role, _ in read]
    reply = read.pop()[1] if roles[-1:] == ["assistant"] else None
    in_turn = roles == (["user", "assistant"] * len(roles))[: len(roles)]
    if name and not (read and in_turn):
        raise UserError(
            f"{where}: the roles in {name} are {reprlib.repr(roles)}; there must be turns of "
            f"{' or '.join(USER)} and {' or '.join(ASSISTANT)}, one after the other, the "
            "user's first."
        )
    return read, reply


def _parsed(where: str, record: Record, name: str) -> Any:
    """The value of a column; JSON in a CSV file is parsed."""
    value = record.get(name)
    if not isinstance(value, str) or (name == "prompt" and value.lstrip()[:2] != "[{"):
        return value
    try:
        return parse_json(value)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: {name} is {shown(value)}; it must be a list, in a CSV file as JSON "
            f"({error})."
        ) from error


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
            f"{listed(values) or 'none'}. A record has question (or prompt) and "
            "solution, for traces also reasoning_trace, optionally answer and "
            "completions; or messages, turns with role and content."
        )
    text = values[name]
    if not isinstance(text, str):
        raise UserError(f"{where}: {name} is {shown(text)}; it must be a string.")
    return text


def _answer(where: str, record: Record) -> str | None:
    """`answer`, or the ground truth of data sets for RL."""
    model, answer = _parsed(where, record, "reward_model"), record.get("answer")
    if answer is None and isinstance(model, dict):
        answer = model.get("ground_truth")
    return None if answer is None else as_text(where, "answer", answer)
