"""Tables of the frontier: compute to an accuracy, careful steps, what students judge."""

import itertools
from collections.abc import Mapping, Sequence

import pandas as pd

from experiments.frontier import BUDGETS, CELLS, ROUTES
from experiments.frontier_cells import Cell
from experiments.statistics import Record


def compute_to(points: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """Model operations at which a route reaches an accuracy, interpolated linearly.

    Args:
      points: (operations, accuracy), by increasing operations, the base first.
      accuracy: a fraction.

    Returns:
      0 where the base is that good, None where no point is.

    >>> compute_to([(0, 0.0), (4, 0.2), (8, 0.6)], 0.4)
    6.0
    """
    if points[0][1] >= accuracy:
        return 0.0
    for (before, low), (after, high) in itertools.pairwise(points):
        if low < accuracy <= high:
            return before + (after - before) * (accuracy - low) / (high - low)
    return None


def curves(comparison: Record) -> dict[Cell, dict[str, list[tuple[float, Record]]]]:
    """Cell -> route -> (operations, numbers) of the base and of each part of compute."""
    routes, result = comparison["routes"], {}
    for cell in CELLS:
        base, of_cell = routes.get(f"base_{cell.name}"), {}
        for name in ROUTES if base else ():
            found = (
                routes.get(f"{name}{suffix}_{cell.name}")
                for suffix in sorted(BUDGETS, key=BUDGETS.get)
            )
            points = [(x["cost"]["flops"], x) for x in found if x]
            if points:
                of_cell[name] = [(0.0, base), *points]
        if of_cell:
            result[cell] = of_cell
    return result


def compute_table(of_cells: Mapping[Cell, Mapping[str, list]]) -> pd.DataFrame:
    """Operations to reach 50% right answers, a row per route and a column per cell."""
    columns = {}
    for cell, of_routes in of_cells.items():
        column = columns[cell.label] = {}
        for name, points in of_routes.items():
            means = [(flops, numbers["mean"]) for flops, numbers in points]
            reached = compute_to(means, 0.5)
            text = f"> {means[-1][0]:.1e}" if reached is None else f"{reached:.1e}"
            column[ROUTES[name].label] = text
    return pd.DataFrame(columns).fillna("–").rename_axis("").reset_index()


def judged_table(of_judges: Mapping[str, Sequence[Record]]) -> pd.DataFrame:
    """`judgements` of several runs: a row per judge and form that makes up more than 1%.

    Args:
      of_judges: judge -> judgements of all runs.
    """
    rows = []
    for judge, records in of_judges.items():
        table = pd.DataFrame(records).set_index("explanation")
        counts = table.pop("count")
        totals = table.mul(counts, axis=0).groupby("explanation", sort=False).sum()
        number = counts.groupby("explanation", sort=False).sum()
        means = totals.div(number, axis=0).assign(share=number / number.sum())
        rows.append(means[means["share"] > 0.01].reset_index().assign(judge=judge))
    return pd.concat(rows).set_index(["judge", "explanation"]).reset_index()
