"""Tables of the frontier: compute to an accuracy, careful steps, what students judge."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from experiments.frontier import BUDGETS, CELLS, ROUTES
from experiments.frontier_cells import Cell
from experiments.kinds import form_and_errors, form_of
from experiments.statistics import Record
from rlt_jax.report.files import read_lines
from rlt_jax.training.metrics import stream_jsonl

JUDGES = {"habit": "the base", "strong": "the base before its habit"}


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


def careful_shares(
    workdir: Path, cells: Iterable[Cell], seeds: Sequence[int]
) -> pd.DataFrame:
    """How often the base takes careful steps, of 131,072 samples at temperature 1.

    Returns:
      A row per cell and seed: the share of careful explanations, and of right answers.
    """
    rows = []
    for cell, seed in itertools.product(cells, seeds):
        file = workdir / f"rejection_traces_{cell.name}_{seed}" / "samples.jsonl"
        careful = right = count = 0
        for row in stream_jsonl(file):
            thought = row["completion"].partition("<|end_of_thought|>")[0]
            careful += form_of(thought) == "careful"
            right += row["correct"]
            count += 1
        shares = {"careful": f"{careful / count:.1e}", "right": f"{right / count:.1e}"}
        rows.append({"base": cell.label, "seed": seed, **shares})
    return pd.DataFrame(rows)


def judged(workdir: Path, cell: Cell, seeds: Sequence[int]) -> pd.DataFrame:
    """What students of the reward say of the warmed-up teacher's explanations.

    Returns:
      A row per student and form that makes up more than 1%: its share, and means of the
      number of tokens, the reward, and per token of the explanation the KL (k1), what
      surprises the student (-log p_S), the same with at most 1 nat a token, and the KL's
      largest value.
    """
    rows = [
        _judgement(judge, row)
        for judge in JUDGES
        for seed in seeds
        for row in read_lines(
            workdir / f"{judge}_score_{cell.name}_{seed}" / "scores.jsonl"
        )
    ]
    table = pd.DataFrame(rows).groupby(["student", "explanation"])
    means = table.mean().assign(share=2 * table.size() / len(rows))
    return means[means["share"] > 0.01].reset_index()


def _judgement(judge: str, row: Record) -> Record:
    kls = pd.Series(row["explanation_kl_tokens"])
    surprises = -pd.Series(row["student_log_probs_explanation"])
    return {
        "student": JUDGES[judge],
        "explanation": form_and_errors(row["question"], row["reasoning_trace"]),
        "tokens": len(kls),
        "reward": row["reward"],
        "KL": kls.mean(),
        "surprise": surprises.mean(),
        "surprise, at most 1": surprises.clip(upper=1).mean(),
        "largest KL": kls.max(),
    }
