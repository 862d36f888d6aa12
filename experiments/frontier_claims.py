"""Compares the routes of frontier.py over seeds.

pip install '.[experiments]'
python -m experiments.frontier_claims --workdir=runs/frontier

compares what is complete for all seeds, so a run of some parts or cells will do.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from experiments import frontier_plots, pages
from experiments.compare import compare, read_arguments
from experiments.frontier import (
    BUDGETS,
    CELLS,
    CLAIMS_IN,
    COLD,
    NEW_TASKS,
    REWARDS,
    REWARDS_IN,
    ROUTES,
    SEEDS,
)
from experiments.frontier_cells import Cell
from experiments.kinds import form_and_errors, form_of
from experiments.paper_claims import COLD as FROM_STUDENTS
from experiments.paper_claims import HIGHER, LARGER, ZERO_SHOT
from experiments.statistics import Record
from experiments.study import Claim, Measure, Route, Study
from rlt_jax.errors import UserError
from rlt_jax.report.files import read_lines
from rlt_jax.training.metrics import stream_jsonl

PART_OF_COMPUTE = {"": "", "_quarter": ", a quarter of the compute"}
# Better, worse, what one would expect; in every cell.
IN_EVERY_CELL = (
    ("rlt", "solver", "Where solving gets no signal, teaching works."),
    ("rlt", "rejection", "Who sees the solution explains more than who guesses it."),
    ("rlt", "warmup", "RL makes the teacher better."),
    ("rlt_clip", "warmup", "RL makes the teacher better."),
    ("rlt_clip", "rlt", "With clipped surprise it becomes a better one."),
    ("rlt", "worked_solver", "Worked explanations do more for a teacher."),
    ("on_rlt", "rlt", "Own attempts teach more than explanations."),
)
# The same for either reward of the teacher, in one cell.
AS_PUBLISHED = {
    "1 Traces for a student of the teacher's size": (
        ("{rlt}", "warmup", HIGHER),
        ("{rlt}", "solved", HIGHER),
        ("{rlt}", "solved_by_large", HIGHER),
        ("{rlt}", "base", HIGHER),
    ),
    "2 A student 4x larger than the teacher": (
        ("{rlt}_to_large", "warmup_to_large", LARGER),
        ("{rlt}_to_large", "solved_to_large", LARGER),
        ("{rlt}_to_large", "base_large", LARGER),
    ),
    "3 Correctness RL from students": (
        ("{rlt}_cold", "habit_cold", FROM_STUDENTS),
        ("{rlt}_cold", "warmup_cold", FROM_STUDENTS),
        ("{rlt}_cold", "solved_cold", FROM_STUDENTS),
        ("{rlt}_cold", "worked_some_cold", "Not in the paper."),
    ),
    "4 Tasks that only the base has seen": tuple(
        (f"{{rlt}}_{task}", f"{other}_{task}", said)
        for task in NEW_TASKS
        for other, said in (
            ("solver", ZERO_SHOT),
            ("warmup", "RL on one task helps teaching another."),
            ("base", "Zero-shot traces teach."),
        )
    ),
}
LABELS = {
    "base": "no training",
    **{name: route.label for name, route in ROUTES.items()},
    "solved_by_large": "right answers of a 4x larger solver",
    "solver_large": "the 4x larger solver",
    "base_large": "large, no training",
    "habit_cold": "RL from no training",
    "worked_some_cold": "RL from the warm-up's worked explanations",
    "solved_cold": "RL from the solver's answers",
    "kl_1": "the KL's weight 1 instead of 3",
    "kl_10": "the KL's weight 10",
    "k3": "k3 instead of k1",
    "full": "the KL over the vocabulary",
    "surprise": "what surprises the student alone",
    "clip": "k1, at most 1 nat a token",
    "full_clip": "the KL over the vocabulary, at most 1 nat a token",
    "strong": "the reward's student is the base before its habit",
    "both": "both students in the reward",
    "careful_5": "5% careful steps in the warm-up instead of 20%",
    "careful_60": "60% careful steps in the warm-up",
}
TEACHER_OF = {"warmup": "warm", "rlt": "rlt_rl", "rlt_clip": "rlt_clip_rl"}


def study(workdir: Path, seeds: Sequence[int]) -> Study:
    """What is compared: the routes whose evaluations are complete for all seeds."""

    def complete(stage: str) -> bool:
        files = (workdir / stage.format(seed=seed) / "done.json" for seed in seeds)
        return all(file.is_file() for file in files)

    routes = [
        route for cell in CELLS for route in _routes(cell) if complete(route.evaluation)
    ]
    if not routes:
        raise UserError(
            f"{workdir} has no complete route for the seeds {', '.join(map(str, seeds))}: "
            "run experiments/frontier.py first, or name other seeds."
        )
    names = {route.name for route in routes}
    claims = [
        claim
        for cell in CELLS
        for claim in _claims(cell)
        if {claim.better, claim.worse} <= names
    ]
    measures = [
        measure
        for cell in CELLS
        for measure in _kinds(cell)
        if complete(measure.folder)
    ]
    return Study(routes, claims, measures)


def _routes(cell: Cell) -> Iterator[Route]:
    """Every route in a cell: with all compute, with a part, of the claims, of rewards."""

    def made(
        name: str,
        section: str,
        stages: Sequence[str],
        label: str = "",
        suffix: str = "",
    ) -> Route:
        folders = [f"{stage}{suffix}_{cell.name}_{{seed}}" for stage in stages]
        evaluation = f"{name}_eval{suffix}_{cell.name}_{{seed}}"
        label = f"{label or LABELS[name]}{PART_OF_COMPUTE[suffix]}"
        return Route(f"{name}{suffix}_{cell.name}", label, section, evaluation, folders)

    yield made("base", cell.label, ())
    for suffix, words in PART_OF_COMPUTE.items():
        for name, route in ROUTES.items():
            section = f"{cell.label}{words}"
            yield made(name, section, route.stages, route.label, suffix)
    if cell == CLAIMS_IN:
        large = ("solver_large", "solver_large_traces", "solved_by_large")
        first, second, third, fourth = AS_PUBLISHED
        yield made("solved_by_large", first, large)
        yield made("solver_large", first, large[:1])
        yield made("base_large", second, ())
        for source in ("warmup", "rlt", "rlt_clip", "solved"):
            stages = (*ROUTES[source].stages[:-1], f"{source}_to_large")
            yield made(stages[-1], second, stages, f"large, {LABELS[source]}")
        for source in COLD:
            before = ROUTES[source].stages if source in ROUTES else ()
            before = ("worked_some",) if source == "worked_some" else before
            label = LABELS.get(f"{source}_cold", f"RL from {LABELS.get(source)}")
            yield made(f"{source}_cold", third, (*before, f"{source}_cold"), label)
        for task in NEW_TASKS:
            yield made(f"base_{task}", fourth, (), f"{task}, no training")
            solver = f"solver_{task}"
            yield made(solver, fourth, (solver,), f"{task}, correctness RL on it")
            for source, teacher in TEACHER_OF.items():
                name = f"{source}_{task}"
                stages = tuple(dict.fromkeys(("warm", teacher, f"{name}_traces", name)))
                yield made(name, fourth, stages, f"{task}, {LABELS[source]}")
    if cell in REWARDS_IN:
        for name, (_, _, careful) in REWARDS.items():
            warm = "warm" if careful == 0.2 else f"{name}_warm"
            stages = (warm, f"{name}_rl", f"{name}_traces", name)
            yield made(name, f"Rewards: {cell.label}", stages)


def _claims(cell: Cell) -> Iterator[Claim]:
    for better, worse, expected in IN_EVERY_CELL:
        yield _claim(cell, better, worse, expected, f"Expected: {cell.label}")
    if cell == CLAIMS_IN:
        for rlt, words in (("rlt", ""), ("rlt_clip", ", clipped surprise")):
            for section, claims in AS_PUBLISHED.items():
                for better, worse, published in claims:
                    name = better.format(rlt=rlt)
                    yield _claim(cell, name, worse, published, f"{section}{words}")
    if cell in REWARDS_IN:
        for name in REWARDS:
            section = f"Rewards: {cell.label}"
            yield _claim(
                cell, name, "rlt", "Better than the published reward.", section
            )


def _claim(cell: Cell, better: str, worse: str, text: str, section: str) -> Claim:
    return Claim(f"{better}_{cell.name}", f"{worse}_{cell.name}", text, section)


def _kinds(cell: Cell) -> Iterator[Measure]:
    """Shares of careful and skipping explanations of every teacher."""
    for form in ("careful", "skipping", "restating"):
        for name in (*TEACHER_OF, *(REWARDS if cell in REWARDS_IN else ())):
            yield Measure(
                LABELS[name],
                f"Share of explanations that are {form} and right: {cell.label}",
                f"{name}_traces_{cell.name}_{{seed}}",
                f"kinds.{form}",
                0.0,
            )


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
        for judge in ("habit", "strong")
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
        "student": LABELS["strong"] if judge == "strong" else LABELS["base"],
        "explanation": form_and_errors(row["question"], row["reasoning_trace"]),
        "tokens": len(kls),
        "reward": row["reward"],
        "KL": kls.mean(),
        "surprise": surprises.mean(),
        "surprise, at most 1": surprises.clip(upper=1).mean(),
        "largest KL": kls.max(),
    }


def main() -> None:
    """Compares the seeds of a workdir."""
    arguments = read_arguments(__doc__, SEEDS)
    workdir, seeds = arguments.workdir, arguments.seeds
    try:
        comparison = compare(workdir, study(workdir, seeds), seeds)
    except UserError as error:
        sys.exit(f"experiments.frontier_claims: {error}")
    of_cells = curves(comparison)
    pictures = {
        "frontier": frontier_plots.frontier(of_cells),
        "compute": frontier_plots.compute(of_cells),
    }
    tables = {"Model operations to reach 50%": compute_table(of_cells)}
    sampled = [c for c in of_cells if f"rejection_{c.name}" in comparison["routes"]]
    if sampled:
        shares = careful_shares(workdir, sampled, seeds)
        tables["Careful steps among samples of the base at temperature 1"] = shares
    for cell in REWARDS_IN:
        if f"strong_{cell.name}" in comparison["routes"]:
            title = f"The warmed-up teacher's explanations: {cell.label}"
            tables[title] = judged(workdir, cell, seeds).round(3)
    print(pages.write_comparison(workdir, comparison, pictures, tables))


if __name__ == "__main__":
    main()
