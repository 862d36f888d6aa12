"""Masked reductions against NumPy on what the mask keeps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax import masked

NUMPY = {
    "total": np.sum,
    "mean": np.mean,
    "minimum": np.min,
    "maximum": np.max,
    "median": lambda x: np.quantile(x, 0.5, method="lower"),
    "first_quartile": lambda x: np.quantile(x, 0.25),
    "last_quartile": lambda x: np.quantile(x, 0.75),
    "lowest": lambda x: np.quantile(x, 0.0),
    "highest": lambda x: np.quantile(x, 1.0),
}
OURS: dict[str, Callable[..., jax.Array]] = {
    "total": masked.total,
    "mean": masked.mean,
    "minimum": masked.minimum,
    "maximum": masked.maximum,
    "median": masked.median,
    "first_quartile": lambda x, m, *empty: masked.quantile(x, m, 0.25, *empty),
    "last_quartile": lambda x, m, *empty: masked.quantile(x, m, 0.75, *empty),
    "lowest": lambda x, m, *empty: masked.quantile(x, m, 0.0, *empty),
    "highest": lambda x, m, *empty: masked.quantile(x, m, 1.0, *empty),
}
VALUES = np.random.default_rng(0).normal(size=(8, 7)).astype(np.float32)
# Row n keeps n values, here and there; row 0 is empty.
MASK = np.random.default_rng(1).permuted(np.arange(7) < np.arange(8)[:, None], axis=1)


@pytest.mark.parametrize("name", OURS)
def test_equals_numpy_on_the_kept_values(name: str) -> None:
    result = OURS[name](VALUES, MASK)[1:]
    kept = [row[keep] for row, keep in zip(VALUES[1:], MASK[1:], strict=True)]
    np.testing.assert_allclose(result, [NUMPY[name](x) for x in kept], rtol=1e-5)


@pytest.mark.parametrize("outside", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", OURS)
def test_values_outside_the_mask_never_matter(name: str, outside: float) -> None:
    spoilt = np.where(MASK, VALUES, np.float32(outside))
    np.testing.assert_array_equal(OURS[name](spoilt, MASK), OURS[name](VALUES, MASK))


@pytest.mark.parametrize("name", OURS)
def test_a_nan_inside_the_mask_shows(name: str) -> None:
    for place in np.argwhere(MASK):
        values = VALUES.copy()
        values[*place] = np.nan
        found = np.isnan(OURS[name](values, MASK))
        assert found.tolist() == [n == place[0] for n in range(len(MASK))]


@pytest.mark.parametrize("name", sorted(OURS.keys() - {"total"}))
def test_an_empty_mask_gives_the_stated_value(name: str) -> None:
    nowhere = np.zeros((2, 3), bool)
    values = np.full((2, 3), np.nan, np.float32)
    np.testing.assert_array_equal(OURS[name](values, nowhere), [0.0, 0.0])
    np.testing.assert_array_equal(OURS[name](values, nowhere, -2.5), [-2.5, -2.5])


def test_the_total_of_nothing_is_zero() -> None:
    assert masked.total(jnp.full(3, jnp.nan), jnp.zeros(3, bool)) == 0.0


@pytest.mark.parametrize("outside", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("name", OURS)
def test_gradients_are_finite_and_stay_inside_the_mask(
    name: str, outside: float
) -> None:
    spoilt = np.where(MASK, VALUES, np.float32(outside))
    gradient = jax.grad(lambda x: OURS[name](x, MASK).sum())(spoilt)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[~MASK], 0.0)
    # All of these move by as much as every kept value does, except for the total.
    moved = MASK.sum(-1)[1:] if name == "total" else 1.0
    np.testing.assert_allclose(gradient.sum(-1)[1:], moved, rtol=1e-5)


def test_median_of_an_even_count_is_the_lower_middle_value() -> None:
    assert masked.median(jnp.array([4.0, 1.0, 3.0, 2.0]), jnp.ones(4, bool)) == 2.0


def test_quantile_interpolates_between_neighbours() -> None:
    values, mask = jnp.array([10.0, 99.0, 20.0, 40.0]), jnp.array([1, 0, 1, 1], bool)
    # Kept are 10, 20, 40: a quarter lies half way from 10 to 20.
    assert masked.quantile(values, mask, 0.25) == 15.0
    assert masked.quantile(values, mask, 0.75) == 30.0


def test_every_reduction_works_without_a_leading_axis() -> None:
    for name, reduce in OURS.items():
        kept = VALUES[-1]
        result = reduce(kept, np.ones(7, bool))
        np.testing.assert_allclose(result, NUMPY[name](kept), rtol=1e-5)
