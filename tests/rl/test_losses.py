"""KL estimators and the GRPO loss: numbers by hand, gradients by another formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.rl import kl
from rlt_jax.rl.losses import grpo_token_loss

RNG = np.random.default_rng(0)
LOG_PROBS, REFERENCE, ADVANTAGES = (
    RNG.normal(-2, 1, (3, 4)).astype(np.float32),
    RNG.normal(-2, 1, (3, 4)).astype(np.float32),
    RNG.normal(0, 1, (3, 4)).astype(np.float32),
)


def test_estimators_by_hand() -> None:
    log_ratio = jnp.log(jnp.array([2.0, 0.5, 1.0]))
    np.testing.assert_allclose(kl.k1(log_ratio), [0.6931472, -0.6931472, 0], atol=1e-6)
    # q/p - 1 - log(q/p) with q/p = 1/2, 2, 1.
    np.testing.assert_allclose(kl.k3(log_ratio), [0.1931472, 0.3068528, 0], atol=1e-6)


@pytest.mark.parametrize("name", kl.ESTIMATORS)
def test_estimators_are_unbiased(name: str) -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    divergence = (p * np.log(p / q)).sum()
    estimates = kl.ESTIMATORS[name](jnp.log(p / q))
    np.testing.assert_allclose((p * estimates).sum(), divergence, rtol=1e-5)


def test_k3_is_never_negative() -> None:
    assert (kl.k3(jnp.linspace(-10, 10, 101)) >= 0).all()


def test_loss_by_hand() -> None:
    # ratio 1.25; k3 of log(0.5 / 0.25) is 0.5 - 1 + log 2.
    loss = grpo_token_loss(
        jnp.log(0.5), jnp.log(0.4), jnp.log(0.25), advantages=2.0, beta=0.1
    )
    np.testing.assert_allclose(loss, -(1.25 * 2 - 0.1 * 0.1931472), rtol=1e-6)


def test_on_policy_the_loss_is_minus_the_advantage_and_the_kl() -> None:
    loss = grpo_token_loss(LOG_PROBS, LOG_PROBS, REFERENCE, ADVANTAGES, 0.04)
    expected = 0.04 * kl.k3(LOG_PROBS - REFERENCE) - ADVANTAGES
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
def test_on_policy_the_gradient_is_that_of_reinforce_and_the_kl(beta: float) -> None:
    def loss(log_probs: jax.Array) -> jax.Array:
        return grpo_token_loss(log_probs, LOG_PROBS, REFERENCE, ADVANTAGES, beta).sum()

    def reinforce(log_probs: jax.Array) -> jax.Array:
        surrogate = -(ADVANTAGES * log_probs)
        ratio = jnp.exp(REFERENCE - log_probs)
        return (surrogate + beta * (ratio - (REFERENCE - log_probs) - 1)).sum()

    np.testing.assert_allclose(
        jax.grad(loss)(LOG_PROBS), jax.grad(reinforce)(LOG_PROBS), rtol=1e-5, atol=1e-6
    )


def test_a_likelier_token_of_positive_advantage_lowers_the_loss() -> None:
    def loss(log_prob: float, advantage: float) -> jax.Array:
        return grpo_token_loss(log_prob, -2.0, -2.0, advantage, beta=0.0)

    assert loss(-1.5, 1.0) < loss(-2.0, 1.0) < loss(-2.5, 1.0)
    assert loss(-1.5, -1.0) > loss(-2.0, -1.0) > loss(-2.5, -1.0)
