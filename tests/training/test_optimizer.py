"""Schedules at chosen steps, first steps by hand, and what optimizers keep where."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.stages.sft import next_token_loss
from rlt_jax.training.learner import jit_update
from rlt_jax.training.lora import LoRAConfig, make_tuning
from rlt_jax.training.optimizer import (
    OPTIMIZERS,
    OptimizerConfig,
    make_optimizer,
    make_schedule,
    matrices,
)
from rlt_jax.training.state import (
    apply_gradients,
    check_updates,
    new_state,
    state_shardings,
)
from rlt_jax.types import Batch, Params, TrainState

# Wide enough that adafactor has something to factor.
WIDE = ModelConfig(
    vocab_size=40,
    embed_dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=128,
    max_length=32,
)
# The losses of three steps with every optimizer, and with adapters, on some devices.
ON_DEVICES = """
import sys
import jax, numpy as np
devices, target = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", devices)
jax.config.update("jax_disable_most_optimizations", True)
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.stages.sft import next_token_loss
from rlt_jax.training.learner import jit_update
from rlt_jax.training.lora import LoRAConfig, make_tuning
from rlt_jax.training.optimizer import *
from rlt_jax.training.sharding import *
from rlt_jax.training.state import *
from rlt_jax.types import Batch

sizes = MeshConfig(2, 2, 2) if devices == 8 else MeshConfig()
mesh, key = make_mesh(sizes), jax.random.key(0)
model = Transformer(ModelConfig(40, 128, 2, 4, 2, 8, 128, 32))
tokens = np.random.default_rng(0).integers(1, 40, (8, 9), np.int32)
positions = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
weights = ((positions > 0) / (positions > 0).sum()).astype(np.float32)
batch = Batch(tokens, positions, np.ones_like(tokens), None, loss_weights=weights)
batch = jax.tree.map(lambda x: x[None], batch)._replace(num_micro_batches=np.int32(1))
batch = put_rows(batch, mesh)
init = jax.jit(
    lambda: init_params(model.config, key), out_shardings=param_shardings(model, mesh)
)
losses = {}
for name, rank in (*((name, 0) for name in OPTIMIZERS), ("adamw", 4), ("muon", 4)):
    tuning, trained = make_tuning(LoRAConfig(rank), model, init(), mesh, key)
    tx = make_optimizer(OptimizerConfig(3e-3, name=name), 3)
    shardings = state_shardings(tuning.model, tx, mesh)
    state = new_state(trained, tx, shardings)
    update = jit_update(next_token_loss, tuning.model, tx, mesh, shardings)
    found = []
    for _ in range(3):
        state, metrics = update(state, batch, tuning.frozen)
        found.append(float(metrics["sft/loss"]))
    kept = jax.tree.map(lambda x, s: x.sharding == s, state, shardings)
    assert all(jax.tree.leaves(kept)), (name, kept)
    losses[f"{name} {rank}"] = found
np.savez(target, **losses)
"""


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
    with pytest.raises(UserError, match="'sawtooth': one of constant, cosine, linear"):
        OptimizerConfig(1.0, schedule="sawtooth")


def update(config: OptimizerConfig, params: Params, grads: Params) -> Params:
    tx = make_optimizer(config, 10)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.int32(0))
    return apply_gradients(state, grads, tx)[0].params


def test_the_first_step_by_hand() -> None:
    # Adam's first step is the sign of the gradient; decay is decoupled from it.
    config = OptimizerConfig(0.1, weight_decay=0.5, clip_norm=100.0)
    stepped = update(config, jnp.array([2.0, -4.0]), jnp.array([3.0, 0.5]))
    expected = [2 - 0.1 * (1 + 0.5 * 2), -4 - 0.1 * (1 + 0.5 * -4)]
    np.testing.assert_allclose(stepped, expected, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_and_biases_do_not_decay(name: str) -> None:
    config = ModelConfig(
        40,
        16,
        2,
        4,
        2,
        8,
        24,
        32,
        qkv_bias=True,
        qk_norm=True,
        out_bias=True,
        tie_embeddings=False,
    )
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.5, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    settings = OptimizerConfig(0.1, weight_decay=0.1, name=name)
    before = flatten_dict(params)
    after = flatten_dict(update(settings, params, zeros))
    kinds = {path[-1] for path in before}
    assert kinds == {"embedding", "output", "kernel", "bias", "scale"}
    for path, x in before.items():
        if path[-1] in ("bias", "scale"):
            assert np.asarray(x).tobytes() == np.asarray(after[path]).tobytes(), path
        else:
            np.testing.assert_allclose(after[path], 0.99 * x, rtol=1e-5, err_msg=path)


def test_adapters_decay(model: Transformer, params: Params, mesh: Mesh) -> None:
    _, adapters = make_tuning(LoRAConfig(2), model, params, mesh, jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    after = update(OptimizerConfig(0.1, weight_decay=0.1), adapters, zeros)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, after, jax.tree.map(lambda x: 0.99 * x, adapters))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_is_that_of_the_optimizer_without_a_mask(
    name: str, params: Params
) -> None:
    """So that runs of earlier versions continue."""
    config = OptimizerConfig(0.1, name=name)
    ours = make_optimizer(config, 10).init(params)
    schedule = make_schedule(config, 10)
    plain = optax.chain(
        optax.clip_by_global_norm(1.0), OPTIMIZERS[name](config, schedule)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(plain.init(params))


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
    state = TrainState(jnp.int32(4), params, tx.init(params), jnp.int32(0))
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
    state = TrainState(jnp.int32(4), params, tx.init(params), jnp.int32(0))
    state, _ = apply_gradients(state, {"a": jnp.array([0.1, 0.0])}, tx)
    grads = {"a": jnp.array(gradient)}
    after, metrics = apply_gradients(state, grads, tx, jnp.float32(loss), max_norm)
    assert after.skipped == metrics["optimizer/skipped_in_a_row"] == 1
    uncounted = after._replace(skipped=state.skipped)
    for old, new in zip(
        jax.tree.leaves(state), jax.tree.leaves(uncounted), strict=True
    ):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    assert metrics["optimizer/skipped"] == 1.0
    assert metrics["optimizer/update_norm"] == 0.0


def test_a_long_gradient_within_the_bound_is_followed() -> None:
    tx = optax.sgd(0.5)
    state = TrainState(
        jnp.int32(0), jnp.array([1.0, 1.0]), tx.init(jnp.zeros(2)), jnp.int32(0)
    )
    state, metrics = apply_gradients(state, jnp.array([3.0, 4.0]), tx, 1.0, 5.0)
    np.testing.assert_allclose(state.params, [-0.5, -1.0])
    assert metrics["optimizer/skipped"] == metrics["optimizer/skipped_in_a_row"] == 0


def test_steps_skipped_in_a_row_are_counted() -> None:
    tx = optax.sgd(0.5)
    state = TrainState(jnp.int32(0), jnp.ones(2), tx.init(jnp.zeros(2)), jnp.int32(0))
    rows = []
    for size in (jnp.nan, jnp.inf, 1.0, jnp.nan):
        state, metrics = apply_gradients(state, jnp.full(2, size), tx)
        rows.append(metrics)
    assert [int(m["optimizer/skipped_in_a_row"]) for m in rows] == [1, 2, 0, 1]
    assert check_updates({}, 2, False) and check_updates(rows[2], 2, True)
    # Weights that may be spoilt are not saved over good ones.
    assert not check_updates(rows[1], 2, False)
    with pytest.raises(
        UserError, match="2 updates in a row were skipped, the gradient"
    ):
        check_updates(rows[1], 1, False)
    with pytest.raises(UserError, match="1 updates in a row .*--resume_with_changes"):
        check_updates(rows[3], 2, True)


def test_what_was_not_finite_is_named() -> None:
    params, grads = jnp.ones(2), jnp.ones(2)
    tx = optax.sgd(jnp.nan)
    state = TrainState(jnp.int32(0), params, tx.init(params), jnp.int32(0))
    after, metrics = apply_gradients(state, grads, tx)
    assert np.array_equal(after.params, params)
    with pytest.raises(UserError, match="skipped, the update not being finite"):
        check_updates(metrics, 0, False)
    broken = {"optimizer/skipped_in_a_row": 3, "reward/solution_score_min": -np.inf}
    broken |= {"reward/value_mean": -np.inf, "policy/loss": np.nan}
    words = "log-probs of the solution, the reward, the policy's loss not being finite"
    with pytest.raises(UserError, match=words):
        check_updates(broken, 2, False)
    long = {"optimizer/skipped_in_a_row": 3, "optimizer/gradient_norm": 12.0}
    assert check_updates(long, 3, True)
    with pytest.raises(UserError, match="norm 12 being above objective.skip_gradient"):
        check_updates(long, 2, False)


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


def test_bfloat16_parameters_that_are_trained_are_warned_of(
    model: Transformer, params: Params, mesh: Mesh, caplog: pytest.LogCaptureFixture
) -> None:
    """At a learning rate of 1e-6 none of them changes."""
    tx = make_optimizer(OptimizerConfig(1e-6), 10)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    shardings = state_shardings(model, tx, mesh)
    new_state(params, tx, shardings)
    tuning, adapters = make_tuning(LoRAConfig(2), model, half, mesh, jax.random.key(0))
    new_state(adapters, tx, state_shardings(tuning.model, tx, mesh))
    assert not caplog.records
    new_state(half, tx, shardings)
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert 'Set model.param_dtype="float32"' in warning.getMessage()
    few = {"kernel": jnp.linspace(0.01, 0.1, 1000, dtype=jnp.bfloat16)}
    stepped = update(OptimizerConfig(1e-6), few, jax.tree.map(jnp.ones_like, few))
    np.testing.assert_array_equal(stepped["kernel"], few["kernel"])


def state_bytes(model: Transformer, **settings: Any) -> float:
    """Bytes of the optimizer's state for each byte of the parameters."""
    tx = make_optimizer(OptimizerConfig(0.1, **settings), 10)
    params = jax.eval_shape(lambda: init_params(model.config, jax.random.key(0)))
    trees = jax.eval_shape(tx.init, params), params
    state, parameters = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in trees
    )
    return state / parameters


def test_what_each_optimizer_keeps() -> None:
    model = Transformer(WIDE)
    half = {"state_dtype": "bfloat16"}
    assert state_bytes(model) == pytest.approx(2, abs=0.01)
    assert state_bytes(model, **half) == pytest.approx(1.5, abs=0.01)
    # Only the kernels of attention have no two axes of at least 128.
    assert state_bytes(model, name="adafactor") < 0.5
    assert 1 < state_bytes(model, name="muon") < 1.1
    assert 0.5 < state_bytes(model, name="muon", **half) < 0.6


def test_axes_that_muon_takes_for_a_matrix() -> None:
    config = ModelConfig(
        40, 16, 2, 4, 2, 8, 24, 32, tie_embeddings=False, qkv_bias=True
    )
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    found = matrices(params)
    layers = found.pop("layers")
    assert jax.tree.leaves(found) == []  # embedding, head, norm
    down = MuonDimensionNumbers(1, 2)
    heads = MuonDimensionNumbers(1, (2, 3))
    for name in ("query", "key", "value"):
        assert layers["attention"][name] == {"kernel": heads, "bias": None}
    out = MuonDimensionNumbers((1, 2), 3)
    assert layers["attention"]["out"] == {"kernel": out}
    assert layers["mlp"] == {name: {"kernel": down} for name in ("gate", "up", "down")}
    assert jax.tree.leaves([layers["attention_norm"], layers["mlp_norm"]]) == []


def test_muon_orthogonalises_every_layer_by_itself() -> None:
    rng = np.random.default_rng(0)
    kernel = {"layers": {"query": {"kernel": jnp.zeros((2, 16, 4, 8))}}}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), kernel)
    scaled = jax.tree.map(lambda x: x * jnp.array([1, 100])[:, None, None, None], grads)
    config = OptimizerConfig(0.1, name="muon", weight_decay=0.0, clip_norm=1e9)
    first, second = (
        update(config, kernel, one)["layers"]["query"]["kernel"]
        for one in (grads, scaled)
    )
    np.testing.assert_allclose(first, second, atol=1e-5)
    # Singular values around 0.2 * sqrt(32) * the learning rate.
    for layer in np.asarray(first).reshape(2, 16, 32):
        values = np.linalg.svd(layer, compute_uv=False) / (0.1 * 0.2 * 32**0.5)
        assert (values > 0.5).all() and (values < 1.5).all()


def test_factored_moments_are_whole_on_every_device(mesh: Mesh) -> None:
    tx = make_optimizer(OptimizerConfig(0.1, name="adafactor"), 10)
    model = Transformer(WIDE)
    shardings = state_shardings(model, tx, mesh)
    params = jax.eval_shape(lambda: init_params(WIDE, jax.random.key(0)))
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(shardings.opt_state)
    factored, specs = (
        next(
            leaf
            for leaf in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "v_row"))
            if hasattr(leaf, "v_row")
        )
        for tree in (state, shardings.opt_state)
    )
    assert factored.v_row["layers"]["mlp"]["up"]["kernel"].shape == (2, 128)
    assert specs.v_row["layers"]["mlp"]["up"]["kernel"].spec == PartitionSpec()
    query = specs.v["layers"]["attention"]["query"]["kernel"]
    assert query == shardings.params["layers"]["attention"]["query"]["kernel"]


@pytest.mark.slow
def test_eight_devices_step_as_one_does(tmp_path: Path) -> None:
    losses = {}
    for devices in (1, 8):
        target = tmp_path / f"{devices}.npz"
        run = subprocess.run(
            [sys.executable, "-c", ON_DEVICES, str(devices), str(target)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        losses[devices] = dict(np.load(target))
    assert len(losses[1]) == len(OPTIMIZERS) + 2
    for name, alone in losses[1].items():
        assert alone[2] < alone[1] < alone[0], name
        np.testing.assert_allclose(losses[8][name], alone, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "adam"},
            "OptimizerConfig.name='adam': one of adamw, adafactor, muon",
        ),
        (
            {"state_dtype": "int8"},
            "OptimizerConfig.state_dtype='int8': one of None, bfloat16",
        ),
        (
            {"name": "adafactor", "state_dtype": "bfloat16"},
            "adafactor has no first moment",
        ),
    ],
)
def test_unknown_optimizers_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimizerConfig(0.1, **settings)


def test_micro_batches_add_up_to_the_batch(
    model: Transformer, params: Params, mesh: Mesh
) -> None:
    """Of unequal numbers of tokens, as packed rows have them."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, 6)[:, None]
    places = np.broadcast_to(np.arange(12), (6, 12))
    learned = (places < lengths) & (rng.random((6, 12)) < 0.7) & (places > 0)
    rows = (
        rng.integers(1, 40, (6, 12)),
        places * (places < lengths),
        (places < lengths).astype(np.int32),
        (learned / learned.sum()).astype(np.float32),
    )
    tx = optax.sgd(1.0)
    shardings = state_shardings(model, tx, mesh)
    found = []
    for parts in (1, 2, 3, 6):
        *ids, weights = (x.reshape(parts, -1, 12) for x in rows)
        batch = Batch(*ids, np.int32(parts), loss_weights=weights)
        update = jit_update(next_token_loss, model, tx, mesh, shardings)
        found.append(update(new_state(params, tx, shardings), batch, None))
    for state, metrics in found[1:]:
        np.testing.assert_allclose(
            metrics["sft/loss"], found[0][1]["sft/loss"], rtol=1e-6
        )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6),
            state.params,
            found[0][0].params,
        )
