"""Intervals, verdicts and correlations of a comparison against numbers by hand."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import statistics
from experiments.statistics import TOO_WIDE, over_questions
from rlt_jax.errors import UserError
from rlt_jax.report.statistics import paired_difference

T_2, T_3 = 4.302653, 3.182446  # 97.5% quantiles of Student's t by degrees of freedom


def by_seed(runs: dict[int, dict[str, float]]) -> pd.Series:
    parts = {seed: pd.Series(values) for seed, values in runs.items()}
    return pd.concat(parts, names=["seed", "question"])


def run_of(values: list[float], first: int = 0) -> dict[str, float]:
    return {f"q{first + n}": value for n, value in enumerate(values)}


def test_the_interval_over_runs_by_hand() -> None:
    found = statistics.over_runs(pd.Series({10: 0.75, 11: 0.5, 12: 1.0}))
    half = T_2 * 0.25 / math.sqrt(3)
    assert found == {
        "mean": pytest.approx(0.75),
        "standard_deviation": pytest.approx(0.25),
        "over_runs": pytest.approx([0.75 - half, 0.75 + half]),
        "each_run": {"10": 0.75, "11": 0.5, "12": 1.0},
    }


def test_the_interval_of_one_run_is_that_of_the_paired_t_test() -> None:
    a, b = np.array([1.0, 0.5, 1.0, 0.5]), np.array([0.0, 0.5, 0.5, 0.5])
    found = paired_difference(a, b)
    interval = over_questions(by_seed({0: run_of(list(a - b))}))
    np.testing.assert_allclose(interval, [found.low, found.high])


def test_runs_on_the_same_questions_are_averaged_first() -> None:
    runs = {0: {"a": 1.0, "b": 0.0, "c": 0.5}, 1: {"c": 0.5, "a": 0.0, "b": 0.0}}
    # Means 0.5, 0, 0.5 of the questions: their deviation is 1 / sqrt(12).
    half = T_2 / math.sqrt(12) / math.sqrt(3)
    expected = [1 / 3 - half, 1 / 3 + half]
    np.testing.assert_allclose(over_questions(by_seed(runs)), expected, rtol=1e-6)


def test_runs_on_other_questions_are_independent() -> None:
    # Equal errors and counts: the degrees of freedom add up to 2 * 3, t is 2.446912.
    values = [0.2, 0.4, 0.6, 0.8]
    error = math.sqrt(0.2 / 3) / 2  # squared deviations sum to 0.2
    half = 2.446912 * math.sqrt(2) * error / 2
    interval = over_questions(by_seed({0: run_of(values), 1: run_of(values, 4)}))
    np.testing.assert_allclose(interval, [0.5 - half, 0.5 + half], rtol=1e-6)
    # A run without spread adds no degree of freedom: 3, of which t is 3.182446.
    half = T_3 * error / 2
    interval = over_questions(by_seed({0: run_of(values), 1: run_of([0.5] * 9, 4)}))
    np.testing.assert_allclose(interval, [0.5 - half, 0.5 + half], rtol=1e-6)


def test_too_few_questions_have_no_interval() -> None:
    assert over_questions(by_seed({0: run_of([0.5])})) is None
    assert over_questions(by_seed({0: run_of([0, 1, 1]), 1: run_of([1], 3)})) is None
    same = [{0: run_of([0.5] * n), 1: run_of([0.5] * n, n)} for n in (5, 6)]
    assert over_questions(by_seed(same[0])) is None
    assert over_questions(by_seed(same[1])) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("runs", "questions", "own", "margin", "expected"),
    [
        ((0.1, 0.2), (0.1, 0.2), [(0.1, 0.2), (-0.1, 0.3)], 0.0, "seen"),
        ((-0.2, -0.1), (-0.2, -0.1), [(-0.2, 0.1)], 0.0, "opposite"),
        ((0.0, 0.2), (0.1, 0.2), [(0.1, 0.2), (0.0, 0.3)], 0.0, "not seen"),
        ((0.0, 0.0), (0.0, 0.0), [(0.0, 0.0), (0.0, 0.0)], 0.0, "not seen"),
        # Runs agree, but about too few questions.
        ((0.1, 0.1), (-0.1, 0.3), [(-0.2, 0.4)] * 2, 0.0, "not seen"),
        ((-0.1, -0.1), (-0.3, 0.1), [(-0.4, 0.2)] * 2, 0.0, "not seen"),
        ((0.1, 0.1), None, [None, None], 0.0, "not seen"),
        ((-0.1, 0.9), (0.3, 0.4), [(0.1, 0.2), (0.5, 0.6)], 0.0, f"seen {TOO_WIDE}"),
        ((-0.1, 0.9), (0.3, 0.4), [(0.1, 0.2), None], 0.0, "not seen"),
        (
            (-0.9, 0.1),
            (-0.4, -0.3),
            [(-0.2, -0.1), (-0.6, -0.5)],
            0.0,
            f"opposite {TOO_WIDE}",
        ),
        ((0.1, 0.2), (0.16, 0.2), [(0.1, 0.2)], 0.15, "not seen"),
        ((0.16, 0.2), (0.1, 0.2), [(0.1, 0.2)], 0.15, "not seen"),
        ((0.16, 0.2), (0.16, 0.2), [(0.1, 0.2)], 0.15, "seen"),
        ((-0.1, 0.1), (-0.1, 0.1), [(-0.1, 0.1)], 0.15, "not seen"),
        ((-0.2, -0.1), (-0.2, -0.16), [(-0.2, 0.0)], 0.15, "not seen"),
        ((-0.3, -0.2), (-0.3, -0.2), [(-0.3, -0.2)], 0.15, "opposite"),
        ((-0.3, -0.2), (-0.3, -0.1), [(-0.3, -0.1)], 0.15, "not seen"),
        ((-0.01, 0.02), (-0.01, 0.02), [(-0.1, 0.1)], -0.02, "seen"),
        (None, (0.1, 0.2), [(0.1, 0.2)], 0.0, "one run only"),
    ],
)
def test_verdicts(
    runs: Any, questions: Any, own: Any, margin: float, expected: str
) -> None:
    assert statistics.verdict(runs, questions, own, margin) == expected


def points_of(ranks: list[float], accuracies: list[float], runs: int) -> pd.DataFrame:
    names = [range(runs), [f"route {n}" for n in range(len(ranks))]]
    index = pd.MultiIndex.from_product(names, names=["seed", "route"])
    columns = {"mean_rank": ranks * runs, "accuracy": accuracies * runs}
    return pd.DataFrame(columns, index, dtype=float)


def test_correlations_equal_textbook_numbers() -> None:
    points = points_of([1, 2, 3, 4], [1, 3, 2, 4], runs=1)
    pearson, spearman = (
        statistics.correlate(points, method) for method in ("pearson", "spearman")
    )
    # atanh(0.8) = 1.0986, less and more 1.96 and 1.96 * sqrt(1.06).
    assert pearson["value"] == pytest.approx(0.8)
    assert pearson["interval"] == pytest.approx([-0.697, 0.9956], abs=1e-3)
    assert spearman["interval"] == pytest.approx([-0.7255, 0.9961], abs=1e-3)
    assert pearson["verdict"] == "not seen"
    # Three runs of the same four routes are more points, but not more routes.
    more = points_of([1, 2, 3, 4], [1, 3, 2, 4], runs=3)
    found = statistics.correlate(more, "pearson")
    assert (found["routes"], found["points"]) == (4, 12)
    assert found["interval"] == pytest.approx(pearson["interval"])
    assert found["each_run"] == pytest.approx({"0": 0.8, "1": 0.8, "2": 0.8})


def test_correlations_without_an_interval() -> None:
    perfect = points_of([1, 2, 3, 4], [1, 2, 3, 4], runs=1)
    flat = points_of([1, 2, 3, 4], [1, 1, 1, 1], runs=1)
    few = points_of([1, 2, 3], [1, 3, 2], runs=3)
    for points, value in ((perfect, 1.0), (flat, None), (few, 0.5)):
        for method in ("pearson", "spearman"):
            found = statistics.correlate(points, method)
            assert found["value"] == (value and pytest.approx(value))
            assert found["interval"] is None
            assert found["verdict"] == "too few routes"


def test_mean_ranks_by_hand() -> None:
    rewards = pd.DataFrame({"a": [1.0, 2.0, None], "b": [3.0, 2.0, 0.0]})
    assert statistics.mean_ranks(rewards).to_dict() == {"a": 1.25, "b": 1.75}
    with pytest.raises(UserError, match="the traces of a, b share no question"):
        statistics.mean_ranks(rewards[2:])
