"""Problems and completions to the packed rows and spans of the reward."""

import numpy as np
import pytest
from rlt_jax.data.scoring import RowShape, scoring_batch

from rlt_jax.data import examples
from rlt_jax.data.templates import Problem, Template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.types import PackedRows, ScoringBatch, TokenSpans

SHAPE = RowShape(micro_batch_size=2, row_length=64)
CLOSING = "<|end_of_explanation|>"
PROBLEMS = [Problem(f"{n}+1?", str(n + 1)) for n in range(5)]
TEXTS = [
    f"0+1=1{CLOSING}<|end|>",
    "never closed",
    f"{CLOSING}<|end|>",
    f"3+1=4{CLOSING} and more<|end|>",
    "",
]
EXPLANATIONS = ["0+1=1", "never closed", "", "3+1=4", ""]


@pytest.fixture(scope="module")
def completions(tokenizer: Tokenizer) -> list[np.ndarray]:
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def batch(
    tokenizer: Tokenizer, tiny: Template, completions: list[np.ndarray]
) -> ScoringBatch:
    batch, overlong = scoring_batch(
        tokenizer, tokenizer, tiny, SHAPE, PROBLEMS, completions
    )
    assert overlong == 0
    return batch


def texts(tokenizer: Tokenizer, rows: PackedRows, spans: TokenSpans) -> list[str]:
    tokens = rows.tokens.reshape(-1)[spans.index]
    return [
        tokenizer.decode(row[keep])
        for row, keep in zip(tokens, spans.mask, strict=True)
    ]


def test_spans_lead_to_their_texts(tokenizer: Tokenizer, batch: ScoringBatch) -> None:
    explained = texts(tokenizer, batch.student, batch.student_explanation)
    assert explained == EXPLANATIONS
    explained = texts(tokenizer, batch.teacher, batch.teacher_explanation)
    assert explained == EXPLANATIONS
    solutions = texts(tokenizer, batch.student, batch.student_solution)
    assert solutions == [problem.solution for problem in PROBLEMS]
    assert texts(tokenizer, batch.teacher, batch.completion) == TEXTS
    assert batch.closed.tolist() == [True, False, True, True, False]


def test_the_policy_is_trained_on_every_sampled_token(
    batch: ScoringBatch, completions: list[np.ndarray]
) -> None:
    lengths = batch.completion.mask.sum(-1).tolist()
    assert lengths == [len(completion) for completion in completions]


def test_segments_are_tokens_where_both_rows_agree(batch: ScoringBatch) -> None:
    student, teacher = batch.student_explanation, batch.teacher_explanation
    np.testing.assert_array_equal(student.mask, teacher.mask)
    for spans in (student, teacher):
        counted = np.broadcast_to(np.arange(SHAPE.row_length), spans.mask.shape)
        np.testing.assert_array_equal(spans.segment[spans.mask], counted[spans.mask])


def test_shapes_depend_on_the_number_of_completions_alone(
    batch: ScoringBatch, tokenizer: Tokenizer, tiny: Template
) -> None:
    ids = tokenizer.encode("x").ids
    other, _ = scoring_batch(
        tokenizer, tokenizer, tiny, SHAPE, PROBLEMS, [ids] * len(PROBLEMS)
    )

    def shapes(batch: ScoringBatch) -> list[tuple]:
        rows = [*batch.student, *batch.teacher, *batch.student_explanation]
        return [(a.shape, a.dtype) for a in (*rows, *batch.completion, batch.closed)]

    assert shapes(batch) == shapes(other)


def test_a_spelt_out_sample_is_aligned_by_segments(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    # " is" is one token to the student, but was sampled as three.
    spelt = np.concatenate([tokenizer.encode(c).ids for c in ("it", " ", "i", "s")])
    completion = np.append(spelt, tokenizer.encode(f" 7{CLOSING}").ids)
    batch, _ = scoring_batch(
        tokenizer, tokenizer, tiny, SHAPE, PROBLEMS[:1], [completion]
    )
    student, teacher = batch.student_explanation, batch.teacher_explanation
    assert student.segment[student.mask].tolist() == [0, 1, 2, 3]
    assert teacher.segment[teacher.mask].tolist() == [0, 1, 1, 1, 2, 3]


def test_text_too_long_for_the_student_counts_as_empty(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    # A stray byte is one token to the teacher and three to the student.
    stray = tokenizer.encode("\u00e9").ids[:1]
    completion = np.repeat(stray, 30)
    batch, overlong = scoring_batch(
        tokenizer,
        tokenizer,
        tiny,
        SHAPE,
        PROBLEMS[:2],
        [completion, tokenizer.encode(TEXTS[0]).ids],
    )
    assert overlong == 1
    for spans in (batch.student_explanation, batch.teacher_explanation):
        assert spans.mask.any(-1).tolist() == [False, True]
    assert batch.completion.mask.sum(-1)[0] == 30
    assert batch.student_solution.mask.any(-1).all()


def test_a_teacher_row_that_is_too_long_is_an_error(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    completion = np.repeat(tokenizer.encode("7").ids, SHAPE.row_length)
    with pytest.raises(UserError, match="Raise row_length"):
        scoring_batch(tokenizer, tokenizer, tiny, SHAPE, PROBLEMS[:1], [completion])


def test_student_rows_are_those_of_distillation(
    tokenizer: Tokenizer, tiny: Template, completions: list[np.ndarray]
) -> None:
    alone, _ = scoring_batch(
        tokenizer, tokenizer, tiny, SHAPE, PROBLEMS[:1], completions[:1]
    )
    trace, _ = examples.trace_of(tokenizer, tiny, PROBLEMS[0], completions[0])
    row = examples.student_row(tokenizer, tiny, trace).tokens
    np.testing.assert_array_equal(alone.student.tokens[0, 0, : len(row)], row)
