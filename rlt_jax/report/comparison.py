"""The numbers of a comparison of routes over seeds, and the verdicts on claims.

Two 95% intervals stand beside every mean over runs, both Student's t. The one *over
questions* says how well these very models were measured, see
`statistics.over_questions`. The one *over runs* is of the runs' means: it holds what
changes from run to run, too. A verdict needs both, as a few runs may agree by chance.
Accuracies are shares in JSON and percent where people read.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from rlt_jax.errors import UserError
from rlt_jax.report import statistics
from rlt_jax.report.comparison_config import (
    ClaimConfig,
    CompareConfig,
    MeasureConfig,
    RouteConfig,
    parts_of,
)
from rlt_jax.report.files import Record, read_evaluation, read_json, read_lines
from rlt_jax.report.plots import Z_95

COSTS = ("decoded_tokens", "scored_tokens", "trained_tokens", "flops")
ONE_RUN = "one run only"
TOO_WIDE = "in every run, spread between runs too large"
TOO_FEW = "too few routes"

Interval = Sequence[float]  # low, high
ByQuestion = dict[str, float]


class Answers(NamedTuple):
    """An evaluation: question -> share of right samples, and how many there are."""

    right: ByQuestion
    samples: int


def compare(workdir: Path, config: CompareConfig) -> Record:
    """All numbers of the comparison, ready for JSON.

    Raises:
      UserError: a stage that the config names has not left its files, or two routes
        cannot be compared.
    """
    parts = parts_of(config)
    answers = {
        name: {
            seed: _answers(_folder(workdir, route.evaluation, seed))
            for seed in route.seeds
        }
        for name, route in parts.routes.items()
    }
    routes = {
        name: _route(workdir, route, answers[name])
        for name, route in parts.routes.items()
    }
    ranked = [parts.routes[name] for name in config.correlation]
    fewer = [route for route in ranked if route.name not in config.correlation_without]
    correlation = None
    if ranked:
        # The second count has the first one's files.
        rewards = functools.cache(_rewards)
        correlation = _correlation(workdir, ranked, routes, rewards)
        correlation["published"] = config.correlation_published
        if config.correlation_without:
            correlation["without"] = _correlation(workdir, fewer, routes, rewards)
    return {
        "seeds": list(config.seeds),
        "routes": routes,
        "claims": [_claim(claim, parts.routes, answers) for claim in parts.claims],
        "correlation": correlation,
        "measures": [_measure(workdir, measure) for measure in parts.measures],
    }


def over_seeds(means: Sequence[float], values: Sequence[ByQuestion] = ()) -> Record:
    """Mean over runs, standard deviation and 95% intervals.

    Args:
      means: of each run.
      values: of each run's questions, whose means they are; () where there are none.

    Returns:
      mean; standard_deviation and over_runs, None for one run; over_questions, None
      without `values` and as of `statistics.t_interval`.
    """
    n, mean = len(means), math.fsum(means) / len(means)
    deviation = float(np.std(means, ddof=1)) if n > 1 else None
    runs = None
    if deviation is not None:
        quantile = float(scipy.stats.t.ppf(0.975, n - 1))
        half = quantile * deviation / math.sqrt(n)
        runs = [mean - half, mean + half]
    return {
        "mean": mean,
        "standard_deviation": deviation,
        "over_runs": runs,
        "over_questions": statistics.over_questions(values) if values else None,
    }


def verdict(
    over_runs: Interval | None,
    over_questions: Interval | None,
    of_each_run: Sequence[Interval | None],
    margin: float = 0.0,
) -> str:
    """What the intervals of a difference say of a claim that it exceeds the margin.

    Args:
      over_runs: 95% interval over runs; None for one run.
      over_questions: 95% interval of their mean over questions; None for too few.
      of_each_run: the same of each run.
      margin: "opposite" needs a difference beyond it on the other side of zero.

    Returns:
      "seen" or "opposite" when the intervals over runs and over questions lie wholly
      beyond; these words and `TOO_WIDE` when not the one over runs does, but every
      run's own; else "not seen". One run decides nothing.
    """
    if over_runs is None:
        return ONE_RUN
    for word, side, limit in (("seen", 1, margin), ("opposite", -1, abs(margin))):
        beyond = [
            interval is not None and min(side * end for end in interval) > limit
            for interval in (over_runs, over_questions, *of_each_run)
        ]
        if all(beyond[:2]):
            return word
        if all(beyond[2:]):
            return f"{word} {TOO_WIDE}"
    return "not seen"


def correlate(x: Sequence[float], y: Sequence[float], routes: int) -> Record:
    """Pearson and Spearman with 95% intervals by Fisher's transformation.

    Several runs of one route are not several routes: the width is that of as many points
    as there are routes. Spearman's has 1.06 times the variance (Fieller, Hartley and
    Pearson 1957). There is no interval for less than four routes nor at +-1, where the
    transformation has none, and no value where all x or all y are the same.
    """
    found: Record = {"points": len(x)}
    for name, function, variance in (
        ("pearson", scipy.stats.pearsonr, 1.0),
        ("spearman", scipy.stats.spearmanr, 1.06),
    ):
        value = interval = None
        if np.ptp(x) > 0 and np.ptp(y) > 0:
            value = float(function(x, y).statistic)
            if routes > 3 and abs(value) < 1 - 1e-9:
                width = Z_95 * math.sqrt(variance / (routes - 3))
                z = math.atanh(value)
                interval = [math.tanh(z - width), math.tanh(z + width)]
        found[name] = {"value": value, "interval": interval}
    return found


def mean_ranks(rewards: Sequence[ByQuestion]) -> tuple[list[float], int]:
    """Mean rank of each route's rewards over the questions that all share, 1 the lowest.

    Ties have the mean of their ranks. Returns the number of questions, too.

    >>> mean_ranks([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0, "c": 0.0}])
    ([1.25, 1.75], 2)
    """
    shared = [q for q in rewards[0] if all(q in of_route for of_route in rewards)]
    if not shared:
        raise UserError("compare.correlation: the routes' traces share no question.")
    table = np.array([[of_route[q] for q in shared] for of_route in rewards])
    ranks = scipy.stats.rankdata(table, axis=0)
    return [float(rank) for rank in ranks.mean(axis=1)], len(shared)


def _route(workdir: Path, route: RouteConfig, answers: Mapping[int, Answers]) -> Record:
    seeds = {}
    for seed, (right, samples) in answers.items():
        accuracy, error = statistics.mean_and_error(np.array([*right.values()]))
        seeds[str(seed)] = {
            "accuracy": accuracy,
            "standard_error": error,
            "questions": len(right),
            "samples_per_question": samples,
        }
    accuracies = [of_seed["accuracy"] for of_seed in seeds.values()]
    return {
        "label": route.label,
        "section": route.section,
        "accuracy": over_seeds(accuracies, [right for right, _ in answers.values()]),
        "cost": _cost(workdir, route) if route.stages else None,
        "seeds": seeds,
    }


def _cost(workdir: Path, route: RouteConfig) -> Record:
    """Seconds and `COSTS` of all stages of the route, and their means over seeds.

    Seconds are too few where a stage took several `sessions`, as only the last counts.
    """
    seeds = {}
    for seed in route.seeds:
        done = [
            read_json(_folder(workdir, stage, seed) / "done.json")
            for stage in route.stages
        ]
        # A stage need not return a dict, nor cost anything.
        costs = [(one["summary"] or {}).get("cost") or {} for one in done]
        seeds[str(seed)] = {"seconds": math.fsum(one["seconds"] for one in done)} | {
            name: math.fsum(cost.get(name, 0.0) for cost in costs) for name in COSTS
        }
        seeds[str(seed)]["sessions"] = max(one.get("sessions", 1) for one in done)
    mean = {
        name: math.fsum(of_seed[name] for of_seed in seeds.values()) / len(seeds)
        for name in ("seconds", *COSTS)
    }
    return {"mean": mean, "seeds": seeds}


def _claim(
    claim: ClaimConfig,
    routes: Mapping[str, RouteConfig],
    answers: Mapping[str, Mapping[int, Answers]],
) -> Record:
    better, worse = answers[claim.better], answers[claim.worse]
    seeds, values = {}, []
    for seed in (seed for seed in better if seed in worse):
        names = [f"{name} of seed {seed}" for name in (claim.better, claim.worse)]
        ours, theirs = better[seed].right, worse[seed].right
        paired = statistics.compare(ours, theirs, names)
        values.append(
            {question: ours[question] - theirs[question] for question in ours}
        )
        seeds[str(seed)] = {
            "difference": paired.difference,
            "standard_error": paired.standard_error,
            "interval": statistics.over_questions(values[-1:]),
        }
    found = over_seeds([one["difference"] for one in seeds.values()], values)
    own = [one["interval"] for one in seeds.values()]
    return {
        "title": claim.title,
        "section": claim.section,
        "published": claim.published,
        "better": routes[claim.better].label,
        "worse": routes[claim.worse].label,
        "margin": claim.margin,
        "verdict": verdict(
            found["over_runs"], found["over_questions"], own, claim.margin
        ),
        "difference": found,
        "seeds": seeds,
    }


def _correlation(
    workdir: Path,
    ranked: Sequence[RouteConfig],
    routes: Mapping[str, Record],
    rewards: Callable[[Path], ByQuestion],
) -> Record:
    shared = [s for s in ranked[0].seeds if all(s in route.seeds for route in ranked)]
    if not shared:
        raise UserError("compare.correlation: its routes share no seed.")
    seeds, pooled = {}, []
    for seed in shared:
        found = [rewards(_folder(workdir, route.traces, seed)) for route in ranked]
        ranks, questions = mean_ranks(found)
        scores = [routes[r.name]["seeds"][str(seed)]["accuracy"] for r in ranked]
        pooled += zip(ranks, scores)
        seeds[str(seed)] = correlate(ranks, scores, len(ranked)) | {
            "questions": questions,
            "routes": {
                route.name: {"mean_rank": rank, "accuracy": score}
                for route, rank, score in zip(ranked, ranks, scores)
            },
        }
    together = correlate(*zip(*pooled), len(ranked))
    interval = together["pearson"]["interval"]
    return {
        "routes": {route.name: route.label for route in ranked},
        "verdict": verdict(interval, interval, [None]) if interval else TOO_FEW,
        "pooled": together,
        "seeds": seeds,
    }


def _measure(workdir: Path, measure: MeasureConfig) -> Record:
    seeds = {}
    for seed in measure.seeds:
        file = _folder(workdir, measure.folder, seed) / measure.file
        value: Any = read_json(file)
        *names, last = measure.key.split(".")
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        # Beside others: an empty object may be one that nothing was written into.
        absent = measure.absent if value else None
        value = value.get(last, absent) if isinstance(value, dict) else None
        if not isinstance(value, int | float):
            raise UserError(
                f"compare.measures: {measure.label!r}: {file} has no number "
                f"{measure.key!r}."
            )
        seeds[str(seed)] = float(value)
    return {
        "label": measure.label,
        "section": measure.section,
        **over_seeds(list(seeds.values())),
        "seeds": seeds,
    }


def _answers(folder: Path) -> Answers:
    rows = read_evaluation(folder)
    right = statistics.accuracy_by_question(rows, str(folder / "samples.jsonl"))
    return Answers(right, len(rows) // len(right))


def _rewards(folder: Path) -> ByQuestion:
    read_json(folder / "done.json")  # else not all traces are scored yet
    return statistics.mean_by_question(read_lines(folder / "scores.jsonl"), "reward")


def _folder(workdir: Path, pattern: str, seed: int) -> Path:
    return workdir / pattern.replace("{seed}", str(seed))
