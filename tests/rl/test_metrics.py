"""Metrics by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.rl.metrics import over_updates, reward_metrics, rollout_metrics
from rlt_jax.types import Rollout


def test_reward_and_every_term() -> None:
    reward = {
        "value": jnp.array([-1.0, 3.0]),
        "a": jnp.array([0.0, 4.0]),
        "closed": jnp.array([True, False]),
    }
    metrics = reward_metrics(reward, "centred", 2)
    assert {name: float(value) for name, value in metrics.items()} == {
        "reward/value_mean": 1.0,
        "reward/value_std": 2.0,
        "reward/value_min": -1.0,
        "reward/value_max": 3.0,
        "reward/a_mean": 2.0,
        "reward/a_std": 2.0,
        "reward/a_min": 0.0,
        "reward/a_max": 4.0,
        "reward/closed_mean": 0.5,
        "reward/closed_std": 0.5,
        "reward/closed_min": 0.0,
        "reward/closed_max": 1.0,
        "group/signal_fraction": 1.0,
        "group/advantage_std": 2.0,
    }


def test_several_updates_make_one_record() -> None:
    updates = [
        {"a/b": jnp.float32(n), "a/b_max": 4.0 - n, "o/skipped": n % 2}
        for n in range(4)
    ]
    assert over_updates(updates[:1]) == updates[0]
    reduced = {name: float(value) for name, value in over_updates(updates).items()}
    assert reduced == {"a/b": 1.5, "a/b_max": 4.0, "o/skipped": 2}


@pytest.mark.parametrize(
    ("advantage", "std"),
    [
        ("centred", 3**0.5),
        ("rloo", 2 * 3**0.5),
        ("group", 3**0.5 / (18**0.5 + 1e-4)),
    ],
)
def test_groups(advantage: str, std: float) -> None:
    # Only the second of three groups has a signal: -3 and 3 around its mean.
    reward = {"value": jnp.array([1.0, 1.0, 0.0, 6.0, 2.0, 2.0])}
    metrics = reward_metrics(reward, advantage, 2)
    np.testing.assert_allclose(metrics["group/signal_fraction"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["group/advantage_std"], std, rtol=1e-6)


def test_lengths_and_decode_slots_of_a_rollout() -> None:
    rollout = Rollout(
        requests=[None] * 2,
        tokens=[np.arange(3), np.arange(5)],
        log_probs=[],
        finished=np.array([True, False]),
        steps_used=8,
        steps_computed=10,
    )
    assert rollout_metrics(rollout) == {
        "rollout/length_mean": 4.0,
        "rollout/length_p95": pytest.approx(4.9),
        "rollout/length_max": 5,
        "rollout/finished_fraction": 0.5,
        "rollout/occupancy": 0.8,
    }
    # Completions that were read from a file took no steps.
    stored = rollout._replace(steps_used=0, steps_computed=0)
    assert rollout_metrics(stored)["rollout/occupancy"] == 0.0
