"""Sequences of a teacher that judges attempts, and what it is shown."""

import dataclasses

import numpy as np
import pytest

from rlt_jax.data.examples import Renderer, Span, align, decode_completion
from rlt_jax.data.privileged import (
    closing_ids,
    privileged_examples,
    privileged_prompt,
    seen_texts,
)
from rlt_jax.data.rows import ABSENT
from rlt_jax.data.templates import Template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.records import Problem
from rlt_jax.types import Request, Rollout

PROBLEM = Problem("Start at 2: +3 *2. Last digit?", "0")
OTHER = Problem("Start at 1: +3. Last digit?", "4")
ALIKE = Problem("Start at 7: +3. Last digit?", "0")
OPENING, CLOSING = "<|begin_of_thought|>", "<|end_of_thought|>"
ATTEMPT = f"{OPENING}2+3=5 5*2=0{CLOSING}><|begin_of_solution|>0<|end_of_solution|>"


@pytest.fixture
def student(tokenizer: Tokenizer, tiny: Template) -> Renderer:
    return Renderer(tokenizer, tiny, "student")


@pytest.fixture
def teacher(tokenizer: Tokenizer, tiny: Template) -> Renderer:
    return Renderer(tokenizer, tiny, "teacher")


def rollout_of(
    tokenizer: Tokenizer,
    texts: list[str],
    problems: list[Problem],
    finished: bool = True,
) -> Rollout:
    tokens = [
        np.append(tokenizer.encode(text).ids, [tokenizer.eos_id] * finished)
        for text in texts
    ]
    tokens = [one.astype(np.int32) for one in tokens]
    decoded = [decode_completion(tokenizer, one) for one in tokens]
    prompt = np.zeros(1, np.int32)
    requests = [Request(prompt, n, 99, one) for n, one in enumerate(problems)]
    log_probs = [np.zeros(len(one), np.float32) for one in tokens]
    ended = np.full(len(texts), finished)
    return Rollout(requests, tokens, log_probs, ended, *map(list, zip(*decoded)))


def ids_of(tokens: np.ndarray, span: Span) -> list[int]:
    return tokens[span.start : span.end].tolist()


def test_a_teacher_judges_the_thought_and_its_end(
    teacher: Renderer, student: Renderer
) -> None:
    tokenizer = student.tokenizer
    rollout = rollout_of(tokenizer, [ATTEMPT], [PROBLEM])
    (sequence,), (own,) = privileged_examples(teacher, student, rollout, ["0"], 160)
    told, thought = closing_ids(tokenizer, teacher.template)
    body = tokenizer.encode("2+3=5 5*2=0").ids.tolist()
    assert ids_of(sequence.tokens, sequence.explanation) == [*body, told]
    assert ids_of(own.tokens, own.explanation) == [*body, thought]
    prompt, (ids, _) = teacher.prompt(PROBLEM)
    assert sequence.explanation.start == len(ids)
    assert "0" in prompt
    offsets = sequence.explanation.offsets
    np.testing.assert_array_equal(offsets, own.explanation.offsets)


def test_a_thought_that_is_cut_off_has_no_end(
    teacher: Renderer, student: Renderer
) -> None:
    rollout = rollout_of(student.tokenizer, [f"{OPENING}2+3="], [PROBLEM], False)
    (sequence,), (own,) = privileged_examples(teacher, student, rollout, ["0"], 160)
    body = student.tokenizer.encode("2+3=").ids.tolist()
    assert ids_of(own.tokens, own.explanation) == body
    assert ids_of(sequence.tokens, sequence.explanation) == body


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_a_student_that_sees_more_judges_all_tokens(
    finished: bool, same: bool, student: Renderer
) -> None:
    tokenizer = student.tokenizer
    judge = student
    if not same:
        other = Tokenizer.__new__(Tokenizer)
        other.__dict__ |= tokenizer.__dict__ | {"pieces": []}
        judge = Renderer(other, student.template, "student")
    rollout = rollout_of(tokenizer, [ATTEMPT], [PROBLEM], finished)
    (sequence,), (own,) = privileged_examples(judge, student, rollout, ["0"], 160)
    assert ids_of(own.tokens, own.explanation) == rollout.tokens[0].tolist()
    assert ids_of(sequence.tokens, sequence.explanation) == rollout.tokens[0].tolist()
    text = tokenizer.decode(sequence.tokens)
    assert PROBLEM.question in text and "It is 0." in text


@pytest.mark.parametrize("text", ["2+3=", "", "2+3=5 5*2=0<|end_of_th"])
def test_a_thought_that_is_cut_off_in_its_closing_tag(
    text: str, teacher: Renderer, student: Renderer
) -> None:
    rollout = rollout_of(student.tokenizer, [OPENING + text], [PROBLEM], False)
    (sequence,), (own,) = privileged_examples(teacher, student, rollout, ["0"], 160)
    body = student.tokenizer.encode(text.partition("<")[0]).ids.tolist()
    assert ids_of(own.tokens, own.explanation) == body
    assert ids_of(sequence.tokens, sequence.explanation) == body
    # No closing tag is made up for it.
    told, _ = closing_ids(student.tokenizer, student.template)
    assert told not in sequence.tokens.tolist()[sequence.explanation.end :]


def test_a_closing_tag_that_is_merged_with_text_is_not_compared(
    teacher: Renderer, student: Renderer
) -> None:
    """As if the teacher's tokenizer had one token for "0<|end_of_explanation|>"."""
    merged = Renderer(student.tokenizer, student.template, "teacher")

    def encode(problems: list, turns: list) -> list:
        ((prompt, (ids, places)),) = teacher.encode(problems, turns)
        (at,) = np.flatnonzero(
            ids == closing_ids(student.tokenizer, student.template)[0]
        )
        places = np.delete(places, at, axis=0)
        places[at - 1, 1] += len("<|end_of_explanation|>")
        return [(prompt, (np.delete(ids, at), places))]

    merged.encode = encode
    rollout = rollout_of(student.tokenizer, [ATTEMPT], [PROBLEM])
    (sequence,), (own,) = privileged_examples(merged, student, rollout, ["0"], 160)
    body = student.tokenizer.encode("2+3=5 5*2=0").ids.tolist()
    assert ids_of(own.tokens, own.explanation) == body
    assert ids_of(sequence.tokens, sequence.explanation) == body[:-1]
    ours, theirs = align(sequence.explanation, own.explanation)
    assert theirs.tolist() == [*ours.tolist(), -1]


@pytest.mark.parametrize("opened", ["", f"{OPENING}"])
def test_the_teacher_reads_the_attempt_as_the_student_has_opened_it(
    opened: str, tokenizer: Tokenizer, tiny: Template
) -> None:
    """One chat template ends with the opening tag, that of the other model does not."""
    student, judge = (Renderer(tokenizer, tiny, "student") for _ in range(2))
    text, _ = student.prompt(PROBLEM)
    student.opened, judge.opened = opened, OPENING if not opened else ""
    told = text + judge.opened
    judge.prompt = lambda problem: (told, tokenizer.encode(told))
    prompt, (ids, _) = privileged_prompt(judge, student, PROBLEM._replace(solution=""))
    assert prompt.count(OPENING) == bool(opened)
    assert ids.tolist() == tokenizer.encode(prompt).ids.tolist()


def test_what_is_not_seen_or_does_not_fit_is_not_judged(
    teacher: Renderer, student: Renderer
) -> None:
    rollout = rollout_of(student.tokenizer, [ATTEMPT] * 2, [PROBLEM] * 2)
    sequences, own = privileged_examples(teacher, student, rollout, [None, "0"], 160)
    assert sequences[0] is ABSENT and not len(own[0].explanation.offsets)
    assert len(own[1].explanation.offsets)
    size = len(sequences[1].tokens)
    sequences, own = privileged_examples(teacher, student, rollout, ["0", "0"], size)
    assert all(len(one.explanation.offsets) for one in own)
    sequences, own = privileged_examples(
        teacher, student, rollout, ["0", "0"], size - 1
    )
    assert sequences == [ABSENT, ABSENT]
    assert not any(len(one.explanation.offsets) for one in own)


def test_what_a_teacher_is_shown(tiny: Template) -> None:
    problems = [PROBLEM, PROBLEM, ALIKE, OTHER]

    def seen(sees: str, *right: str | None) -> list[str | None]:
        told = {PROBLEM.asked: " so "}
        return seen_texts(sees, tiny, told, problems, right)

    assert seen("nothing") == ["", "", "", ""]
    assert seen("solution") == ["0", "0", "0", "4"]
    assert seen("explanation") == ["so\n\n0", "so\n\n0", None, None]
    # A right attempt of the same question, but not the attempt itself.
    assert seen("attempt", "a", None, "c", None) == [None, "a", None, None]
    assert seen("attempt", "a", "b", "c", "d") == ["b", "a", None, None]
    # Of another question, and not the same by chance.
    assert seen("other") == ["4", "4", "4", "0"]


def test_closing_tags_that_begin_alike(tokenizer: Tokenizer, tiny: Template) -> None:
    same = dataclasses.replace(tiny, explanation_tags=tiny.thought_tags)
    first, second = closing_ids(tokenizer, same)
    assert first == second == tokenizer.encode(CLOSING).ids[-1]
