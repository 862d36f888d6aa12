"""Schedules at chosen steps, and the first AdamW steps by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from rlt_jax.errors import UserError
from rlt_jax.models.transformer import Transformer
from rlt_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from rlt_jax.training.state import apply_gradients, new_state, state_shardings
from rlt_jax.types import Params, TrainState


def rates(schedule: str, warmup_fraction: float, steps: list[int]) -> list[float]:
    config = OptimizerConfig(2.0, schedule, warmup_fraction)
    rate = make_schedule(config, 100)
    return [float(rate(step)) for step in steps]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_warm_up_rises_from_zero_to_the_peak(schedule: str) -> None:
    found = rates(schedule, 0.2, [0, 5, 10, 15, 20])
    np.testing.assert_allclose(found, [0, 0.5, 1.0, 1.5, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [2, 2, 2, 2]),
        # After 20 steps of warm-up, a quarter of the other 80 and so on.
        ("linear", [2, 1.5, 1, 0]),
        ("cosine", [2, 1 + np.cos(np.pi / 4), 1, 0]),
    ],
)
def test_what_follows_the_warm_up(schedule: str, expected: list[float]) -> None:
    found = rates(schedule, 0.2, [20, 40, 60, 100])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_without_warm_up_the_first_step_is_at_the_peak(schedule: str) -> None:
    assert rates(schedule, 0.0, [0]) == [2.0]


def test_a_run_may_be_all_warm_up() -> None:
    found = rates("cosine", 1.0, [0, 50, 99])
    np.testing.assert_allclose(found, [0, 1.0, 1.98], rtol=1e-6)


def test_an_unknown_schedule_is_refused() -> None:
    config = OptimizerConfig(1.0, schedule="sawtooth")
    with pytest.raises(UserError, match="'sawtooth': one of constant, cosine, linear"):
        make_optimizer(config, 10)


def update(config: OptimizerConfig, params: Params, grads: Params) -> Params:
    tx = make_optimizer(config, 10)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    return apply_gradients(state, grads, tx)[0].params


def test_the_first_step_by_hand() -> None:
    # Adam's first step is the sign of the gradient; decay is decoupled from it.
    config = OptimizerConfig(0.1, weight_decay=0.5, clip_norm=100.0)
    stepped = update(config, jnp.array([2.0, -4.0]), jnp.array([3.0, 0.5]))
    expected = [2 - 0.1 * (1 + 0.5 * 2), -4 - 0.1 * (1 + 0.5 * -4)]
    np.testing.assert_allclose(stepped, expected, rtol=1e-5)


def test_long_gradients_are_clipped_to_their_global_norm() -> None:
    tx = make_optimizer(OptimizerConfig(0.1, clip_norm=1.0), 10)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    _, opt_state = tx.update(grads, tx.init(params), params)
    (adam,) = (
        leaf
        for leaf in jax.tree.leaves(
            opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
        )
        if isinstance(leaf, optax.ScaleByAdamState)
    )
    # Norm 5 becomes 1; the moments start at (1 - b) times the gradient.
    np.testing.assert_allclose(adam.mu["a"], [0.1 * 0.6, 0], rtol=1e-5)
    np.testing.assert_allclose(adam.mu["b"], [0.1 * 0.8], rtol=1e-5)
    np.testing.assert_allclose(adam.nu["b"], [0.05 * 0.64], rtol=1e-5)


def test_a_step_is_counted_and_measured() -> None:
    tx = optax.sgd(0.5)
    params = jnp.array([1.0, 1.0])
    state = TrainState(jnp.int32(4), params, tx.init(params))
    state, metrics = apply_gradients(state, jnp.array([3.0, 4.0]), tx)
    assert state.step == 5
    np.testing.assert_allclose(state.params, [-0.5, -1.0])
    assert metrics["optimizer/gradient_norm"] == 5.0
    assert metrics["optimizer/update_norm"] == 2.5


@pytest.mark.parametrize(
    ("gradient", "loss", "max_norm"),
    [
        ([jnp.nan, 4.0], 0.0, None),
        ([jnp.inf, 4.0], 0.0, None),
        ([3.0, 4.0], jnp.nan, None),
        ([3.0, 4.0], jnp.inf, None),
        ([3.0, 4.0], 0.0, 4.9),
    ],
)
def test_a_step_in_doubt_changes_no_bit(
    gradient: list[float], loss: float, max_norm: float | None
) -> None:
    tx = make_optimizer(OptimizerConfig(0.1), 10)
    params = {"a": jnp.array([1.0, -0.0])}
    state = TrainState(jnp.int32(4), params, tx.init(params))
    state, _ = apply_gradients(state, {"a": jnp.array([0.1, 0.0])}, tx)
    grads = {"a": jnp.array(gradient)}
    after, metrics = apply_gradients(state, grads, tx, jnp.float32(loss), max_norm)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    assert metrics["optimizer/skipped"] == 1.0
    assert metrics["optimizer/update_norm"] == 0.0


def test_a_long_gradient_within_the_bound_is_followed() -> None:
    tx = optax.sgd(0.5)
    state = TrainState(jnp.int32(0), jnp.array([1.0, 1.0]), tx.init(jnp.zeros(2)))
    state, metrics = apply_gradients(state, jnp.array([3.0, 4.0]), tx, 1.0, 5.0)
    np.testing.assert_allclose(state.params, [-0.5, -1.0])
    assert metrics["optimizer/skipped"] == 0.0


def test_a_new_state_owns_its_parameters(
    model: Transformer, params: Params, mesh: Mesh
) -> None:
    tx = make_optimizer(OptimizerConfig(0.1), 10)
    shardings = state_shardings(model, tx, mesh)
    state = new_state(params, tx, shardings)
    assert state.step == 0
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    # Donated to a step, as training does, the given parameters live on.
    zeros = jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0)
    zeros(state)
    for leaf in jax.tree.leaves(params):
        assert not leaf.is_deleted() and np.abs(leaf).max() > 0
