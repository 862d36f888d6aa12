"""Estimators of a KL divergence from the log-probabilities of sampled tokens.

With `log_ratio = log p(x) - log q(x)` for x drawn from p, each estimates KL(p || q) per
token (Schulman, "Approximating KL Divergence", 2020).
"""

import jax
import jax.numpy as jnp


def k1(log_ratio: jax.Array) -> jax.Array:
    """Unbiased, may be negative: log p - log q."""
    return log_ratio


def k3(log_ratio: jax.Array) -> jax.Array:
    """Unbiased and never negative: q/p - 1 - log(q/p)."""
    return jnp.exp(-log_ratio) - 1 + log_ratio


ESTIMATORS = {"k1": k1, "k3": k3}
