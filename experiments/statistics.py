"""Statistics of a comparison: 95% intervals, verdicts, rank correlation.

Accuracies are fractions. A series of them is indexed by seed and question.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import scipy.stats

from rlt_jax.errors import UserError

Record = dict[str, Any]
Interval = Sequence[float]  # lower and upper end

ONE_RUN = "one run only"
TOO_FEW_ROUTES = "too few routes"
TOO_WIDE = "in every run, spread between runs too large"


def over_runs(means: pd.Series) -> Record:
    """Mean, standard deviation and 95% t interval of one number per run.

    Returns:
      `mean`, `standard_deviation`, `over_runs` (the interval; both None for one run) and
      `each_run`, the number of each seed.
    """
    mean, half = float(means.mean()), None
    if len(means) > 1:
        half = float(scipy.stats.t.ppf(0.975, len(means) - 1) * means.sem())
    return {
        "mean": mean,
        "standard_deviation": None if half is None else float(means.std()),
        "over_runs": None if half is None else [mean - half, mean + half],
        "each_run": {str(seed): float(value) for seed, value in means.items()},
    }


def over_questions(values: pd.Series) -> list[float] | None:
    """95% t interval over questions of the mean over runs.

    If all runs have the same questions, the runs of each question are averaged first.
    Otherwise runs are independent, and the degrees of freedom are those of Welch (1947)
    and Satterthwaite (1946).

    Args:
      values: one number per seed and question.

    Returns:
      The two ends. None if a run has a single question, or if questions do not differ
      within any run and a run has less than six, which agree by chance in one of 2^(5-1)
      cases.
    """
    table = values.unstack("seed")
    if table.notna().all(axis=None):
        table = table.mean(axis=1).to_frame()
    mean, errors, counts = float(table.mean().mean()), table.sem(), table.count()
    error = math.hypot(*errors)
    if counts.min() < 2 or (error < 1e-12 and counts.min() < 6):
        return None
    if error < 1e-12:
        return [mean, mean]
    freedom = error**4 / (errors**4 / (counts - 1)).sum()
    ends = scipy.stats.t.interval(0.95, freedom, mean, error / len(errors))
    return [float(end) for end in ends]


def summarize(values: pd.Series) -> Record:
    """`over_runs` of the mean of each run, and the interval `over_questions`."""
    means = values.groupby("seed").mean()
    return over_runs(means) | {"over_questions": over_questions(values)}


def verdict(
    runs: Interval | None,
    questions: Interval | None,
    each_run: Sequence[Interval | None],
    margin: float = 0.0,
) -> str:
    """The verdict on the claim that a difference exceeds a margin.

    Args:
      runs: 95% interval over runs; None for one run.
      questions: 95% interval over questions; None for too few questions.
      each_run: 95% interval over questions of each run.
      margin: "opposite" needs a difference of this size on the other side of zero.

    Returns:
      "seen" or "opposite" if the intervals over runs and over questions are both beyond
      the margin. The same with `TOO_WIDE` if the interval over runs is not, but the
      intervals of all runs are. `ONE_RUN` for a single run. Otherwise "not seen".
    """
    if runs is None:
        return ONE_RUN
    for word, side, limit in (("seen", 1, margin), ("opposite", -1, abs(margin))):
        beyond = [
            interval is not None and min(side * end for end in interval) > limit
            for interval in (runs, questions, *each_run)
        ]
        if all(beyond[:2]):
            return word
        if all(beyond[2:]):
            return f"{word} {TOO_WIDE}"
    return "not seen"


def mean_ranks(rewards: pd.DataFrame) -> pd.Series:
    """Mean rank of each route over the questions that all routes have, 1 is the lowest.

    Args:
      rewards: a row per question, a column per route; NaN where a route lacks it.

    Returns:
      Mean rank by route; ties have the mean of their ranks.

    >>> mean_ranks(pd.DataFrame({"a": [1.0, 2.0, None], "b": [3.0, 2.0, 0.0]})).to_dict()
    {'a': 1.25, 'b': 1.75}
    """
    shared = rewards.dropna()
    if shared.empty:
        raise UserError(
            f"the traces of {', '.join(rewards)} share no question, so their rewards "
            "cannot be ranked. Score traces of the same questions."
        )
    return shared.rank(axis=1).mean()


def correlate(points: pd.DataFrame, method: str) -> Record:
    """Correlation of rank and accuracy with a 95% interval by Fisher's transformation.

    Several runs of a route are not several routes, so the interval is as wide as for one
    point per route. The variance of Spearman's correlation is 1.06 times larger (Fieller,
    Hartley and Pearson 1957).

    Args:
      points: columns `mean_rank` and `accuracy`, indexed by seed and route.
      method: "pearson" or "spearman".

    Returns:
      The numbers of `routes` and `points`; the `value` and that of `each_run`, None for a
      constant column; the `interval`, None for less than four routes or a correlation of
      +-1; and the `verdict`.
    """

    def correlation(table: pd.DataFrame) -> float | None:
        if table.nunique().min() < 2:
            return None
        return float(table["mean_rank"].corr(table["accuracy"], method))

    value, routes = correlation(points), points.index.unique("route").size
    interval, answer = None, TOO_FEW_ROUTES
    if routes > 3 and value is not None and abs(value) < 1 - 1e-9:
        variance = {"pearson": 1.0, "spearman": 1.06}[method] / (routes - 3)
        ends = scipy.stats.norm.interval(0.95, math.atanh(value), math.sqrt(variance))
        interval = [math.tanh(end) for end in ends]
        answer = verdict(interval, interval, [None])
    return {
        "routes": routes,
        "points": len(points),
        "value": value,
        "interval": interval,
        "each_run": {str(seed): correlation(x) for seed, x in points.groupby("seed")},
        "verdict": answer,
    }
