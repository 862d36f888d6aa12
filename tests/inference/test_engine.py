"""Rollouts against full forward passes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from rlt_jax.errors import UserError
from rlt_jax.inference.engine import (
    PromptBatch,
    complete_all,
    completions_of,
    jit_rollout,
    pad_prompts,
)
from rlt_jax.inference.sampling import SamplingConfig, sample
from rlt_jax.models.transformer import Transformer
from rlt_jax.types import Params, Rollout

V, T = 40, 10
STOPS = (5, 6, 7)
KEY = jax.random.key(0)
PROMPTS = [
    np.random.default_rng(n).integers(1, V, length, np.int32)
    for n, length in enumerate((3, 32, 7, 1, 12, 5))
]
Generate = Callable[[Params, PromptBatch, jax.Array], Rollout]
NaiveLogProbs = Callable[..., np.ndarray]


@pytest.fixture(scope="module", params=[1.0, 0.7])
def temperature(request: pytest.FixtureRequest) -> float:
    return request.param


@pytest.fixture(scope="module")
def generate(model: Transformer, mesh: Mesh, temperature: float) -> Generate:
    return jit_rollout(model, SamplingConfig(T, temperature), STOPS, mesh)


@pytest.fixture(scope="module")
def rollout(generate: Generate, params: Params) -> Rollout:
    prompts = pad_prompts(PROMPTS, np.arange(6))
    return jax.device_get(generate(params, prompts, KEY))


def whole_rows(completions: list[np.ndarray]) -> np.ndarray:
    """Prompts with their completions, padded on the right to one length."""
    rows = [np.append(p, c) for p, c in zip(PROMPTS, completions, strict=True)]
    length = max(map(len, PROMPTS)) + T
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows])


def test_log_probs_are_those_of_a_full_forward_pass(
    model: Transformer,
    params: Params,
    rollout: Rollout,
    temperature: float,
    naive_log_probs: NaiveLogProbs,
) -> None:
    completions = completions_of(rollout)
    expected = naive_log_probs(model, params, whole_rows(completions), temperature)
    for n, completion in enumerate(completions):
        place = slice(len(PROMPTS[n]), len(PROMPTS[n]) + len(completion))
        ours = rollout.log_probs[n, : len(completion)]
        np.testing.assert_allclose(ours, expected[n, place], atol=1e-4)


def test_a_row_ends_with_its_first_stop_token(rollout: Rollout) -> None:
    assert rollout.finished.any() and not rollout.finished.all(), "a poor example"
    for n, completion in enumerate(completions_of(rollout)):
        assert not np.isin(completion[:-1], STOPS).any()
        assert np.isin(completion[-1], STOPS) == rollout.finished[n]
        assert len(completion) == T or rollout.finished[n]
        after = np.arange(T) >= len(completion)
        np.testing.assert_array_equal(rollout.completion_mask[n], ~after)
        np.testing.assert_array_equal(rollout.tokens[n, after], 0)
        np.testing.assert_array_equal(rollout.log_probs[n, after], 0.0)


def test_the_key_and_the_request_decide_what_is_drawn(
    generate: Generate, params: Params, rollout: Rollout
) -> None:
    prompts = pad_prompts(PROMPTS, np.arange(6))
    again = generate(params, prompts, KEY)
    np.testing.assert_array_equal(again.tokens, rollout.tokens)
    other = generate(params, prompts, jax.random.key(1))
    assert (other.tokens != rollout.tokens).any(-1).sum() >= 4
    same = pad_prompts([PROMPTS[2]] * 6, [2, 3, 3, 4, 5, 6])
    drawn = np.asarray(generate(params, same, KEY).tokens)
    np.testing.assert_array_equal(drawn[0], rollout.tokens[2])
    np.testing.assert_array_equal(drawn[1], drawn[2])
    assert (drawn[3:] != drawn[0]).any(-1).sum() >= 2


def test_a_completion_does_not_depend_on_its_company(
    generate: Generate, params: Params, rollout: Rollout
) -> None:
    # Other neighbours, another place, and a longer padding of the prompt.
    others = [np.full(n, n, np.int32) for n in (40, 2, 9, 17)]
    prompts = [others[0], PROMPTS[2], others[1], others[2], PROMPTS[0], others[3]]
    batch = pad_prompts(prompts, [60, 2, 61, 62, 0, 63])
    assert batch.tokens.shape[1] > pad_prompts(PROMPTS, np.arange(6)).tokens.shape[1]
    result = jax.device_get(generate(params, batch, KEY))
    for now, before in ((1, 2), (4, 0)):
        np.testing.assert_array_equal(result.tokens[now], rollout.tokens[before])
        np.testing.assert_allclose(
            result.log_probs[now], rollout.log_probs[before], atol=1e-4
        )


def test_any_number_of_prompts_is_completed(
    generate: Generate, params: Params, rollout: Rollout
) -> None:
    # Batches of six, the second with one prompt of its own; requests count on.
    prompts = [*PROMPTS, PROMPTS[0]]
    completions = complete_all(generate, params, prompts, 6, KEY)
    assert len(completions) == 7
    for ours, expected in zip(completions, completions_of(rollout), strict=False):
        np.testing.assert_array_equal(ours, expected)
    later = complete_all(generate, params, PROMPTS[:1], 6, KEY, first_request=6)
    np.testing.assert_array_equal(completions[6], later[0])


def test_greedy_takes_the_likeliest_token(
    model: Transformer,
    params: Params,
    mesh: Mesh,
    full_logits: Callable[..., np.ndarray],
    naive_log_probs: NaiveLogProbs,
) -> None:
    generate = jit_rollout(model, SamplingConfig(T, temperature=0.0), (0,), mesh)
    prompts = pad_prompts(PROMPTS, np.zeros(6, int))
    result = jax.device_get(generate(params, prompts, KEY))
    rows = whole_rows(completions_of(result))
    likeliest = full_logits(model, params, rows).argmax(-1)
    expected = naive_log_probs(model, params, rows, 1.0)
    for n, completion in enumerate(completions_of(result)):
        start, end = len(PROMPTS[n]), len(PROMPTS[n]) + len(completion)
        np.testing.assert_array_equal(completion, likeliest[n, start - 1 : end - 1])
        ours = result.log_probs[n, : len(completion)]
        np.testing.assert_allclose(ours, expected[n, start:end], atol=1e-4)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    draws = 20_000
    keys = jax.random.split(KEY, draws)
    for temperature, weights in ((1.0, [0.5, 0.3, 0.2]), (0.5, [0.25, 0.09, 0.04])):
        likely = np.array(weights) / sum(weights)
        rows = jnp.broadcast_to(logits, (draws, 3))
        tokens, log_probs = sample(rows, keys, temperature)
        shares = np.bincount(tokens, minlength=3) / draws
        np.testing.assert_allclose(shares, likely, atol=0.015)
        np.testing.assert_allclose(np.exp(log_probs), likely[tokens], rtol=1e-5)


def test_prompts_are_padded_to_few_lengths() -> None:
    batch = pad_prompts([np.arange(1, 34), np.array([7])], [4, 5])
    assert batch.tokens.shape == (2, 64)
    assert batch.tokens[1].tolist() == [7] + [0] * 63
    assert batch.lengths.tolist() == [33, 1]
    assert batch.request_ids.tolist() == [4, 5]
    assert pad_prompts([np.ones(32, int)], [0]).tokens.shape == (1, 32)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        pad_prompts([np.array([7]), np.array([], int)], [0, 1])


def test_bad_sampling_settings_are_refused() -> None:
    with pytest.raises(UserError, match="max_new_tokens=0"):
        SamplingConfig(0)
    with pytest.raises(UserError, match="temperature=-1"):
        SamplingConfig(4, temperature=-1)
