"""Estimators of a KL divergence from the log-probabilities of sampled tokens.

With `log_ratio = log p(x) - log q(x)` for x drawn from p, each estimates KL(p || q) per
token (Schulman, "Approximating KL Divergence", 2020). As a term of a loss they differ in
their gradients too: that of k1 is 0 on average, that of k2 is the gradient of KL(p || q)
on average, that of k3 is bounded where p is the likelier.
"""

import jax.numpy as jnp

from rlt_jax.types import Array


def k1(log_ratio: Array) -> Array:
    """Unbiased, may be negative: log p - log q."""
    return log_ratio


def k2(log_ratio: Array) -> Array:
    """Biased but never negative and of low variance: (log p - log q)^2 / 2."""
    return log_ratio**2 / 2


def k3(log_ratio: Array) -> Array:
    """Unbiased and never negative: q/p - 1 - log(q/p)."""
    return jnp.exp(-log_ratio) - 1 + log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
