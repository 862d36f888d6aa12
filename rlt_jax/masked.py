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


def std(values: Array, mask: Array, empty: float = 0.0) -> Array:
    """Masked unbiased (n - 1) standard deviation; `empty` for fewer than two values."""
    center = mean(values, mask)[..., None]
    square = total(jnp.where(mask, values - center, 0.0) ** 2, mask)
    count = mask.sum(-1)
    return jnp.where(count > 1, jnp.sqrt(square / jnp.maximum(count - 1, 1)), empty)


def _sorted(values: Array, mask: Array) -> Array:
    return jnp.sort(jnp.where(mask, values, jnp.inf), axis=-1)


def _at(values: Array, index: Array) -> Array:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def quantile(values: Array, mask: Array, q: float, empty: float = 0.0) -> Array:
    """Masked q-quantile with linear interpolation."""
    position = q * jnp.maximum(mask.sum(-1) - 1, 0).astype(jnp.float32)
    low = jnp.floor(position).astype(jnp.int32)
    high = jnp.ceil(position).astype(jnp.int32)
    ordered = _sorted(values, mask)
    below, above = (_at(ordered, index) for index in (low, high))
    weight = position - low
    between = jnp.where(high > low, below * (1 - weight) + above * weight, below)
    return _fill(between, mask, empty)


def median(values: Array, mask: Array, empty: float = 0.0) -> Array:
    """Masked lower median: the smaller of the two middle values for an even count."""
    index = jnp.maximum(mask.sum(-1) - 1, 0) // 2
    return _fill(_at(_sorted(values, mask), index), mask, empty)
