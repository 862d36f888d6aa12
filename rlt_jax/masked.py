"""Masked reductions over the last axis.

Every function takes values [..., T] and a bool mask [..., T]. Where the mask is all False
the result is `empty`. Values outside the mask are ignored, also infinities and NaNs.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def _fill(result: Array, mask: Array, empty: float) -> Array:
    return jnp.where(mask.any(-1), result, empty)


def total(values: Array, mask: Array) -> Array:
    """Masked sum; 0 where the mask is empty."""
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1)


def mean(values: Array, mask: Array, empty: float = 0.0) -> Array:
    """Masked mean."""
    return _fill(total(values, mask) / jnp.maximum(mask.sum(-1), 1), mask, empty)


def minimum(values: Array, mask: Array, empty: float = 0.0) -> Array:
    """Masked minimum."""
    return _fill(jnp.min(jnp.where(mask, values, jnp.inf), axis=-1), mask, empty)


def maximum(values: Array, mask: Array, empty: float = 0.0) -> Array:
    """Masked maximum."""
    return _fill(jnp.max(jnp.where(mask, values, -jnp.inf), axis=-1), mask, empty)


def quantile(
    values: Array, mask: Array, q: float, empty: float = 0.0, method: str = "linear"
) -> Array:
    """Masked q-quantile with linear interpolation, or another of NumPy's methods."""
    found = jnp.nanquantile(jnp.where(mask, values, jnp.nan), q, axis=-1, method=method)
    is_nan = (mask & jnp.isnan(values)).any(-1)  # shows in the result, as in a mean
    return _fill(jnp.where(is_nan, jnp.nan, found), mask, empty)


def median(values: Array, mask: Array, empty: float = 0.0) -> Array:
    """Masked lower median: the smaller of the two middle values for an even count."""
    return quantile(values, mask, 0.5, empty, "lower")
