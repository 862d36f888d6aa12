"""Compares the routes of frontier.py over seeds.

pip install '.[experiments]'
python -m experiments.frontier_claims --workdir=runs/frontier

compares what is complete for all seeds, so a run of some parts or cells will do; stages
that the workdir lacks can be kept from another run, see kept.py.
"""

import itertools
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import pandas as pd

from experiments import frontier_plots, frontier_tables, kept, pages
from experiments.compare import compare, read_arguments
from experiments.frontier import (
    CELLS,
    CLAIMS_IN,
    COLD,
    NEW_TASKS,
    REWARDS,
    REWARDS_IN,
    ROUTES,
    SEEDS,
    rewards_of,
    routes_of,
)
from experiments.frontier_cells import Cell
from experiments.paper_claims import COLD as FROM_STUDENTS
from experiments.paper_claims import HIGHER, LARGER, ZERO_SHOT
from experiments.study import Claim, Measure, Route, Study
from rlt_jax.errors import UserError

PART_OF_COMPUTE = {"": "", "_quarter": ", a quarter of the compute"}
# Better, worse, what one would expect; in every cell.
IN_EVERY_CELL = (
    ("rlt_clip", "solver", "Where solving gets no signal, teaching works."),
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
    "short": "a quarter of the warm-up",
    "careful_5": "5% careful steps in the warm-up instead of 20%",
    "careful_60": "60% careful steps in the warm-up",
}
JUDGES = {"habit": "the base", "strong": "the base before its habit"}
TEACHER_OF = {"warmup": "warm", "rlt": "rlt_rl", "rlt_clip": "rlt_clip_rl"}


def missing(workdir: Path, stage: str, seeds: Sequence[int]) -> list[int]:
    """The seeds of which a stage is not complete."""
    return [x for x in seeds if not kept.is_complete(workdir / stage.format(seed=x))]


def study(workdir: Path, seeds: Sequence[int]) -> Study:
    """What is compared: the routes whose evaluations are complete for all seeds."""

    def complete(stage: str) -> bool:
        return not missing(workdir, stage, seeds)

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
        for name in routes_of(cell, suffix):
            route, section = ROUTES[name], f"{cell.label}{words}"
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
    for name in rewards_of(cell):
        *_, warm = REWARDS[name]
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
    for name in rewards_of(cell):
        expected = "Better than the published reward after all of the warm-up."
        yield _claim(cell, name, "rlt", expected, f"Rewards: {cell.label}")


def _claim(cell: Cell, better: str, worse: str, text: str, section: str) -> Claim:
    return Claim(f"{better}_{cell.name}", f"{worse}_{cell.name}", text, section)


def _kinds(cell: Cell) -> Iterator[Measure]:
    """Shares of the kinds of explanations of every teacher."""
    of_puzzles = ("no step", "one step, right", "one step, wrong")
    if cell == CLAIMS_IN:
        for kind, name in itertools.product(of_puzzles, TEACHER_OF):
            yield Measure(
                LABELS[name],
                f"Share of explanations of puzzles that have {kind}",
                f"{name}_puzzles_traces_{cell.name}_{{seed}}",
                f"kinds.{kind}",
                0.0,
            )
    for form in ("careful", "skipping", "restating"):
        for name in (*TEACHER_OF, *rewards_of(cell)):
            yield Measure(
                LABELS[name],
                f"Share of explanations that are {form} and right: {cell.label}",
                f"{name}_traces_{cell.name}_{{seed}}",
                f"kinds.{form}",
                0.0,
            )


def tables_of_stages(
    workdir: Path, names: Collection[str], seeds: Sequence[int]
) -> dict[str, pd.DataFrame]:
    """Tables that need more than accuracies: the base's habits, and what judges say.

    Args:
      workdir: of the seeds.
      names: of the routes that are compared.
      seeds: of the runs.
    """
    tables, rows = {}, []
    for cell, seed in itertools.product(CELLS, seeds):
        if f"rejection_{cell.name}" in names:
            folder = workdir / f"rejection_traces_{cell.name}_{seed}"
            rows.append({"base": cell.label, "seed": seed, **kept.careful(folder)})
    if rows:
        title = "Careful steps among samples of the base at temperature 1"
        tables[title] = pd.DataFrame(rows)
    if f"strong_{REWARDS_IN.name}" in names:
        judgements = {label: [] for label in JUDGES.values()}
        for (judge, label), seed in itertools.product(JUDGES.items(), seeds):
            folder = workdir / f"{judge}_score_{REWARDS_IN.name}_{seed}"
            judgements[label] += kept.judged(folder)
        title = f"How judges see explanations of every kind: {REWARDS_IN.label}"
        tables[title] = frontier_tables.judged_table(judgements).round(3)
    return tables


def main() -> None:
    """Compares the seeds of a workdir."""
    arguments = read_arguments(__doc__, SEEDS)
    workdir, seeds = arguments.workdir, arguments.seeds
    try:
        for cell in CELLS:
            without = missing(workdir, f"base_eval_{cell.name}_{{seed}}", seeds)
            if 0 < len(without) < len(seeds):
                absent = ", ".join(map(str, without))
                print(f"{cell.label} is left out: it lacks the seeds {absent}.")
        comparison = compare(workdir, study(workdir, seeds), seeds)
        more = tables_of_stages(workdir, comparison["routes"].keys(), seeds)
    except UserError as error:
        sys.exit(f"experiments.frontier_claims: {error}")
    of_cells, pictures = frontier_tables.curves(comparison), {}
    if of_cells:
        pictures["frontier"] = frontier_plots.frontier(of_cells)
        pictures["compute"] = frontier_plots.compute(of_cells)
        table = frontier_tables.compute_table(of_cells)
        more = {"Model operations to reach 50%": table, **more}
    print(pages.write_comparison(workdir, comparison, pictures, more))


if __name__ == "__main__":
    main()
