"""From problems and completions to the packed rows that the reward scores."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlt_jax.data import examples, packing
from rlt_jax.data.templates import Problem, Template, Trace
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.types import PackedRows, ScoringBatch, TokenSpans


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Fixed shape of packed rows.

    Attributes:
      micro_batch_size: packed rows computed at once.
      row_length: tokens per packed row, and the longest single row.
    """

    micro_batch_size: int
    row_length: int


class WrittenTrace(NamedTuple):
    """A completion as text, and the trace it makes."""

    completion: str
    trace: Trace
    closed: bool


def scoring_batch(
    teacher: Tokenizer,
    student: Tokenizer,
    template: Template,
    shape: RowShape,
    problems: Sequence[Problem],
    completions: Sequence[np.ndarray],
) -> tuple[ScoringBatch, int]:
    """Student rows, teacher rows, and the spans the reward reads.

    The student row is the canonical encoding of the student text; the teacher row keeps
    the sampled ids; explanation tokens of both are aligned on their finest common
    segmentation. Text that grows in the student's encoding past `row_length` (bytes that
    are no UTF-8, as an untrained model writes them, do) counts as an empty explanation.

    Args:
      teacher: tokenizer of the policy.
      student: tokenizer of the student.
      template: tags and system prompts.
      shape: of the packed rows.
      problems: N problems.
      completions: N completions, ids up to and including the stop token.

    Returns:
      The batch, and how many completions were too long for the student.
    """
    student_rows, teacher_rows, closed, overlong = [], [], [], 0
    for problem, completion in zip(problems, completions, strict=True):
        trace, ended = examples.trace_of(teacher, template, problem, completion)
        row = examples.student_row(student, template, trace)
        if len(row.tokens) > shape.row_length:
            empty = trace._replace(explanation="")
            row = examples.student_row(student, template, empty)
            row = row._replace(explanation=examples.EMPTY)
            overlong += 1
        student_rows.append(row)
        teacher_rows.append(
            examples.sampled_teacher_row(teacher, template, problem, completion)
        )
        closed.append(ended)
    return batch_of_rows(shape, student_rows, teacher_rows, np.array(closed)), overlong


def sampled_rows(
    shape: RowShape, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]
) -> tuple[PackedRows, TokenSpans]:
    """Packed rows of N prompts with their completions, and where the completions lie."""
    rows = [np.append(p, c) for p, c in zip(prompts, completions, strict=True)]
    packed, starts = packing.pack(rows, shape.micro_batch_size, shape.row_length)
    first = starts + np.array([len(prompt) for prompt in prompts])
    numbers = [np.arange(len(completion)) for completion in completions]
    return packed, packing.gather_spans(first, numbers, shape.row_length)


def batch_of_rows(
    shape: RowShape,
    student_rows: list[examples.Row],
    teacher_rows: list[examples.Row],
    closed: np.ndarray,
) -> ScoringBatch:
    """Packs student and teacher rows of N completions and finds their spans."""
    size, width = shape.micro_batch_size, shape.row_length
    (student, student_starts), (teacher, teacher_starts) = (
        packing.pack([row.tokens for row in rows], size, width)
        for rows in (student_rows, teacher_rows)
    )
    pairs = [
        examples.align(s.explanation, t.explanation)
        for s, t in zip(student_rows, teacher_rows, strict=True)
    ]
    solutions = [np.arange(r.solution.end - r.solution.start) for r in student_rows]
    written = [np.flatnonzero(r.loss_mask) for r in teacher_rows]

    def spans(starts: np.ndarray, first: list[int], segments: list[np.ndarray]):
        return packing.gather_spans(starts + np.array(first), segments, width)

    return ScoringBatch(
        student=student,
        teacher=teacher,
        student_explanation=spans(
            student_starts,
            [r.explanation.start for r in student_rows],
            [left for left, _ in pairs],
        ),
        teacher_explanation=spans(
            teacher_starts,
            [r.explanation.start for r in teacher_rows],
            [right for _, right in pairs],
        ),
        student_solution=spans(
            student_starts, [r.solution.start for r in student_rows], solutions
        ),
        completion=spans(
            teacher_starts,
            [int(w[0]) if len(w) else 0 for w in written],
            [np.arange(len(w)) for w in written],
        ),
        closed=closed,
    )
