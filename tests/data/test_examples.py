"""Rows and spans, token by token."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from rlt_jax.data import examples
from rlt_jax.data.examples import Row, Span
from rlt_jax.data.templates import Problem, Template, Trace
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError

PROBLEM = Problem("3+4?", "7", "7")
TRACE = Trace(PROBLEM, "3+4=7")
CHAT = ["<|user|>", "3", "+", "4", "?", "<|end|>", "<|assistant|>"]
STEPS = ["3", "+", "4", "=", "7"]
THOUGHT = ("<|begin_of_thought|>", "<|end_of_thought|>")
EXPLANATION = ("<|begin_of_explanation|>", "<|end_of_explanation|>")
SOLUTION = ["<|begin_of_solution|>", "7", "<|end_of_solution|>"]


@pytest.fixture
def padded(rlt: Template) -> Template:
    """The published tags and newlines, without the long system prompts."""
    return dataclasses.replace(rlt, teacher_system="", student_system="")


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]


def span_pieces(tokenizer: Tokenizer, row: Row, span: Span) -> list[str]:
    return pieces(tokenizer, row.tokens[span.start : span.end])


def span_of(*tokens: str) -> Span:
    ends = np.cumsum([len(token) for token in tokens])
    offsets = np.stack([ends - [len(token) for token in tokens], ends], -1)
    return Span(0, len(tokens), offsets.astype(np.int32))


def test_student_row_of_the_tiny_template(tokenizer: Tokenizer, tiny: Template) -> None:
    row = examples.student_row(tokenizer, tiny, TRACE)
    system = ["<|system|>", "Solve", ".", "<|end|>"]
    assert pieces(tokenizer, row.tokens) == [
        *system,
        *CHAT,
        THOUGHT[0],
        *STEPS,
        THOUGHT[1],
        *SOLUTION,
        "<|end|>",
    ]
    assert (row.explanation.start, row.explanation.end) == (12, 17)
    assert (row.solution.start, row.solution.end) == (19, 20)
    np.testing.assert_array_equal(row.loss_mask, np.arange(22) >= 11)


def test_student_row_of_a_padded_template(
    tokenizer: Tokenizer, padded: Template
) -> None:
    row = examples.student_row(tokenizer, padded, TRACE)
    body = ["\n", "\n", *STEPS, "\n", "\n"]
    assert pieces(tokenizer, row.tokens) == [
        *CHAT,
        THOUGHT[0],
        *body,
        THOUGHT[1],
        "\n",
        "\n",
        *SOLUTION,
        "<|end|>",
    ]
    assert span_pieces(tokenizer, row, row.explanation) == body
    assert span_pieces(tokenizer, row, row.solution) == ["7"]
    np.testing.assert_array_equal(row.explanation.offsets[:, 0], np.arange(9))
    np.testing.assert_array_equal(row.loss_mask, np.arange(len(row.tokens)) >= 7)


def test_teacher_row_of_the_tiny_template(tokenizer: Tokenizer, tiny: Template) -> None:
    row = examples.teacher_row(tokenizer, tiny, TRACE)
    system = ["<|system|>", "E", "x", "plain", ".", "<|end|>"]
    assert pieces(tokenizer, row.tokens) == [
        *system,
        *CHAT,
        *SOLUTION,
        EXPLANATION[0],
        *STEPS,
        EXPLANATION[1],
        "<|end|>",
    ]
    assert (row.explanation.start, row.explanation.end) == (17, 22)
    assert not len(row.solution.offsets)
    np.testing.assert_array_equal(row.loss_mask, np.arange(24) >= 17)


def test_the_pad_belongs_to_prompt_and_explanation_of_a_teacher_row(
    tokenizer: Tokenizer, padded: Template
) -> None:
    row = examples.teacher_row(tokenizer, padded, TRACE)
    ending = ["\n", "\n", EXPLANATION[1], "<|end|>"]
    opening = [*CHAT, *SOLUTION, "\n", "\n", EXPLANATION[0], "\n", "\n"]
    assert pieces(tokenizer, row.tokens) == [*opening, *STEPS, *ending]
    explained = ["\n", "\n", *STEPS, "\n", "\n"]
    assert span_pieces(tokenizer, row, row.explanation) == explained
    written = pieces(tokenizer, row.tokens[row.loss_mask])
    assert written == [*STEPS, *ending]


def test_rows_say_what_the_template_says(tokenizer: Tokenizer, rlt: Template) -> None:
    trace = Trace(Problem("Wie groß? 🦉", "x = ½", None), "naïve: <|end_of_thought|>")
    student = tokenizer.decode(examples.student_row(tokenizer, rlt, trace).tokens)
    chat = tokenizer.render(rlt.student_messages(trace.problem.question))
    assert student == chat + rlt.student_turn(trace) + "<|end|>"
    teacher = tokenizer.decode(examples.teacher_row(tokenizer, rlt, trace).tokens)
    prompt = examples.teacher_prompt(tokenizer, rlt, trace.problem)
    assert prompt.endswith(rlt.teacher_prefix(trace.problem))
    ending = "\n\n<|end_of_explanation|><|end|>"
    assert teacher == prompt + trace.explanation + ending


def test_spans_hold_exactly_their_text(tokenizer: Tokenizer, rlt: Template) -> None:
    # Question, thought and solution quote each other and the tags.
    solution = "<|begin_of_solution|>7<|end_of_solution|>"
    thought = "\n\n7 <|begin_of_solution|>7<|end_of_solution|>"
    trace = Trace(Problem("7", solution), thought)
    row = examples.student_row(tokenizer, rlt, trace)
    for span, text in ((row.explanation, thought), (row.solution, solution)):
        assert "".join(span_pieces(tokenizer, row, span)) == text
        assert span.offsets[-1, 1] == len(text)
    row = examples.teacher_row(tokenizer, rlt, trace)
    assert "".join(span_pieces(tokenizer, row, row.explanation)) == thought


def test_empty_texts_have_empty_spans(tokenizer: Tokenizer, tiny: Template) -> None:
    trace = Trace(Problem("3+4?", ""), "")
    row = examples.student_row(tokenizer, tiny, trace)
    teacher = examples.teacher_row(tokenizer, tiny, trace)
    for span in (row.explanation, row.solution, teacher.explanation):
        assert span.start == span.end and not len(span.offsets)


def test_sampled_ids_are_kept(tokenizer: Tokenizer, tiny: Template) -> None:
    # Byte by byte, as no encoder would write it, and a tag that is spelt out.
    spelt = [int(tokenizer.encode(char).ids[0]) for char in "7*3=1"]
    assert len(tokenizer.encode("plain").ids) == 1
    spelt += [int(tokenizer.encode(char).ids[0]) for char in "plain"]
    tag = [int(tokenizer.encode(char).ids[0]) for char in EXPLANATION[1]]
    completion = np.array([*spelt, *tag, tokenizer.eos_id], np.int32)
    row = examples.sampled_teacher_row(tokenizer, tiny, PROBLEM, completion)
    prompt = tokenizer.encode(examples.teacher_prompt(tokenizer, tiny, PROBLEM)).ids
    np.testing.assert_array_equal(row.tokens, [*prompt, *completion])
    np.testing.assert_array_equal(row.tokens[row.loss_mask], completion)
    assert span_pieces(tokenizer, row, row.explanation) == [*"7*3=1plain"]
    trace, closed = examples.trace_of(tokenizer, tiny, PROBLEM, completion)
    assert (trace.explanation, closed) == ("7*3=1plain", True)


def test_a_canonical_sample_gives_the_canonical_row(
    tokenizer: Tokenizer, padded: Template
) -> None:
    text = "3+4=7\n\n" + EXPLANATION[1]
    completion = tokenizer.encode(text + "<|end|>").ids
    rows = [
        examples.sampled_teacher_row(tokenizer, padded, PROBLEM, completion),
        examples.teacher_row(tokenizer, padded, TRACE),
        examples.written_teacher_row(tokenizer, padded, PROBLEM, text),
    ]
    for row in rows[1:]:
        np.testing.assert_array_equal(row.tokens, rows[0].tokens)
        np.testing.assert_array_equal(row.loss_mask, rows[0].loss_mask)
        assert row.explanation[:2] == rows[0].explanation[:2]
        np.testing.assert_array_equal(
            row.explanation.offsets, rows[0].explanation.offsets
        )


def test_a_written_row_gets_the_closing_tag_that_it_lacks(
    tokenizer: Tokenizer, padded: Template
) -> None:
    row = examples.written_teacher_row(tokenizer, padded, PROBLEM, "3+4=7")
    written = pieces(tokenizer, row.tokens[row.loss_mask])
    assert written == [*STEPS, EXPLANATION[1], "<|end|>"]
    assert span_pieces(tokenizer, row, row.explanation) == ["\n", "\n", *STEPS]


def test_completion_text_leaves_the_stop_token_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("7 is it").ids
    text, offsets = examples.completion_text(tokenizer, ids)
    assert text == "7 is it" and len(offsets) == len(ids)
    stopped = np.append(ids, tokenizer.eos_id)
    text, offsets = examples.completion_text(tokenizer, stopped)
    assert text == "7 is it" and len(offsets) == len(ids) + 1
    np.testing.assert_array_equal(offsets[-1], [7, 7])
    # A stop token in the middle was not one: it is text.
    text, _ = examples.completion_text(tokenizer, np.append(stopped, ids[0]))
    assert text == "7 is it<|end|>7"
    text, offsets = examples.completion_text(tokenizer, np.zeros(0, np.int32))
    assert text == "" and offsets.shape == (0, 2)


def test_only_tokens_wholly_inside_belong_to_a_span() -> None:
    # "<t>3+4=7</t>" as `<t>`, `3`, `+`, `4`, `=`, `7</`, `t>`.
    offsets = span_of("<t>", "3", "+", "4", "=", "7</", "t>").offsets
    span = examples.find_span(offsets, 3, 8)
    assert (span.start, span.end) == (1, 5)
    np.testing.assert_array_equal(span.offsets[:, 0], [0, 1, 2, 3])
    nothing = examples.find_span(offsets, 7, 9)
    assert nothing.start == nothing.end and not len(nothing.offsets)


@pytest.mark.parametrize(
    ("left", "right", "left_segments", "right_segments"),
    [
        (["ab", "c", "d"], ["a", "bc", "d"], [0, 0, 1], [0, 0, 1]),
        (["a", "b"], ["a", "b"], [0, 1], [0, 1]),
        (["ab"], ["a", "b"], [0], [0, 0]),
        (["ab", "cd", "e"], ["a", "b", "c", "d", "e"], [0, 1, 2], [0, 0, 1, 1, 2]),
        (["abc", "d"], ["a", "bcd"], [0, 0], [0, 0]),
        # The right row's last token reached into the closing tag and fell away.
        (["a", "b", "c"], ["a", "b"], [0, 1, -1], [0, 1]),
        (["a", "bc"], ["a", "b"], [0, -1], [0, -1]),
        (["a"], [], [-1], []),
    ],
)
def test_worked_alignments(
    left: list[str],
    right: list[str],
    left_segments: list[int],
    right_segments: list[int],
) -> None:
    spans = [span_of(*side) if side else examples.EMPTY for side in (left, right)]
    ours = examples.align(*spans)
    np.testing.assert_array_equal(ours[0], left_segments)
    np.testing.assert_array_equal(ours[1], right_segments)


def test_a_first_token_without_counterpart_is_left_out() -> None:
    whole = span_of("\n", "\n", "a", "b")
    # The other row's newlines hang on the opening tag.
    partial = Span(0, 2, whole.offsets[2:])
    left, right = examples.align(whole, partial)
    np.testing.assert_array_equal(left, [-1, -1, 0, 1])
    np.testing.assert_array_equal(right, [0, 1])


def test_alignment_is_common_and_finest() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = "abcdefghijkl"
        cuts = [sorted({0, *rng.integers(1, 12, 5), 12}) for _ in range(2)]
        sides = [[text[a:b] for a, b in itertools.pairwise(side)] for side in cuts]
        segments = examples.align(*(span_of(*side) for side in sides))
        texts = []
        for side, numbers in zip(sides, segments, strict=True):
            joined: dict[int, str] = {}
            for token, number in zip(side, numbers, strict=True):
                joined[int(number)] = joined.get(int(number), "") + token
            texts.append(joined)
        common = sorted(set(cuts[0]) & set(cuts[1]))
        expected = [text[a:b] for a, b in itertools.pairwise(common)]
        assert texts[0] == texts[1] == dict(enumerate(expected))


def test_rows_that_do_not_fit_are_named() -> None:
    rows = [np.zeros(length, np.int32) for length in (3, 9, 4, 7)]
    examples.check_lengths(rows, 9, "rows")
    message = r"my rows: row 1 has 9 tokens, the limit is 5 \(2 of 4 rows"
    with pytest.raises(UserError, match=message):
        examples.check_lengths(rows, 5, "my rows")
