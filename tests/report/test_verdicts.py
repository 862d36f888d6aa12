"""Verdicts, correlations and the places of labels, by hand."""

from typing import Any

import pytest

from rlt_jax.report import comparison, comparison_plots
from rlt_jax.report.comparison import TOO_WIDE


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
    assert comparison.verdict(runs, questions, own, margin) == expected


def test_correlation_equals_textbook_numbers() -> None:
    found = comparison.correlate([1, 2, 3, 4], [1, 3, 2, 4], routes=4)
    # atanh(0.8) = 1.0986, less and more 1.96 and 1.96 * sqrt(1.06).
    assert found["points"] == 4
    assert found["pearson"]["value"] == pytest.approx(0.8)
    assert found["pearson"]["interval"] == pytest.approx([-0.697, 0.9956], abs=1e-3)
    assert found["spearman"]["interval"] == pytest.approx([-0.7255, 0.9961], abs=1e-3)
    # Runs of the same four routes tell more points, not more routes.
    more = comparison.correlate([1, 2, 3, 4] * 3, [1, 3, 2, 4] * 3, routes=4)
    interval = pytest.approx(found["pearson"]["interval"])
    assert more["pearson"] == {"value": pytest.approx(0.8), "interval": interval}
    assert more["points"] == 12
    perfect = comparison.correlate([1, 2, 3, 4], [1, 2, 3, 4], routes=4)
    assert perfect["spearman"] == {"value": pytest.approx(1.0), "interval": None}
    flat = comparison.correlate([1, 2, 3, 4], [1, 1, 1, 1], routes=4)
    assert flat["pearson"] == {"value": None, "interval": None}


def test_labels_keep_apart() -> None:
    moved = comparison_plots.spread_out([0.1, 0.9, 0.9, 0.95], [0.2] * 4)
    assert moved == pytest.approx([0.1, 0.5, 0.7, 0.9])
