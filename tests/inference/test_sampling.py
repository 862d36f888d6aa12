"""Which tokens can be sampled, how often they are, and their log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.errors import UserError
from rlt_jax.inference.sampling import SamplingConfig, _filter, sample

SAMPLE = jax.jit(sample, static_argnames="config")
FILTERED = jax.jit(_filter, static_argnums=1)
PROBS = (0.4, 0.3, 0.15, 0.1, 0.05)


def sample_many(
    logits: np.ndarray, count: int, seen: tuple[int, ...] = (), **settings: float
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [count] and their log-probs, all from the same logits [V]."""
    V = len(logits)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, V))
    marks = np.zeros((count, V), bool)
    marks[:, list(seen)] = True
    keys = jax.random.split(jax.random.key(1), count)
    tokens, log_probs = SAMPLE(rows, keys, SamplingConfig(1, **settings), marks)
    return np.asarray(tokens), np.asarray(log_probs)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_k": 9}, 5),
        ({"top_p": 0.05}, 1),
        ({"top_p": 0.69}, 2),
        ({"top_p": 0.71}, 3),
        ({"top_p": 0.96}, 5),
        ({"min_p": 1.0}, 1),
        ({"min_p": 0.37}, 3),
        ({"min_p": 0.38}, 2),
        ({"min_p": 0.12}, 5),
        # 0.4, 0.3 and 0.15 of 0.85: two of them reach 0.82, two of all only 0.7.
        ({"top_k": 3, "top_p": 0.8}, 2),
        ({"top_k": 4, "top_p": 0.99, "min_p": 0.3}, 3),
        # At half the temperature the probabilities are 0.56, 0.32, 0.08, 0.04 and 0.01.
        ({"temperature": 0.5, "top_p": 0.85}, 2),
        ({"temperature": 0.5, "min_p": 0.2}, 2),
        ({"temperature": 2.0, "min_p": 0.49}, 4),
    ],
)
def test_filters_by_hand(settings: dict[str, float], kept: int) -> None:
    config = SamplingConfig(1, **settings)
    order = np.array([3, 0, 4, 1, 2])
    scores = jnp.log(jnp.array(PROBS)[order])[None] / config.temperature
    stay = np.isfinite(FILTERED(scores, config)[0])
    assert set(order[stay]) == set(range(kept))


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}])
def test_tokens_as_likely_as_the_last_one_kept_stay(
    settings: dict[str, float],
) -> None:
    tokens, _ = sample_many(np.log([0.1, 0.3, 0.3, 0.3]), 100, **settings)
    assert set(tokens) == {1, 2, 3}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_have_the_frequencies_of_their_probabilities(temperature: float) -> None:
    # Three blocks of tokens, one of them with higher probabilities.
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 0.5, 300)
    logits[130:140] += 3
    logits[[0, 127, 128, 255, 256, 299]] += 4
    likely = np.exp(logits / temperature)
    likely /= likely.sum()
    tokens, log_probs = sample_many(logits, 40_000, temperature=temperature)
    shares = np.bincount(tokens, minlength=300) / 40_000
    # Five standard deviations of a share; a token in 300 may be rare.
    deviation = np.sqrt(likely * (1 - likely) / 40_000)
    assert (np.abs(shares - likely) < 5 * deviation + 1e-4).all()
    np.testing.assert_allclose(np.exp(log_probs), likely[tokens], rtol=1e-5)


def test_no_token_of_probability_zero_is_sampled() -> None:
    # Only the first and the last token of blocks 0 and 2, and nothing else at all.
    logits = np.full(390, -np.inf)
    logits[[0, 127, 256, 389]] = 0.0
    tokens, log_probs = sample_many(logits, 4000)
    assert set(tokens) == {0, 127, 256, 389}
    np.testing.assert_allclose(log_probs, np.log(0.25), rtol=1e-6)


def test_filters_leave_the_log_probs_alone() -> None:
    logits = np.log(PROBS)
    settings = {"top_k": 2, "repetition_penalty": 1.5}
    tokens, log_probs = sample_many(logits, 50, seen=(0,), **settings)
    np.testing.assert_allclose(log_probs, logits[tokens], rtol=1e-5)


def test_the_penalty_applies_to_tokens_that_were_seen() -> None:
    # 2 becomes 1 and -1 becomes -2: the odds are exp(1), exp(0), exp(-1), exp(-2).
    logits = np.array([2.0, 0.0, -1.0, -1.0])
    likely = np.exp([1.0, 0.0, -1.0, -2.0])
    likely /= likely.sum()
    tokens, _ = sample_many(logits, 20_000, seen=(0, 3), repetition_penalty=2.0)
    shares = np.bincount(tokens, minlength=4) / 20_000
    np.testing.assert_allclose(shares, likely, atol=0.015)
    greedy = {"temperature": 0, "repetition_penalty": 3.0}
    assert (sample_many([2.0, 1.0, 0.5], 3, seen=(0,), **greedy)[0] == 1).all()
    assert (sample_many([-2.0, -1.0, -4.0], 3, seen=(1,), **greedy)[0] == 0).all()


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    tokens, log_probs = sample_many(np.log([0.1, 0.4, 0.1, 0.4]), 3, temperature=0)
    assert tokens.tolist() == [1, 1, 1]
    np.testing.assert_allclose(np.exp(log_probs), 0.4, rtol=1e-5)


def test_a_sample_depends_on_its_own_key_and_logits_alone() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 1, (6, 200)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 6)
    config, nothing = SamplingConfig(1, top_p=0.9), np.zeros((6, 0), bool)
    tokens, log_probs = SAMPLE(logits, keys, config, nothing)
    order = np.array([4, 2, 5, 0, 1, 3])
    again, same = SAMPLE(logits[order], keys[order], config, nothing)
    np.testing.assert_array_equal(again, tokens[order])
    np.testing.assert_array_equal(same, log_probs[order])
    others, _ = SAMPLE(logits, jax.random.split(jax.random.key(1), 6), config, nothing)
    assert (others != tokens).any()


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 0.6},
    ],
)
def test_transformers_keeps_the_same_tokens(settings: dict[str, float]) -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    config = SamplingConfig(1, **settings)
    rows = np.random.default_rng(0).normal(0, 2, (200, 500)).astype(np.float32)
    rows /= config.temperature
    scores = torch.tensor(rows)
    if config.top_k:
        scores = processors.TopKLogitsWarper(config.top_k)(None, scores)
    if config.top_p < 1:
        scores = processors.TopPLogitsWarper(config.top_p)(None, scores)
    if config.min_p:
        scores = processors.MinPLogitsWarper(config.min_p)(None, scores)
    expected, ours = scores.numpy(), FILTERED(rows, config)
    assert np.isinf(expected).any() and np.isfinite(expected).any(axis=-1).all()
    np.testing.assert_array_equal(ours, expected)


def test_transformers_has_the_same_penalty() -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 2, (300, 60)).astype(np.float32)
    history = rng.integers(0, 60, (300, 12))
    penalty = processors.RepetitionPenaltyLogitsProcessor(1.7)
    expected = penalty(torch.tensor(history), torch.tensor(rows)).numpy().argmax(-1)
    seen = np.zeros(rows.shape, bool)
    seen[np.arange(300)[:, None], history] = True
    config = SamplingConfig(1, temperature=0, repetition_penalty=1.7)
    keys = jax.random.split(jax.random.key(0), 300)
    tokens, _ = SAMPLE(rows, keys, config, seen)
    assert (expected != rows.argmax(-1)).any()
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: at least 1"),
        ({"temperature": -1}, "temperature=-1: 0, or 0.001 to 1000"),
        ({"top_k": -1}, "top_k=-1: at least 0"),
        ({"top_p": 0}, "top_p=0: above 0, at most 1"),
        ({"top_p": 1.1}, "top_p=1.1: above 0, at most 1"),
        ({"min_p": -0.1}, "min_p=-0.1: at least 0, at most 1"),
        ({"min_p": 2}, "min_p=2: at least 0, at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: at least 1e-06"),
        ({"stop": "</end>"}, "stop='</end>': a list"),
        ({"stop": ["a", ""]}, r"stop=\['a', ''\]: a list, each not empty"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**{"max_new_tokens": 4, **settings})
