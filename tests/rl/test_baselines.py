"""Rewards minus a baseline, by hand."""

import jax
import numpy as np
import pytest

from rlt_jax.rl.baselines import (
    ADVANTAGES,
    centred_advantages,
    group_advantages,
    has_signal,
    rloo_advantages,
)


def test_a_pair_by_hand() -> None:
    # Mean 2; squares 1 + 1, divided by n - 1 = 1: std sqrt(2).
    expected = 1 / (np.sqrt(2) + 1e-4)
    advantages = group_advantages(np.array([1.0, 3.0], np.float32), 2)
    np.testing.assert_allclose(advantages, [-expected, expected], rtol=1e-6)


def test_a_group_of_four_by_hand() -> None:
    # Mean 2; squares 4 + 1 + 0 + 9 = 14, divided by 3.
    rewards = np.array([0, 1, 2, 5], np.float32)
    expected = np.array([-2, -1, 0, 3]) / (np.sqrt(14 / 3) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, 4), expected, rtol=1e-6)


def test_groups_are_consecutive_and_do_not_mix() -> None:
    rewards = np.array([1, 3, 100, 300, -5, -7], np.float32)
    advantages = np.asarray(group_advantages(rewards, 2))
    for n in range(0, 6, 2):
        alone = group_advantages(rewards[n : n + 2], 2)
        np.testing.assert_array_equal(advantages[n : n + 2], alone)
    np.testing.assert_array_equal(np.sign(advantages), [-1, 1, -1, 1, 1, -1])


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize(
    ("reward", "group_size"),
    [(0.0, 4), (-5.82, 4), (3.3e3, 4), (-7.55, 24), (1234.567, 3), (0.1, 7), (1e15, 6)],
)
def test_equal_rewards_teach_nothing(reward: float, group_size: int, name: str) -> None:
    rewards = np.full(2 * group_size, reward, np.float32)
    for function in (ADVANTAGES[name], jax.jit(ADVANTAGES[name], static_argnums=1)):
        np.testing.assert_array_equal(function(rewards, group_size), 0.0)
    # One group of equal rewards beside another.
    rewards[:group_size] += np.arange(group_size, dtype=np.float32) * abs(reward)
    advantages = np.asarray(ADVANTAGES[name](rewards, group_size))
    np.testing.assert_array_equal(advantages[group_size:], 0.0)
    assert advantages[:group_size].any() == (reward != 0)


def test_tiny_differences_are_damped() -> None:
    # std 7.07e-6 is small beside 1e-4, so the advantage is too.
    advantages = group_advantages(np.array([0.0, 1e-5], np.float32), 2)
    expected = 5e-6 / (np.sqrt(5e-11) + 1e-4)
    np.testing.assert_allclose(advantages, [-expected, expected], rtol=1e-5)


def test_every_group_has_mean_zero_and_about_unit_spread() -> None:
    rewards = np.random.default_rng(0).normal(3.0, 5.0, 60).astype(np.float32)
    groups = np.asarray(group_advantages(rewards, 6)).reshape(-1, 6)
    np.testing.assert_allclose(groups.mean(1), 0.0, atol=1e-5)
    np.testing.assert_allclose(groups.std(1, ddof=1), 1.0, rtol=1e-3)


def test_centred_and_leave_one_out_by_hand() -> None:
    rewards = np.array([0, 1, 2, 5, 1, 1, 1, 0], np.float32)
    expected = np.array([-2, -1, 0, 3, 0.25, 0.25, 0.25, -0.75])
    np.testing.assert_allclose(centred_advantages(rewards, 4), expected, rtol=1e-6)
    # The mean of the others is 8/3, 7/3, 2, 1; then 2/3, 2/3, 2/3, 1.
    expected = np.array([-8 / 3, -4 / 3, 0, 4, 1 / 3, 1 / 3, 1 / 3, -1])
    np.testing.assert_allclose(rloo_advantages(rewards, 4), expected, rtol=1e-6)


def test_which_groups_have_a_signal() -> None:
    rewards = np.array([1, 1, 1, 1 + 1e-6, -3, -3], np.float32)
    expected = [False, False, True, True, False, False]
    np.testing.assert_array_equal(has_signal(rewards, 2), expected)
