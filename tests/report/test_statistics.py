"""Statistics of graded samples against numbers worked out by hand."""

import itertools
import math

import numpy as np
import pytest

from rlt_jax.errors import UserError
from rlt_jax.report.statistics import (
    PairedDifference,
    by_question,
    compare,
    majority_at_k,
    mean_and_error,
    paired_difference,
    pass_at_k,
)


def test_pass_at_k_by_hand() -> None:
    correct = np.array([[1, 0, 0, 0], [1, 0, 1, 0], [0] * 4, [1] * 4], bool)
    np.testing.assert_allclose(pass_at_k(correct, 1), [1 / 4, 1 / 2, 0, 1])
    # 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6, and 1 - C(2, 2) / C(4, 2) = 1 - 1 / 6.
    np.testing.assert_allclose(pass_at_k(correct, 2), [1 / 2, 5 / 6, 0, 1])
    np.testing.assert_allclose(pass_at_k(correct, 4), [1, 1, 0, 1])
    for k in (0, 5):
        with pytest.raises(ValueError, match="of 4 samples"):
            pass_at_k(correct, k)


def test_pass_at_k_is_the_mean_over_all_choices() -> None:
    correct = np.random.default_rng(0).random((20, 7)) < 0.3
    for k in range(1, 8):
        chosen = [correct[:, c] for c in itertools.combinations(range(7), k)]
        expected = np.mean([part.any(axis=1) for part in chosen], axis=0)
        np.testing.assert_allclose(pass_at_k(correct, k), expected)


def test_pass_at_k_of_many_samples_is_finite() -> None:
    correct = np.arange(4096)[None] < 1
    np.testing.assert_allclose(pass_at_k(correct, 2048), 0.5)


def test_majority_at_k_by_hand() -> None:
    rows = [
        (["7", "7", "8", "9"], [1, 1, 0, 0], 1),
        (["7", "8", "8", "9"], [1, 0, 0, 0], 0),
        (["7", "7", "8", "8"], [1, 1, 0, 0], 1 / 2),
        (["7", "8", "9", "6"], [0, 0, 1, 0], 1 / 4),
        (["7", None, None, None], [1, 0, 0, 0], 1),  # the unreadable have no vote
        ([None] * 4, [0] * 4, 0),
    ]
    answers, correct, expected = zip(*rows, strict=True)
    result = majority_at_k(np.array(correct, bool), answers)
    np.testing.assert_allclose(result, expected)


def test_standard_errors_by_hand() -> None:
    # Deviations -1, 0, 1: variance 1, over three questions.
    assert mean_and_error(np.array([1.0, 2.0, 3.0])) == (2.0, 1 / math.sqrt(3))
    assert mean_and_error(np.array([0.25])) == (0.25, 0.0)


def test_paired_difference_by_hand() -> None:
    found = paired_difference([1.0, 0.5, 1.0, 0.5], [0.0, 0.5, 0.5, 0.5])
    # Differences 1, 0, 0.5, 0: mean 3/8, squared deviations sum to 11/16.
    mean, error = 3 / 8, math.sqrt(11 / 16 / 3 / 4)
    width = 3.182446 * error  # Student's 97.5% point with three degrees of freedom
    # The distribution function with three degrees of freedom has a closed form.
    x = mean / error / math.sqrt(3)
    p = 1 - 2 / math.pi * (x / (1 + x**2) + math.atan(x))
    expected = (mean, error, mean - width, mean + width, p)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    turned = paired_difference([0.0, 0.5, 0.5, 0.5], [1.0, 0.5, 1.0, 0.5])
    np.testing.assert_allclose(turned[0], -mean)
    np.testing.assert_allclose(turned.p_value, p)


def test_differences_without_variance() -> None:
    same = paired_difference([0.1, 0.7, 1.0], [0.1, 0.7, 1.0])
    assert same == PairedDifference(0, 0, 0, 0, 1)
    better = paired_difference([1.0, 0.75, 0.5], [0.75, 0.5, 0.25])
    # All of 2^3 signs but +++ and --- are less extreme.
    assert better == PairedDifference(0.25, 0, 0.25, 0.25, 2 / 8)


def test_intervals_hold_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        chance = rng.random(30)
        a = (rng.random((30, 4)) < np.minimum(chance + 0.1, 1)[:, None]).mean(1)
        b = (rng.random((30, 4)) < chance[:, None]).mean(1)
        truth = (np.minimum(chance + 0.1, 1) - chance).mean()
        found = paired_difference(a, b)
        hits += found.low <= truth <= found.high
        assert (found.p_value < 0.05) == (not found.low <= 0 <= found.high)
    assert 0.92 < hits / 400 < 0.98


def test_evaluations_are_joined_by_the_question() -> None:
    rows = [{"question": q, "correct": mark} for q, mark in zip("abab", (1, 0, 0, 0))]
    ours = by_question(rows, "x")
    assert ours == {"a": 0.5, "b": 0.0}
    found = compare(ours, {"b": 1.0, "a": 0.0}, ("x", "y"))
    assert found.difference == -0.25
    with pytest.raises(UserError, match="'x' and 'y' .* 2 and 2 questions, 1 of them"):
        compare(ours, {"b": 1.0, "c": 0.0}, ("x", "y"))
    with pytest.raises(UserError, match="two or more"):
        compare({"a": 1.0}, {"a": 0.0}, ("x", "y"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("a", "1"), ("b", "2"), ("a", "2")],
            "x: the question 'a' has several answers",
        ),
        (
            [("a", "1"), ("b", "2"), ("a", "1")],
            "x: 2 samples of the question 'a', but 1",
        ),
    ],
)
def test_questions_of_one_text_are_not_merged(
    rows: list[tuple[str, str]], message: str
) -> None:
    samples = [{"question": q, "answer": a, "correct": True} for q, a in rows]
    with pytest.raises(UserError, match=message):
        by_question(samples, "x")
