"""The report: results of a run as an HTML page and a JSON summary.

    <workdir>/<stage>/...  ->  <workdir>/report/index.html, report/*.png, summary.json

Figures and style are embedded, so that the page is a single file. All texts from models
and data sets are escaped.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from rlt_jax.errors import UserError
from rlt_jax.files import read_json, write_json
from rlt_jax.ranges import Checked, Condition, NonNegativeInt
from rlt_jax.records import Record
from rlt_jax.report import plots, statistics
from rlt_jax.report.files import check_stages, read_lines, write_page

OUT = "report"  # folder of the report in the workdir
QUANTITIES = ("accuracy", *statistics.SOLUTION_LOG_PROBS)
_DIFFERENT = Condition("different labels", lambda x: len(dict(x)) == len(x))
Stages = Annotated[Sequence[tuple[str, str]], _DIFFERENT]


@dataclasses.dataclass(frozen=True)
class ReportConfig(Checked):
    """Stages of the run that the report reads, by their folders in the workdir.

    Attributes:
      rl: folder of the teacher's RL stage.
      traces: (label, folder of a collect stage) pairs, in the order of the report.
      evaluations: (label, folder of an evaluate stage) pairs, all on the same questions;
        the last one is compared with each of the others.
      num_examples: number of questions shown with explanations, and with answers.
    """

    rl: str
    traces: Stages
    evaluations: Stages
    num_examples: NonNegativeInt = 6


def write_report(workdir: Path, config: ReportConfig, *, seed: int) -> Record:
    """Writes the page, its figures and `summary.json`; returns the summary.

    Args:
      workdir: workdir of the run.
      config: stages to read.
      seed: seed of the run, for the summary.

    Raises:
      UserError: files of a stage are missing or not its own, or the evaluations cannot
        be compared.
    """
    check_stages(vars(config), workdir, {})
    teacher = read_json(workdir / config.rl / "done.json")["summary"]
    metrics = read_lines(workdir / config.rl / "metrics.jsonl")

    def read_all(read: Callable, stages: Stages, name: str) -> dict:
        return {label: read(workdir / folder / name) for label, folder in stages}

    traces = read_all(read_lines, config.traces, "traces.jsonl")
    results = read_all(read_json, config.evaluations, "results.json")
    answers = read_all(read_lines, config.evaluations, "samples.jsonl")
    summary: Record = {}
    for label, when in (("warmup", "first"), ("rl", "last")):
        for statistic in ("", "_standard_error"):
            value = teacher[f"held_out_reward{statistic}_{when}"]
            summary[f"teacher_reward_{label}{statistic}"] = value
    summary |= _accuracies(results, answers) | {"seed": seed} | _costs(workdir)
    groups = plots.metric_groups(metrics).items()
    pictures = {group: plots.metric_curves(metrics, names) for group, names in groups}
    if graded := {k: x for k, x in results.items() if x["accuracy"] is not None}:
        pictures["accuracy"] = plots.accuracy_bars(graded)
    write_page(
        workdir / OUT,
        "page.html",
        pictures,
        run=workdir.resolve().name,
        summary=summary,
        teacher=teacher,
        evaluations=list(results),
        explanations=_side_by_side(traces, config.num_examples),
        answers=_side_by_side(answers, config.num_examples),
        z_95=plots.Z_95,
    )
    write_json(workdir / "summary.json", summary)
    return summary


def _accuracies(results: dict[str, Record], answers: dict[str, list[Record]]) -> Record:
    """Results of every evaluation, and the last one compared with each of the others."""
    if not results:
        return {}
    sizes = {(r["num_questions"], r["samples_per_question"]) for r in results.values()}
    if len(sizes) > 1:
        raise UserError(
            f"the evaluations {', '.join(results)} have different numbers of questions or "
            f"samples per question: {sorted(sizes)}. Use the same data and settings."
        )
    summary: Record = {}
    for label, result in results.items():
        for name in QUANTITIES:
            error = "standard_error" if name == "accuracy" else f"{name}_standard_error"
            if name in result:
                summary[f"{name}_{label}"] = result[name]
                summary[f"{name}_{label}_standard_error"] = result[error]
    *others, last = results
    comparisons = []
    for quantity, other in itertools.product(QUANTITIES, others):
        column = "correct" if quantity == "accuracy" else quantity
        a, b = (statistics.by_question(answers[x], x, column) for x in (last, other))
        # A single question has no error; a quantity may not have been measured.
        if len(a | b) > 1:
            compared = {"of": last, "with": other, "quantity": quantity}
            difference = statistics.compare(a, b, (last, other))
            comparisons.append(compared | difference._asdict())
    summary["n_eval"], summary["samples_per_question"] = sizes.pop()
    return summary | ({"comparisons": comparisons} if comparisons else {})


def _costs(workdir: Path) -> Record:
    """Seconds and peak memory of every finished stage but the report, oldest first."""
    # A folder with a suffix is that of a stage that was run afresh.
    done = [path for path in workdir.glob("*/done.json") if not path.parent.suffix]
    done = [path for path in done if path.parent.name != OUT]
    done.sort(key=lambda path: (path.stat().st_mtime_ns, path))
    stages = {path.parent.name: read_json(path) for path in done}
    seconds = {name: stage["seconds"] for name, stage in stages.items()}
    return {
        "seconds_total": math.fsum(seconds.values()),
        "seconds": seconds,
        "peak_gib": {name: stage.get("peak_gib") for name, stage in stages.items()},
    }


def _side_by_side(records: dict[str, list[Record]], count: int) -> list[Record]:
    """The first record of every label, for the first questions that all labels have.

    Takes the first and not the best records, so that the examples are not cherry-picked.
    """
    first = {
        label: {record["question"]: record for record in reversed(sequence)}
        for label, sequence in records.items()
    }
    questions = dict.fromkeys(r["question"] for each in records.values() for r in each)
    shared = [q for q in questions if all(q in by_q for by_q in first.values())]
    return [{label: by_q[q] for label, by_q in first.items()} for q in shared[:count]]
