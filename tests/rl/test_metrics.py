"""Metrics by hand."""

import jax.numpy as jnp
import numpy as np
from rlt_jax.data.packing import gather_spans

from rlt_jax.rl.losses import LossTokens, ObjectiveConfig
from rlt_jax.rl.metrics import (
    group_metrics,
    over_updates,
    policy_metrics,
    reward_metrics,
)
from rlt_jax.types import Reward


def test_reward_and_every_term() -> None:
    terms = {"a": jnp.array([0.0, 4.0]), "closed": jnp.array([True, False])}
    metrics = reward_metrics(Reward(jnp.array([-1.0, 3.0]), terms))
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
    }


def test_several_updates_make_one_row() -> None:
    rows = [
        {"a/b": jnp.float32(n), "a/b_max": 4.0 - n, "o/skipped": n % 2}
        for n in range(4)
    ]
    assert over_updates(rows[:1]) == rows[0]
    found = {name: float(value) for name, value in over_updates(rows).items()}
    assert found == {"a/b": 1.5, "a/b_max": 4.0, "o/skipped": 2}


def test_groups() -> None:
    rewards = jnp.array([1.0, 1.0, 0.0, 1.0, 2.0, 2.0])
    metrics = group_metrics(rewards, jnp.array([0, 0, -3.0, 3.0, 0, 0]), 2)
    np.testing.assert_allclose(metrics["group/signal_fraction"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["group/advantage_std"], 3**0.5, rtol=1e-6)


def test_the_policy_among_the_others() -> None:
    # Completions of 2 tokens and 1 token; the prompts around them never matter.
    spans = gather_spans(np.array([1, 4]), [np.arange(2), np.arange(1)], 2)

    def log(*values: float) -> jnp.ndarray:
        return jnp.log(jnp.array([[values]]))

    tokens = LossTokens(
        advantages=jnp.array([[[0, 1.0, 1.0, 0, -1.0, 0]]]),
        shares=jnp.array([[[0, 0.5, 0.5, 0, 1.0, 0]]]),
        segment_ids=jnp.array([[[1, 1, 1, 2, 2, 0]]]),
        old_log_probs=log(0.1, 0.1, 0.2, 0.9, 0.4, 1.0),
        ref_log_probs=log(0.1, 0.2, 0.4, 0.1, 0.8, 1.0),
        sampler_log_probs=log(0.1, 0.05, 0.2, 0.1, 0.8, 1.0),
    )
    objective = ObjectiveConfig(clip_low=0.2, clip_high=0.2, importance_cap=1.5)
    metrics = policy_metrics(
        objective,
        log(0.9, 0.2, 0.2, 0.1, 0.2, 1.0),
        jnp.array([[[9.0, 1.0, 3.0, 9.0, 4.0, 9.0]]]),
        tokens,
        spans,
    )
    expected = {
        "policy/entropy": (2 + 4) / 2,
        "policy/ratio_mean": ((2 + 1) / 2 + 0.5) / 2,
        "policy/ratio_max": 2.0,
        "policy/clip_fraction": (0.5 + 1) / 2,
        "policy/kl_to_reference": ((np.log(1) + np.log(1 / 2)) / 2 + np.log(1 / 4)) / 2,
        "policy/sampler_difference": (np.log(2) / 2 + np.log(2)) / 2,
        "policy/importance_weight_mean": ((1.5 + 1) / 2 + 0.5) / 2,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
