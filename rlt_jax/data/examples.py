"""Rows of token ids made from problems and traces, with the spans inside them.

The same `student_row` makes the rows a student is trained on and the rows the reward
scores, so the reward sees exactly what a student will learn from.

A token belongs to a span when its characters lie wholly inside the span's text. With
the text "<t>3+4=7</t>" tokenised as `<t>`, `3`, `+`, `4`, `=`, `7</`, `t>`, the span of
"3+4=7" holds the tokens `3 + 4 =`: the last one also covers part of the closing tag.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlt_jax.data.templates import Problem, Template, Trace
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError


class Span(NamedTuple):
    """Tokens `start` to `end` of a row, and the characters they cover.

    Attributes:
      start: index of the first token.
      end: index after the last token; equal to start when the span is empty.
      offsets: [end - start, 2] int32 characters, counted from the start of the text.
    """

    start: int
    end: int
    offsets: np.ndarray


EMPTY = Span(0, 0, np.zeros((0, 2), np.int32))


class Row(NamedTuple):
    """One unpacked row.

    Attributes:
      tokens: [T] int32.
      loss_mask: [T] bool, the tokens a model learns or has sampled.
      explanation: tokens of the explanation.
      solution: tokens of the solution; empty in teacher rows.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    explanation: Span
    solution: Span


def find_span(offsets: np.ndarray, start: int, end: int) -> Span:
    """Tokens whose characters lie wholly in [start, end), empty tokens left out."""
    inside = (
        (offsets[:, 0] >= start)
        & (offsets[:, 1] <= end)
        & (offsets[:, 1] > offsets[:, 0])
    )
    places = np.flatnonzero(inside)
    if not places.size:
        return EMPTY
    first, last = int(places[0]), int(places[-1]) + 1
    return Span(first, last, offsets[first:last] - start)


def align(left: Span, right: Span) -> tuple[np.ndarray, np.ndarray]:
    """Finest common segmentation of two tokenisations of one text.

    Args:
      left: span in one row.
      right: span of the same text in another row.

    Returns:
      For each token of left and of right the segment it belongs to, -1 for tokens at
      the borders that the other row has no counterpart of.

        left  |ab|c|d|    cuts 0 2 3 4     common cuts 0 3 4
        right |a|bc|d|    cuts 0 1 3 4     segments 0 0 1 and 0 0 1
    """
    if not len(left.offsets) or not len(right.offsets):
        return _no_segment(left), _no_segment(right)
    if np.array_equal(left.offsets, right.offsets):
        same = np.arange(len(left.offsets), dtype=np.int32)
        return same, same
    cuts = np.intersect1d(_cuts(left.offsets), _cuts(right.offsets))
    return _segments(left.offsets, cuts), _segments(right.offsets, cuts)


def _no_segment(span: Span) -> np.ndarray:
    return np.full(len(span.offsets), -1, np.int32)


def _cuts(offsets: np.ndarray) -> np.ndarray:
    return np.append(offsets[:, 0], offsets[-1, 1])


def _segments(offsets: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    segment = np.searchsorted(cuts, offsets[:, 0], side="right") - 1
    inside = (segment >= 0) & (segment < len(cuts) - 1)
    return np.where(inside, segment, -1).astype(np.int32)


def student_prompt(tokenizer: Tokenizer, template: Template, question: str) -> str:
    """The chat up to where the student's thought begins."""
    return tokenizer.render(template.student_messages(question))


def teacher_prompt(tokenizer: Tokenizer, template: Template, problem: Problem) -> str:
    """The chat up to where the teacher goes on: solution and opening tag included."""
    chat = tokenizer.render(template.teacher_messages(problem))
    return chat + template.teacher_prefix(problem)


def student_row(tokenizer: Tokenizer, template: Template, trace: Trace) -> Row:
    """Canonical row of a trace as a student sees it: thought, then solution.

    Args:
      tokenizer: the student's.
      template: system prompt, tags, delimiter.
      trace: question, explanation, solution.

    Returns:
      The row; `loss_mask` covers the student's whole turn with its end.
    """
    prompt = student_prompt(tokenizer, template, trace.problem.question)
    turn = template.student_turn(trace)
    tokens, offsets = tokenizer.encode(prompt + turn + tokenizer.eos)
    thought_start = len(prompt) + len(template.thought_tags[0])
    thought_end = thought_start + len(template.body(trace.explanation))
    solution_end = len(prompt) + len(turn) - len(template.solution_tags[1])
    solution_start = solution_end - len(trace.problem.solution)
    return Row(
        tokens,
        offsets[:, 0] >= len(prompt),
        find_span(offsets, thought_start, thought_end),
        find_span(offsets, solution_start, solution_end),
    )


def teacher_row(tokenizer: Tokenizer, template: Template, trace: Trace) -> Row:
    """Canonical row of a trace as a teacher would have written it.

    `loss_mask` covers what the teacher writes: the explanation after its opening tag,
    the closing tag and the end of the turn.
    """
    body = template.body(trace.explanation)[len(template.pad) :]
    ending = template.explanation_tags[1] + tokenizer.eos
    written = tokenizer.encode(body + ending).ids
    return sampled_teacher_row(tokenizer, template, trace.problem, written)


def sampled_teacher_row(
    tokenizer: Tokenizer, template: Template, problem: Problem, completion: np.ndarray
) -> Row:
    """Row of a problem and a completion that keeps the sampled ids.

    Args:
      tokenizer: the teacher's.
      template: system prompt, tags, delimiter.
      problem: question and solution.
      completion: [T] int32 ids after the prompt, the stop token included.

    Returns:
      The row; `loss_mask` covers the completion.
    """
    prompt = teacher_prompt(tokenizer, template, problem)
    prompt_tokens, prompt_offsets = tokenizer.encode(prompt)
    text, offsets = completion_text(tokenizer, completion)
    body, _ = template.explanation_of(text)
    tokens = np.concatenate([prompt_tokens, completion]).astype(np.int32)
    offsets = np.concatenate([prompt_offsets, offsets + len(prompt)])
    start = len(prompt) - len(template.pad)
    return Row(
        tokens,
        np.arange(len(tokens)) >= len(prompt_tokens),
        find_span(offsets, start, start + len(body)),
        EMPTY,
    )


def written_teacher_row(
    tokenizer: Tokenizer, template: Template, problem: Problem, completion: str
) -> Row:
    """Canonical row of a problem and a completion of which only the text is known.

    Prompt and completion are encoded as one text. A missing closing tag is added, so
    that the last token of the explanation is the same as in a closed one.
    """
    prompt = teacher_prompt(tokenizer, template, problem)
    body, closed = template.explanation_of(completion)
    ending = "" if closed else template.explanation_tags[1]
    tokens, offsets = tokenizer.encode(prompt + completion + ending + tokenizer.eos)
    start = len(prompt) - len(template.pad)
    return Row(
        tokens,
        offsets[:, 0] >= len(prompt),
        find_span(offsets, start, start + len(body)),
        EMPTY,
    )


def completion_text(
    tokenizer: Tokenizer, completion: np.ndarray
) -> tuple[str, np.ndarray]:
    """Text of a completion without its stop token, and offsets [T, 2] of all ids."""
    stopped = len(completion) > 0 and int(completion[-1]) in tokenizer.stop_ids
    text, offsets = tokenizer.decode_with_offsets(completion[: -1 if stopped else None])
    if stopped:
        end = np.full((1, 2), len(text), np.int32)
        offsets = np.concatenate([offsets, end])
    return text, offsets


def trace_of(
    tokenizer: Tokenizer, template: Template, problem: Problem, completion: np.ndarray
) -> tuple[Trace, bool]:
    """The trace that a completion makes of a problem, and whether it is closed."""
    text, _ = completion_text(tokenizer, completion)
    body, closed = template.explanation_of(text)
    return Trace(problem, body), closed


def check_lengths(rows: Sequence[np.ndarray], limit: int, what: str) -> None:
    """Refuses rows that do not fit.

    Args:
      rows: token ids, [T] each.
      limit: longest allowed length.
      what: names the rows and the limit's setting in the message.

    Raises:
      UserError: with the number of the first such row and its length.
    """
    for number, row in enumerate(rows):
        if len(row) > limit:
            count = sum(len(other) > limit for other in rows)
            raise UserError(
                f"{what}: row {number} has {len(row)} tokens, the limit is {limit} "
                f"({count} of {len(rows)} rows are longer). Raise the limit or "
                "drop the row."
            )
