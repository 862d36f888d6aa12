"""Completions that are taken from traces, beside sampled ones."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest

from rlt_jax.data.examples import Renderer
from rlt_jax.data.templates import Template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.inference.given import GivenSampler, given_completions
from rlt_jax.inference.sampler import Sampler, decode
from rlt_jax.records import Problem, Trace
from rlt_jax.types import Array, Params, Request, Rollout

QUESTIONS = [f"Start at {n}: +3. Last digit?" for n in range(5)]
PROBLEMS = [Problem(question, "1") for question in QUESTIONS]
OWN = np.array([5, 6, 7], np.int32)


@pytest.fixture
def renderer(tokenizer: Tokenizer, tiny: Template) -> Renderer:
    return Renderer(tokenizer, tiny, "student")


class Stub(Sampler):
    """Every completion is the same."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def generate(
        self, params: Params, requests: Sequence[Request], key: Array
    ) -> Rollout:
        count = len(requests)
        log_probs = [np.full(3, -1.0, np.float32)] * count
        finished = np.zeros(count, bool)
        rollout = Rollout(requests, [OWN] * count, log_probs, finished)
        return decode(rollout, self.tokenizer)


def requests() -> list[Request]:
    prompt = np.array([1, 2], np.int32)
    return [Request(prompt, n, 50, PROBLEMS[n % 5]) for n in range(400)]


def make(renderer: Renderer, own: float) -> GivenSampler:
    traces = [Trace(problem, thought) for problem in PROBLEMS for thought in "12"]
    given = given_completions(renderer, traces, PROBLEMS, 50)
    return GivenSampler(Stub(renderer.tokenizer), own, given, renderer)


@pytest.mark.parametrize("own", [0.0, 0.3, 1.0])
def test_a_fraction_is_sampled(own: float, renderer: Renderer) -> None:
    asked = requests()
    rollout = make(renderer, own).generate(None, asked, jax.random.key(1))
    assert rollout.requests == asked
    sampled = [tokens is OWN for tokens in rollout.tokens]
    assert abs(np.mean(sampled) - own) < (0 < own < 1) * 0.07 + 1e-9
    texts = set()
    for n, is_own in enumerate(sampled):
        assert rollout.finished[n] != is_own
        assert rollout.log_probs[n].any() == is_own
        assert len(rollout.log_probs[n]) == len(rollout.tokens[n])
        assert len(rollout.offsets[n]) == len(rollout.tokens[n])
        texts |= set() if is_own else {rollout.texts[n]}
    # Both traces of every question occur.
    assert len(texts) == 2 * (own < 1)


def test_a_completion_depends_on_its_request_alone(renderer: Renderer) -> None:
    sampler, asked, key = make(renderer, 0.5), requests(), jax.random.key(1)
    whole = sampler.generate(None, asked, key)
    part = sampler.generate(None, asked[7:50], key)
    for ours, theirs in zip(part.tokens, whole.tokens[7:50], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other = sampler.generate(None, asked, jax.random.key(2))
    assert other.texts != whole.texts


def test_completions_are_the_turns_of_a_student(
    renderer: Renderer, tiny: Template
) -> None:
    trace = Trace(PROBLEMS[0], "0+3=3")
    given = given_completions(renderer, [trace], PROBLEMS[:1], 50)
    (tokens,) = given[PROBLEMS[0].asked]
    assert tokens[-1] in renderer.tokenizer.stop_ids
    text = renderer.tokenizer.decode(tokens[:-1])
    assert text == tiny.student_turn(trace, renderer.opened)


def test_conversations_that_end_alike_have_their_own_traces(renderer: Renderer) -> None:
    said = [(("user", f"{n}?"), ("assistant", "Yes.")) for n in range(2)]
    problems = [PROBLEMS[0]._replace(history=one) for one in said]
    traces = [Trace(problem, f"0+{n}") for n, problem in enumerate(problems)]
    given = given_completions(renderer, traces, problems, 50)
    for n, problem in enumerate(problems):
        (tokens,) = given[problem.asked]
        assert f"0+{n}" in renderer.tokenizer.decode(tokens)


def test_a_trace_that_does_not_fit_is_told(renderer: Renderer) -> None:
    traces = [Trace(problem, "0+3=3 " * 20) for problem in PROBLEMS]
    with pytest.raises(UserError, match="5 of 5 questions have no trace"):
        given_completions(renderer, traces, PROBLEMS, 50)
