"""Reductions under a mask: the only averaging code.

Every function takes values [..., T] and a bool mask of the same shape and reduces the
last axis. Where the mask is empty the result is `empty`, finite by default; values
outside the mask never matter, infinities and NaNs included.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def _fill(result: Array, mask: Array, empty: float) -> Array:
    return jnp.where(mask.any(-1), result, empty)


def total(values: Array, mask: Array) -> Array:
    """Sum over the mask; 0 where it is empty."""
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1)


def mean(values: Array, mask: Array, empty: float = 0.0) -> Array:
    """Mean over the mask."""
    count = jnp.maximum(mask.sum(-1), 1)
    return _fill(total(values, mask) / count, mask, empty)


def minimum(values: Array, mask: Array, empty: float = 0.0) -> Array:
    """Smallest value under the mask."""
    return _fill(jnp.min(jnp.where(mask, values, jnp.inf), axis=-1), mask, empty)


def maximum(values: Array, mask: Array, empty: float = 0.0) -> Array:
    """Largest value under the mask."""
    return _fill(jnp.max(jnp.where(mask, values, -jnp.inf), axis=-1), mask, empty)


def std(values: Array, mask: Array, empty: float = 0.0) -> Array:
    """Unbiased (n - 1) standard deviation; `empty` below two values."""
    centre = mean(values, mask)[..., None]
    square = total(jnp.where(mask, values - centre, 0.0) ** 2, mask)
    count = mask.sum(-1)
    result = jnp.sqrt(square / jnp.maximum(count - 1, 1))
    return jnp.where(count > 1, result, empty)


def _sorted(values: Array, mask: Array) -> Array:
    return jnp.sort(jnp.where(mask, values, jnp.inf), axis=-1)


def quantile(values: Array, mask: Array, q: float, empty: float = 0.0) -> Array:
    """q-quantile with linear interpolation between neighbours."""
    ordered = _sorted(values, mask)
    place = q * jnp.maximum(mask.sum(-1) - 1, 0).astype(jnp.float32)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.ceil(place).astype(jnp.int32)
    take = jnp.take_along_axis
    below = take(ordered, low[..., None], axis=-1)[..., 0]
    above = take(ordered, high[..., None], axis=-1)[..., 0]
    weight = place - low
    between = jnp.where(high > low, below * (1 - weight) + above * weight, below)
    return _fill(between, mask, empty)


def median(values: Array, mask: Array, empty: float = 0.0) -> Array:
    """Lower median: of an even count, the smaller of the two middle values."""
    place = jnp.maximum(mask.sum(-1) - 1, 0) // 2
    middle = jnp.take_along_axis(_sorted(values, mask), place[..., None], axis=-1)
    return _fill(middle[..., 0], mask, empty)
