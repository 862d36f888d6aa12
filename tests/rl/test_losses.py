"""KL estimators, losses and weights: numbers by hand, gradients by another formula."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rlt_jax.data.packing import gather_spans

from rlt_jax.errors import UserError
from rlt_jax.rl import kl
from rlt_jax.rl.losses import (
    LOSSES,
    LossTokens,
    ObjectiveConfig,
    counted_completions,
    importance_weights,
    token_loss,
    token_weights,
)

RNG = np.random.default_rng(0)
LOG_PROBS, REFERENCE, ADVANTAGES = (
    RNG.normal(-2, 1, (3, 4)).astype(np.float32),
    RNG.normal(-2, 1, (3, 4)).astype(np.float32),
    RNG.normal(0, 1, (3, 4)).astype(np.float32),
)


def test_estimators_by_hand() -> None:
    log_ratio = jnp.log(jnp.array([2.0, 0.5, 1.0]))
    np.testing.assert_allclose(kl.k1(log_ratio), [0.6931472, -0.6931472, 0], atol=1e-6)
    # (log 2)^2 / 2.
    np.testing.assert_allclose(kl.k2(log_ratio), [0.2402265, 0.2402265, 0], atol=1e-6)
    # q/p - 1 - log(q/p) with q/p = 1/2, 2, 1.
    np.testing.assert_allclose(kl.k3(log_ratio), [0.1931472, 0.3068528, 0], atol=1e-6)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_estimators_are_unbiased(name: str) -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    divergence = (p * np.log(p / q)).sum()
    estimates = kl.ESTIMATORS[name](jnp.log(p / q))
    np.testing.assert_allclose((p * estimates).sum(), divergence, rtol=1e-5)


@pytest.mark.parametrize(("name", "of_the_kl"), [("k1", 0.0), ("k2", 1.0)])
def test_gradients_of_estimators_on_average(name: str, of_the_kl: float) -> None:
    scores, q = jnp.array([0.3, -0.2, 0.5]), jnp.array([0.2, 0.2, 0.6])
    p = jax.nn.softmax(scores)

    def divergence(scores: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(scores)
        return (jnp.exp(log_p) * (log_p - jnp.log(q))).sum()

    def estimate(scores: jax.Array) -> jax.Array:
        log_ratio = jax.nn.log_softmax(scores) - jnp.log(q)
        return (p * kl.ESTIMATORS[name](log_ratio)).sum()  # drawn from a fixed p

    expected = of_the_kl * jax.grad(divergence)(scores)
    np.testing.assert_allclose(jax.grad(estimate)(scores), expected, atol=1e-6)


def test_k2_and_k3_are_never_negative() -> None:
    for estimator in (kl.k2, kl.k3):
        assert (estimator(jnp.linspace(-10, 10, 101)) >= 0).all()


def tokens_of(
    advantages: Any,
    old: Any,
    ref: Any = None,
    sampler: Any = None,
    shares: Any = None,
    segment_ids: Any = None,
) -> LossTokens:
    """Arrays for `token_loss`; one token to a line unless segments are given."""
    arrays = (advantages, shares, segment_ids, old, ref, sampler)
    return LossTokens(*(None if x is None else jnp.asarray(x) for x in arrays))


def test_loss_by_hand() -> None:
    # ratio 1.25; k3 of log(0.5 / 0.25) is 0.5 - 1 + log 2.
    tokens = tokens_of(2.0, jnp.log(0.4), jnp.log(0.25))
    loss = token_loss(ObjectiveConfig(beta=0.1), jnp.log(0.5), tokens)
    np.testing.assert_allclose(loss, -(1.25 * 2 - 0.1 * 0.1931472), rtol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "divergence"), [("k1", 0.6931472), ("k2", 0.2402265)]
)
def test_the_kl_by_the_other_estimators(estimator: str, divergence: float) -> None:
    tokens = tokens_of(0.0, jnp.log(0.5), jnp.log(0.25))
    objective = ObjectiveConfig(beta=0.1, kl_estimator=estimator)
    loss = token_loss(objective, jnp.log(0.5), tokens)
    np.testing.assert_allclose(loss, 0.1 * divergence, rtol=1e-6)


def test_without_beta_there_need_be_no_reference() -> None:
    loss = token_loss(ObjectiveConfig(beta=0.0), 0.0, tokens_of(3.0, 0.0))
    assert loss == -3.0


def test_on_policy_the_loss_is_minus_the_advantage_and_the_kl() -> None:
    tokens = tokens_of(ADVANTAGES, LOG_PROBS, REFERENCE)
    loss = token_loss(ObjectiveConfig(), LOG_PROBS, tokens)
    expected = 0.04 * kl.k3(LOG_PROBS - REFERENCE) - ADVANTAGES
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.2, 1e9])
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
def test_on_policy_the_gradient_is_that_of_reinforce_and_the_kl(
    beta: float, clip: float | None
) -> None:
    objective = ObjectiveConfig(beta=beta, clip_low=clip, clip_high=clip)
    tokens = tokens_of(ADVANTAGES, LOG_PROBS, REFERENCE)

    def loss(log_probs: jax.Array) -> jax.Array:
        return token_loss(objective, log_probs, tokens).sum()

    def reinforce(log_probs: jax.Array) -> jax.Array:
        surrogate = -(ADVANTAGES * log_probs)
        ratio = jnp.exp(REFERENCE - log_probs)
        return (surrogate + beta * (ratio - (REFERENCE - log_probs) - 1)).sum()

    np.testing.assert_allclose(
        jax.grad(loss)(LOG_PROBS), jax.grad(reinforce)(LOG_PROBS), rtol=1e-5, atol=1e-6
    )


def test_a_likelier_token_of_positive_advantage_lowers_the_loss() -> None:
    def loss(log_prob: float, advantage: float) -> jax.Array:
        tokens = tokens_of(advantage, -2.0)
        return token_loss(ObjectiveConfig(beta=0.0), log_prob, tokens)

    assert loss(-1.5, 1.0) < loss(-2.0, 1.0) < loss(-2.5, 1.0)
    assert loss(-1.5, -1.0) > loss(-2.0, -1.0) > loss(-2.5, -1.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [  # slope: of the gain in the ratio
        (1.1, 2.0, 2.2, 2.0),
        (1.5, 2.0, 2.56, 0.0),  # above 1.28, better stays unrewarded
        (1.5, -2.0, -3.0, -2.0),  # but worse is still punished
        (0.5, 2.0, 1.0, 2.0),
        (0.5, -2.0, -1.6, 0.0),  # below 0.8
    ],
)
def test_clips_by_hand(
    ratio: float, advantage: float, gain: float, slope: float
) -> None:
    objective = ObjectiveConfig(beta=0.0, clip_low=0.2, clip_high=0.28)
    tokens = tokens_of(advantage, 0.0)
    value, gradient = jax.value_and_grad(
        lambda log_prob: token_loss(objective, log_prob, tokens)
    )(jnp.log(ratio))
    np.testing.assert_allclose(value, -gain, rtol=1e-6)
    np.testing.assert_allclose(gradient, -slope * ratio, rtol=1e-6)


def test_one_clip_may_be_off() -> None:
    above = ObjectiveConfig(beta=0.0, clip_high=0.2)
    tokens = tokens_of([1.0, -1.0], [0.0, 0.0])
    loss = token_loss(above, jnp.log(jnp.array([9.0, 1e-3])), tokens)
    np.testing.assert_allclose(loss, [-1.2, 1e-3], rtol=1e-5)


# One line: prompt, two tokens; prompt, one token; padding.
LINE = {"shares": [0, 0.5, 0.5, 0, 1, 0], "segment_ids": [1, 1, 1, 2, 2, 0]}
RATIOS = jnp.array([7.0, 2.0, 8.0, 7.0, 0.25, 7.0])


def test_the_sequence_ratio_is_the_geometric_mean_of_a_completion() -> None:
    advantages = jnp.array([0, 1.0, 1.0, 0, -1.0, 0])
    objective = ObjectiveConfig(loss="gspo", beta=0.0)
    tokens = tokens_of(advantages, jnp.zeros(6), **LINE)
    loss = token_loss(objective, jnp.log(RATIOS), tokens)
    np.testing.assert_allclose(loss, [0, -4, -4, 0, 0.25, 0], rtol=1e-6)
    # The gradient of a completion's mean loss is spread evenly over its tokens.
    gradient = jax.grad(
        lambda log_probs: (
            token_loss(objective, log_probs, tokens) * tokens.shares
        ).sum()
    )(jnp.log(RATIOS))
    np.testing.assert_allclose(gradient, [0, -2, -2, 0, 0.25, 0], rtol=1e-6)


def test_sequence_ratios_are_clipped_whole() -> None:
    objective = ObjectiveConfig(loss="gspo", beta=0.0, clip_low=0.1, clip_high=0.5)
    tokens = tokens_of(jnp.array([0, 1.0, 1.0, 0, -1.0, 0]), jnp.zeros(6), **LINE)
    loss = token_loss(objective, jnp.log(RATIOS), tokens)
    np.testing.assert_allclose(loss, [0, -1.5, -1.5, 0, 0.9, 0], rtol=1e-6)


def test_importance_weights_by_hand() -> None:
    tokens = tokens_of(
        [1.0, 1.0, -1.0],
        jnp.log(jnp.array([0.3, 0.9, 0.2])),
        sampler=jnp.log(jnp.array([0.4, 0.1, 0.2])),
    )
    weights = importance_weights(2.0, tokens)
    np.testing.assert_allclose(weights, [0.75, 2.0, 1.0], rtol=1e-6)
    objective = ObjectiveConfig(beta=0.0, importance_cap=2.0)
    loss = token_loss(objective, tokens.old_log_probs, tokens)
    np.testing.assert_allclose(loss, [-0.75, -2.0, 1.0], rtol=1e-6)


def test_importance_weights_leave_the_kl_alone() -> None:
    tokens = tokens_of(0.0, jnp.log(0.5), jnp.log(0.25), sampler=jnp.log(0.1))
    objective = ObjectiveConfig(beta=1.0, importance_cap=3.0)
    loss = token_loss(objective, jnp.log(0.5), tokens)
    np.testing.assert_allclose(loss, 0.1931472, rtol=1e-6)


# Completions of 2, 1 and 0 tokens at the places 1, 2; 4 of one line of 6.
SPANS = gather_spans(np.array([1, 4, 0]), [np.arange(n) for n in (2, 1, 0)], 3)


@pytest.mark.parametrize(
    ("loss", "two", "one"),
    [
        ("grpo", 1 / 6, 1 / 3),  # mean over tokens, over 3 completions
        ("gspo", 1 / 6, 1 / 3),
        ("dapo", 1 / 3, 1 / 3),  # 3 tokens in all
        ("dr_grpo", 1 / 30, 1 / 30),  # 3 completions of at most 10 tokens
    ],
)
def test_weights_by_hand(loss: str, two: float, one: float) -> None:
    objective = ObjectiveConfig(loss=loss)
    everything = jnp.ones(3, bool)
    weights = token_weights(objective, SPANS, everything, 10, (1, 1, 6))
    np.testing.assert_allclose(weights, [[[0, two, two, 0, one, 0]]], rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "two"),
    # DAPO's mean is over the tokens that are left; the others divide as before.
    [("grpo", 1 / 6), ("gspo", 1 / 6), ("dapo", 1 / 2), ("dr_grpo", 1 / 30)],
)
def test_what_is_not_counted_weighs_nothing(loss: str, two: float) -> None:
    counted = jnp.array([True, False, True])
    weights = token_weights(ObjectiveConfig(loss=loss), SPANS, counted, 10, (1, 1, 6))
    np.testing.assert_allclose(weights, [[[0, two, two, 0, 0, 0]]], rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_nothing_at_all_are_finite(loss: str) -> None:
    weights = token_weights(
        ObjectiveConfig(loss=loss), SPANS, jnp.zeros(3, bool), 10, (1, 1, 6)
    )
    np.testing.assert_array_equal(weights, 0.0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"truncated": "mask"}, [1, 0, 1, 0]),
        ({"skip_equal_groups": True}, [0, 0, 1, 1]),
        ({"truncated": "mask", "skip_equal_groups": True}, [0, 0, 1, 0]),
    ],
)
def test_which_completions_count(settings: dict, expected: list[int]) -> None:
    rewards = jnp.array([0.5, 0.5, 0.5, 0.6])
    finished = jnp.array([True, False, True, False])
    objective = ObjectiveConfig(**settings)
    kept = counted_completions(objective, rewards, finished, 2)
    np.testing.assert_array_equal(kept, np.array(expected, bool))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ppo"}, "loss='ppo': one of grpo, dr_grpo, dapo, gspo"),
        ({"advantage": "gae"}, "advantage='gae': one of group, centred, rloo"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4': one of k1, k2, k3"),
        ({"truncated": "drop"}, "truncated='drop': one of keep, mask"),
        ({"beta": -1.0}, "beta=-1.0: at least 0"),
        ({"beta": float("nan")}, "beta=nan: at least 0"),
        ({"clip_low": 0.0}, "clip_low=0.0: above 0"),
        ({"importance_cap": -2.0}, "importance_cap=-2.0: above 0"),
        ({"skip_gradient_norm": 0}, "skip_gradient_norm=0: above 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ObjectiveConfig(**settings)
