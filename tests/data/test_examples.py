"""Sequences and spans, token by token."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from rlt_jax.data import examples
from rlt_jax.data.examples import Example, Renderer, Span
from rlt_jax.data.templates import Template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Trace

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


def span_pieces(tokenizer: Tokenizer, example: Example, span: Span) -> list[str]:
    return pieces(tokenizer, example.tokens[span.start : span.end])


def student_example(tokenizer: Tokenizer, template: Template, trace: Trace) -> Example:
    renderer = Renderer(tokenizer, template, "student")
    (example,) = examples.student_examples(renderer, [trace])
    return example


def teacher_example(tokenizer: Tokenizer, template: Template, trace: Trace) -> Example:
    renderer = Renderer(tokenizer, template, "teacher")
    (example,) = examples.teacher_examples(renderer, [trace])
    return example


def sampled_example(
    tokenizer: Tokenizer,
    template: Template,
    completion: np.ndarray,
    role: str = "teacher",
) -> Example:
    """Of `PROBLEM` and sampled ids."""
    renderer = Renderer(tokenizer, template, role)
    decoded = examples.decode_completion(tokenizer, completion)
    return examples.completion_example(renderer, PROBLEM, completion, *decoded)


def text_example(tokenizer: Tokenizer, template: Template, text: str) -> Example:
    """Of `PROBLEM` and the text of a completion."""
    renderer = Renderer(tokenizer, template, "teacher")
    (example,) = examples.text_examples(renderer, [PROBLEM], [text])
    return example


def span_of(*tokens: str) -> Span:
    ends = np.cumsum([len(token) for token in tokens])
    offsets = np.stack([ends - [len(token) for token in tokens], ends], -1)
    return Span(0, len(tokens), offsets.astype(np.int32))


def test_student_example_of_the_tiny_template(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    example = student_example(tokenizer, tiny, TRACE)
    system = ["<|system|>", "Solve", ".", "<|end|>"]
    assert pieces(tokenizer, example.tokens) == [
        *system,
        *CHAT,
        THOUGHT[0],
        *STEPS,
        THOUGHT[1],
        *SOLUTION,
        "<|end|>",
    ]
    assert (example.explanation.start, example.explanation.end) == (12, 17)
    assert (example.solution.start, example.solution.end) == (19, 20)
    np.testing.assert_array_equal(example.loss_mask, np.arange(22) >= 11)


def test_student_example_of_a_padded_template(
    tokenizer: Tokenizer, padded: Template
) -> None:
    example = student_example(tokenizer, padded, TRACE)
    body = ["\n", "\n", *STEPS, "\n", "\n"]
    assert pieces(tokenizer, example.tokens) == [
        *CHAT,
        THOUGHT[0],
        *body,
        THOUGHT[1],
        "\n",
        "\n",
        *SOLUTION,
        "<|end|>",
    ]
    assert span_pieces(tokenizer, example, example.explanation) == body
    assert span_pieces(tokenizer, example, example.solution) == ["7"]
    np.testing.assert_array_equal(example.explanation.offsets[:, 0], np.arange(9))
    np.testing.assert_array_equal(
        example.loss_mask, np.arange(len(example.tokens)) >= 7
    )


def test_teacher_example_of_the_tiny_template(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    example = teacher_example(tokenizer, tiny, TRACE)
    system = ["<|system|>", "E", "x", "plain", ".", "<|end|>"]
    assert pieces(tokenizer, example.tokens) == [
        *system,
        *CHAT,
        *SOLUTION,
        EXPLANATION[0],
        *STEPS,
        EXPLANATION[1],
        "<|end|>",
    ]
    assert (example.explanation.start, example.explanation.end) == (17, 22)
    assert not len(example.solution.offsets)
    np.testing.assert_array_equal(example.loss_mask, np.arange(24) >= 17)


def test_the_pad_belongs_to_prompt_and_explanation_of_a_teacher_example(
    tokenizer: Tokenizer, padded: Template
) -> None:
    example = teacher_example(tokenizer, padded, TRACE)
    ending = ["\n", "\n", EXPLANATION[1], "<|end|>"]
    opening = [*CHAT, *SOLUTION, "\n", "\n", EXPLANATION[0], "\n", "\n"]
    assert pieces(tokenizer, example.tokens) == [*opening, *STEPS, *ending]
    explained = ["\n", "\n", *STEPS, "\n", "\n"]
    assert span_pieces(tokenizer, example, example.explanation) == explained
    learned = pieces(tokenizer, example.tokens[example.loss_mask])
    assert learned == [*STEPS, *ending]


def test_examples_are_the_text_of_the_template(
    tokenizer: Tokenizer, rlt: Template
) -> None:
    trace = Trace(Problem("Wie groß? 🦉", "x = ½", None), "naïve: <|end_of_thought|>")
    student = tokenizer.decode(student_example(tokenizer, rlt, trace).tokens)
    chat = tokenizer.render(rlt.messages("student", trace.problem, True))
    assert student == chat + rlt.student_turn(trace) + "<|end|>"
    teacher = tokenizer.decode(teacher_example(tokenizer, rlt, trace).tokens)
    prompt, _ = Renderer(tokenizer, rlt, "teacher").prompt(trace.problem)
    assert prompt.endswith(rlt.teacher_prefix(trace.problem))
    ending = "\n\n<|end_of_explanation|><|end|>"
    assert teacher == prompt + trace.explanation + ending


def test_spans_hold_exactly_their_text(tokenizer: Tokenizer, rlt: Template) -> None:
    # Question, thought and solution quote each other and the tags.
    solution = "<|begin_of_solution|>7<|end_of_solution|>"
    thought = "\n\n7 <|begin_of_solution|>7<|end_of_solution|>"
    trace = Trace(Problem("7", solution), thought)
    example = student_example(tokenizer, rlt, trace)
    for span, text in ((example.explanation, thought), (example.solution, solution)):
        assert "".join(span_pieces(tokenizer, example, span)) == text
        assert span.offsets[-1, 1] == len(text)
    example = teacher_example(tokenizer, rlt, trace)
    assert "".join(span_pieces(tokenizer, example, example.explanation)) == thought


def test_empty_texts_have_empty_spans(tokenizer: Tokenizer, tiny: Template) -> None:
    trace = Trace(Problem("3+4?", ""), "")
    example = student_example(tokenizer, tiny, trace)
    teacher = teacher_example(tokenizer, tiny, trace)
    for span in (example.explanation, example.solution, teacher.explanation):
        assert span.start == span.end and not len(span.offsets)


def test_sampled_ids_are_kept(tokenizer: Tokenizer, tiny: Template) -> None:
    # Byte by byte, as no encoder would do it, and a tag that is spelt out.
    spelt = [int(tokenizer.encode(char).ids[0]) for char in "7*3=1"]
    assert len(tokenizer.encode("plain").ids) == 1
    spelt += [int(tokenizer.encode(char).ids[0]) for char in "plain"]
    tag = [int(tokenizer.encode(char).ids[0]) for char in EXPLANATION[1]]
    completion = np.array([*spelt, *tag, tokenizer.eos_id], np.int32)
    example = sampled_example(tokenizer, tiny, completion)
    _, prompt = Renderer(tokenizer, tiny, "teacher").prompt(PROBLEM)
    np.testing.assert_array_equal(example.tokens, [*prompt.ids, *completion])
    np.testing.assert_array_equal(example.tokens[example.loss_mask], completion)
    assert span_pieces(tokenizer, example, example.explanation) == [*"7*3=1plain"]
    text, _ = examples.decode_completion(tokenizer, completion)
    assert tiny.parse_completion(text) == ("7*3=1plain", True)


def test_a_canonical_sample_gives_the_canonical_example(
    tokenizer: Tokenizer, padded: Template
) -> None:
    text = "3+4=7\n\n" + EXPLANATION[1]
    completion = tokenizer.encode(text + "<|end|>").ids
    made = [
        sampled_example(tokenizer, padded, completion),
        teacher_example(tokenizer, padded, TRACE),
        text_example(tokenizer, padded, text),
    ]
    for example in made[1:]:
        np.testing.assert_array_equal(example.tokens, made[0].tokens)
        np.testing.assert_array_equal(example.loss_mask, made[0].loss_mask)
        assert example.explanation[:2] == made[0].explanation[:2]
        np.testing.assert_array_equal(
            example.explanation.offsets, made[0].explanation.offsets
        )


def test_a_text_without_closing_tag_gets_one(
    tokenizer: Tokenizer, padded: Template
) -> None:
    example = text_example(tokenizer, padded, "3+4=7")
    learned = pieces(tokenizer, example.tokens[example.loss_mask])
    assert learned == [*STEPS, EXPLANATION[1], "<|end|>"]
    assert span_pieces(tokenizer, example, example.explanation) == ["\n", "\n", *STEPS]


def test_a_student_policy_has_sampled_ids_and_no_spans(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    completion = tokenizer.encode("3+4=7<|end|>").ids
    example = sampled_example(tokenizer, tiny, completion, role="student")
    prompt = tokenizer.render(tiny.messages("student", PROBLEM, True))
    expected = [*tokenizer.encode(prompt).ids, *completion]
    np.testing.assert_array_equal(example.tokens, expected)
    np.testing.assert_array_equal(example.tokens[example.loss_mask], completion)
    assert example.explanation == example.solution == examples.EMPTY


def test_examples_of_several_problems_keep_their_order(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    problems = [Problem(f"{n}?", str(n)) for n in (1, 2, 1, 3, 2, 1)]
    traces = [Trace(problem, f"z{n}") for n, problem in enumerate(problems)]
    for role, make in examples.EXAMPLES.items():
        renderer = Renderer(tokenizer, tiny, role)
        together = make(renderer, traces)
        for example, trace in zip(together, traces, strict=True):
            (alone,) = make(Renderer(tokenizer, tiny, role), [trace])
            np.testing.assert_array_equal(example.tokens, alone.tokens)
            assert trace.explanation in tokenizer.decode(example.tokens)


def test_a_decoded_completion_leaves_the_stop_token_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("7 is it").ids
    text, offsets = examples.decode_completion(tokenizer, ids)
    assert text == "7 is it" and len(offsets) == len(ids)
    stopped = np.append(ids, tokenizer.eos_id)
    text, offsets = examples.decode_completion(tokenizer, stopped)
    assert text == "7 is it" and len(offsets) == len(ids) + 1
    np.testing.assert_array_equal(offsets[-1], [7, 7])
    # A stop token in the middle was not one: it is text.
    text, _ = examples.decode_completion(tokenizer, np.append(stopped, ids[0]))
    assert text == "7 is it<|end|>7"
    text, offsets = examples.decode_completion(tokenizer, np.zeros(0, np.int32))
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
        # The right sequence's last token reached into the closing tag and fell away.
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
    # The other sequence's newlines are part of a token with the opening tag.
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


def test_sequences_that_do_not_fit_are_named() -> None:
    sequences = [np.zeros(length, np.int32) for length in (3, 9, 4, 7)]
    examples.check_lengths(sequences, 9, "sequences")
    message = r"mine: sequence 1 has 9 tokens, the limit is 5 \(2 of 4 sequences"
    with pytest.raises(UserError, match=message):
        examples.check_lengths(sequences, 5, "mine")
