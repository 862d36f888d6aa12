"""Compares the routes of paper_small.py over seeds: which claims of the paper are seen.

    pip install '.[experiments]'
    python -m experiments.compare --workdir=runs/paper_small --seeds=0,1,2,3

reads what the stages of these seeds have left, and writes comparison.json, comparison.md
and comparison/index.html with its pictures into the workdir.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments import kept, pages, statistics
from experiments.paper_claims import PAPER
from experiments.paper_small import SEEDS
from experiments.statistics import Record
from experiments.study import Claim, Measure, Study, seed_list
from rlt_jax.errors import UserError
from rlt_jax.files import read_json
from rlt_jax.report.files import read_lines
from rlt_jax.report.statistics import check_same_questions


def compare(workdir: Path, study: Study, seeds: Sequence[int]) -> Record:
    """All numbers of a comparison, ready for JSON.

    Args:
      workdir: folder that holds a folder for each stage.
      study: what is compared.
      seeds: of the runs.

    Raises:
      UserError: a stage is not complete, or two routes answered different questions.
    """
    accuracies = read_accuracies(workdir, study, seeds)
    costs = read_costs(workdir, study, seeds)
    routes = {
        route.name: {
            "section": route.section,
            "label": route.label,
            **statistics.summarize(accuracies[route.name]),
            "cost": costs.get(route.name),
        }
        for route in study.routes
    }
    correlation = None
    if study.ranked:
        rewards = read_rewards(workdir, study, seeds)
        correlation = _correlation(study, rewards, accuracies)
    return {
        "seeds": list(seeds),
        "routes": routes,
        "claims": [_claim(claim, routes, accuracies) for claim in study.claims],
        "correlation": correlation,
        "measures": [_measure(workdir, part, seeds) for part in study.measures],
    }


def read_accuracies(workdir: Path, study: Study, seeds: Sequence[int]) -> pd.Series:
    """Accuracy by route, seed and question."""
    series = {}
    for route in study.routes:
        for seed in seeds:
            folder = workdir / route.evaluation.format(seed=seed)
            series[route.name, seed] = pd.Series(kept.accuracies(folder))
    return pd.concat(series, names=["route", "seed", "question"])


def read_costs(workdir: Path, study: Study, seeds: Sequence[int]) -> dict[str, Record]:
    """The cost of each route that has stages, mean over runs."""
    cost_of = functools.cache(kept.cost)  # routes share stages
    costs = {}
    for route in study.routes:
        folders = [
            workdir / s.format(seed=seed) for s in route.stages for seed in seeds
        ]
        if folders:
            total = pd.DataFrame([cost_of(folder) for folder in folders]).sum()
            costs[route.name] = (total / len(seeds)).to_dict()
    return costs


def read_rewards(workdir: Path, study: Study, seeds: Sequence[int]) -> pd.DataFrame:
    """Mean reward of the traces by seed and question, a column per ranked route."""
    tables = {}
    for seed in seeds:
        rewards = {}
        for route in study.routes:
            if route.name in study.ranked:
                folder = workdir / route.traces.format(seed=seed)
                read_json(folder / "done.json")  # otherwise scores may be missing
                scores = pd.DataFrame(read_lines(folder / "scores.jsonl"))
                rewards[route.name] = scores.groupby("question")["reward"].mean()
        tables[seed] = pd.DataFrame(rewards).rename_axis(columns="route")
    return pd.concat(tables, names=["seed", "question"])


def _claim(claim: Claim, routes: dict[str, Record], accuracies: pd.Series) -> Record:
    better, worse = accuracies[claim.better], accuracies[claim.worse]
    for seed in better.index.unique("seed"):
        names = [f"{name} of seed {seed}" for name in (claim.better, claim.worse)]
        check_same_questions(better[seed].index, worse[seed].index, names)
    difference = better - worse
    summary = statistics.summarize(difference)
    runs, questions = summary["over_runs"], summary["over_questions"]
    each_run = {
        str(seed): statistics.over_questions(values)
        for seed, values in difference.groupby("seed")
    }
    return {
        **claim._asdict(),
        "label": f"{routes[claim.better]['label']} − {routes[claim.worse]['label']}",
        **summary,
        "each_run_over_questions": each_run,
        "verdict": statistics.verdict(
            runs, questions, [*each_run.values()], claim.margin
        ),
    }


def _correlation(study: Study, rewards: pd.DataFrame, accuracies: pd.Series) -> Record:
    """Ranks of traces by reward against accuracies, of all ranked routes and of fewer."""
    selections = {"all trace sets": rewards}
    if study.ranked_without:
        fewer = rewards.drop(columns=[*study.ranked_without])
        selections[f"without {', '.join(study.ranked_without)}"] = fewer
    accuracy = accuracies.groupby(["seed", "route"]).mean().rename("accuracy")
    points, records = {}, []
    for label, table in selections.items():
        ranks = table.groupby("seed").apply(statistics.mean_ranks).stack()
        points[label] = ranks.rename("mean_rank").to_frame().join(accuracy)
        records += [
            {"label": f"{method.capitalize()}, {label}"}
            | statistics.correlate(points[label], method)
            for method in ("pearson", "spearman")
        ]
    return {
        "published": study.ranked_published,
        "points": points["all trace sets"].reset_index().to_dict("records"),
        "correlations": records,
    }


def _measure(workdir: Path, measure: Measure, seeds: Sequence[int]) -> Record:
    values = {}
    for seed in seeds:
        folder = workdir / measure.folder.format(seed=seed)
        numbers = pd.json_normalize(kept.summary(folder))
        beside = measure.key.rpartition(".")[0] + "."
        if measure.key in numbers:
            values[seed] = numbers[measure.key].item()
        elif measure.default is not None and any(
            numbers.columns.str.startswith(beside)
        ):
            values[seed] = measure.default
        else:
            raise UserError(
                f"{folder / 'done.json'} has no number {measure.key!r} in its summary, which the measure "
                f"{measure.label!r} shows. Correct the measure's key or folder."
            )
    return measure._asdict() | statistics.over_runs(pd.Series(values))


def read_arguments(description: str, seeds: Sequence[int]) -> argparse.Namespace:
    """The command line: `workdir`, and `seeds` with their default."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of all seeds")
    parser.add_argument("--seeds", type=_seeds, default=seeds, help="such as 0,1,2")
    return parser.parse_args()


def _seeds(text: str) -> list[int]:
    try:
        return seed_list(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    """Compares the seeds of a workdir; a user error ends in one message and status 1."""
    arguments = read_arguments(__doc__, SEEDS)
    try:
        comparison = compare(arguments.workdir, PAPER, arguments.seeds)
    except UserError as error:
        sys.exit(f"experiments.compare: {error}")
    print(pages.write_comparison(arguments.workdir, comparison))


if __name__ == "__main__":
    main()
