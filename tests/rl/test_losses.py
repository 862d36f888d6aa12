"""Losses of tokens: numbers by hand, gradients by another formula."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.errors import UserError
from rlt_jax.rl import kl
from rlt_jax.rl.losses import (
    ObjectiveConfig,
    importance_weights,
    policy_metrics,
    token_loss,
)
from rlt_jax.types import Batch

RNG = np.random.default_rng(0)
LOG_PROBS, REFERENCE, ADVANTAGES = (
    RNG.normal(-2, 1, (3, 4)).astype(np.float32),
    RNG.normal(-2, 1, (3, 4)).astype(np.float32),
    RNG.normal(0, 1, (3, 4)).astype(np.float32),
)


def batch_of(
    advantages: Any,
    log_probs: Any,
    ref: Any = None,
    sampler: Any = None,
    inverse_length: Any = None,
    segment_ids: Any = None,
) -> Batch:
    """What `token_loss` reads; `log_probs` are those at the time of the rollout."""
    fields = {
        "advantages": advantages,
        "log_probs": log_probs,
        "ref_log_probs": ref,
        "sampler_log_probs": sampler,
        "inverse_length": inverse_length,
        "segment_ids": segment_ids,
    }
    known = {name: jnp.asarray(x) for name, x in fields.items() if x is not None}
    known.setdefault("segment_ids", None)
    return Batch(tokens=None, positions=None, num_micro_batches=None, **known)


def test_loss_by_hand() -> None:
    # ratio 1.25; k3 of log(0.5 / 0.25) is 0.5 - 1 + log 2.
    batch = batch_of(2.0, jnp.log(0.4), jnp.log(0.25))
    loss = token_loss(ObjectiveConfig(beta=0.1), jnp.log(0.5), batch)
    np.testing.assert_allclose(loss, -(1.25 * 2 - 0.1 * 0.1931472), rtol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "divergence"), [("k1", 0.6931472), ("k2", 0.2402265)]
)
def test_the_kl_by_the_other_estimators(estimator: str, divergence: float) -> None:
    batch = batch_of(0.0, jnp.log(0.5), jnp.log(0.25))
    objective = ObjectiveConfig(beta=0.1, kl_estimator=estimator)
    loss = token_loss(objective, jnp.log(0.5), batch)
    np.testing.assert_allclose(loss, 0.1 * divergence, rtol=1e-6)


def test_without_beta_there_need_be_no_reference() -> None:
    loss = token_loss(ObjectiveConfig(beta=0.0), 0.0, batch_of(3.0, 0.0))
    assert loss == -3.0


def test_on_policy_the_loss_is_minus_the_advantage_and_the_kl() -> None:
    batch = batch_of(ADVANTAGES, LOG_PROBS, REFERENCE)
    loss = token_loss(ObjectiveConfig(), LOG_PROBS, batch)
    expected = 0.04 * kl.k3(LOG_PROBS - REFERENCE) - ADVANTAGES
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.2, 1e6])
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
def test_on_policy_the_gradient_is_that_of_reinforce_and_the_kl(
    beta: float, clip: float | None
) -> None:
    objective = ObjectiveConfig(beta=beta, clip_low=clip, clip_high=clip)
    batch = batch_of(ADVANTAGES, LOG_PROBS, REFERENCE)

    def loss(log_probs: jax.Array) -> jax.Array:
        return token_loss(objective, log_probs, batch).sum()

    def reinforce(log_probs: jax.Array) -> jax.Array:
        surrogate = -(ADVANTAGES * log_probs)
        ratio = jnp.exp(REFERENCE - log_probs)
        return (surrogate + beta * (ratio - (REFERENCE - log_probs) - 1)).sum()

    np.testing.assert_allclose(
        jax.grad(loss)(LOG_PROBS), jax.grad(reinforce)(LOG_PROBS), rtol=1e-5, atol=1e-6
    )


def test_a_likelier_token_of_positive_advantage_lowers_the_loss() -> None:
    def loss(log_prob: float, advantage: float) -> jax.Array:
        batch = batch_of(advantage, -2.0)
        return token_loss(ObjectiveConfig(beta=0.0), log_prob, batch)

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
    batch = batch_of(advantage, 0.0)
    value, gradient = jax.value_and_grad(
        lambda log_prob: token_loss(objective, log_prob, batch)
    )(jnp.log(ratio))
    np.testing.assert_allclose(value, -gain, rtol=1e-6)
    np.testing.assert_allclose(gradient, -slope * ratio, rtol=1e-6)


def test_one_clip_may_be_off() -> None:
    above = ObjectiveConfig(beta=0.0, clip_high=0.2)
    batch = batch_of([1.0, -1.0], [0.0, 0.0])
    loss = token_loss(above, jnp.log(jnp.array([9.0, 1e-3])), batch)
    np.testing.assert_allclose(loss, [-1.2, 1e-3], rtol=1e-5)


# One row: prompt, two tokens; prompt, one token; padding.
ROW = {"inverse_length": [0, 0.5, 0.5, 0, 1, 0], "segment_ids": [1, 1, 1, 2, 2, 0]}
RATIOS = jnp.array([7.0, 2.0, 8.0, 7.0, 0.25, 7.0])


def test_the_sequence_ratio_is_the_geometric_mean_of_a_completion() -> None:
    advantages = jnp.array([0, 1.0, 1.0, 0, -1.0, 0])
    objective = ObjectiveConfig(loss="gspo", beta=0.0)
    batch = batch_of(advantages, jnp.zeros(6), **ROW)
    loss = token_loss(objective, jnp.log(RATIOS), batch)
    np.testing.assert_allclose(loss, [0, -4, -4, 0, 0.25, 0], rtol=1e-6)
    # The gradient of a completion's mean loss is spread evenly over its tokens.
    gradient = jax.grad(
        lambda log_probs: (
            token_loss(objective, log_probs, batch) * batch.inverse_length
        ).sum()
    )(jnp.log(RATIOS))
    np.testing.assert_allclose(gradient, [0, -2, -2, 0, 0.25, 0], rtol=1e-6)


def test_sequence_ratios_are_clipped_whole() -> None:
    objective = ObjectiveConfig(loss="gspo", beta=0.0, clip_low=0.1, clip_high=0.5)
    batch = batch_of(jnp.array([0, 1.0, 1.0, 0, -1.0, 0]), jnp.zeros(6), **ROW)
    loss = token_loss(objective, jnp.log(RATIOS), batch)
    np.testing.assert_allclose(loss, [0, -1.5, -1.5, 0, 0.9, 0], rtol=1e-6)


def test_importance_weights_by_hand() -> None:
    batch = batch_of(
        [1.0, 1.0, -1.0],
        jnp.log(jnp.array([0.3, 0.9, 0.2])),
        sampler=jnp.log(jnp.array([0.4, 0.1, 0.2])),
    )
    weights = importance_weights(2.0, batch)
    np.testing.assert_allclose(weights, [0.75, 2.0, 1.0], rtol=1e-6)
    objective = ObjectiveConfig(beta=0.0, importance_cap=2.0)
    loss = token_loss(objective, batch.log_probs, batch)
    np.testing.assert_allclose(loss, [-0.75, -2.0, 1.0], rtol=1e-6)


def test_importance_weights_leave_the_kl_alone() -> None:
    batch = batch_of(0.0, jnp.log(0.5), jnp.log(0.25), sampler=jnp.log(0.1))
    objective = ObjectiveConfig(beta=1.0, importance_cap=3.0)
    loss = token_loss(objective, jnp.log(0.5), batch)
    np.testing.assert_allclose(loss, 0.1931472, rtol=1e-6)


def test_the_policy_among_the_others() -> None:
    # Completions of 2 tokens and 1 token; the prompts around them never matter.
    def log(*values: float) -> jnp.ndarray:
        return jnp.log(jnp.array([[values]]))

    batch = batch_of(
        [[[0, 1.0, 1.0, 0, -1.0, 0]]],
        log(0.1, 0.1, 0.2, 0.9, 0.4, 1.0),
        ref=log(0.1, 0.2, 0.4, 0.1, 0.8, 1.0),
        sampler=log(0.1, 0.05, 0.2, 0.1, 0.8, 1.0),
        inverse_length=[[[0, 0.5, 0.5, 0, 1.0, 0]]],
        segment_ids=[[[1, 1, 1, 2, 2, 0]]],
    )
    objective = ObjectiveConfig(clip_low=0.2, clip_high=0.2, importance_cap=1.5)
    metrics = policy_metrics(objective, log(0.9, 0.2, 0.2, 0.1, 0.2, 1.0), batch, 2)
    expected = {
        "policy/ratio_mean": ((2 + 1) / 2 + 0.5) / 2,
        "policy/ratio_max": 2.0,
        "policy/clip_fraction": (0.5 + 1) / 2,
        "policy/kl_to_reference": ((np.log(1) + np.log(1 / 2)) / 2 + np.log(1 / 4)) / 2,
        "policy/sampler_difference": (np.log(2) / 2 + np.log(2)) / 2,
        "policy/importance_weight_mean": ((1.5 + 1) / 2 + 0.5) / 2,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ppo"}, "loss='ppo': one of grpo, dr_grpo, dapo, gspo"),
        ({"advantage": "gae"}, "advantage='gae': one of group, centred, rloo"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4': one of k1, k2, k3"),
        ({"truncated": "drop"}, "truncated='drop': one of keep, mask"),
        ({"beta": -1.0}, "beta=-1.0: at least 0"),
        ({"beta": float("nan")}, "beta=nan: at least 0"),
        ({"clip_low": 0.0}, "clip_low=0.0: at least 1e-06"),
        ({"importance_cap": -2.0}, "importance_cap=-2.0: at least 1e-06"),
        ({"skip_gradient_norm": 0}, "skip_gradient_norm=0: at least 1e-06"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ObjectiveConfig(**settings)
