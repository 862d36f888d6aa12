"""KL estimators: numbers by hand, and their gradients on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.rl import kl


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
        return (p * kl.ESTIMATORS[name](log_ratio)).sum()  # sampled from a fixed p

    expected = of_the_kl * jax.grad(divergence)(scores)
    np.testing.assert_allclose(jax.grad(estimate)(scores), expected, atol=1e-6)


def test_k2_and_k3_are_never_negative() -> None:
    for estimator in (kl.k2, kl.k3):
        assert (estimator(jnp.linspace(-10, 10, 101)) >= 0).all()
