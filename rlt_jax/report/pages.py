"""The report: what a run measured, as one page for a reader and one JSON for programs.

    <workdir>/<stage>/...  ->  <workdir>/report/index.html, report/*.png, summary.json

The page holds its pictures and style in itself, so that it can be sent as one file.
Everything that a model or a data set wrote is escaped.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlt_jax.errors import UserError
from rlt_jax.report import plots, statistics
from rlt_jax.report.files import Record, read_json, read_lines, write_page

OUT = "report"  # folder of the page in the workdir


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Which stages of the run the report reads; every value is a folder in the workdir.

    Attributes:
      rl: the teacher's reinforcement learning.
      traces: (label, collect stage) pairs; explanations are shown in this order.
      evaluations: (label, evaluate stage) pairs, all on the same questions; the last is
        compared with the one before it.
      num_examples: how many questions are shown with explanations and with answers.
    """

    rl: str
    traces: Sequence[tuple[str, str]]
    evaluations: Sequence[tuple[str, str]]
    num_examples: int = 6


def write_report(workdir: Path, config: ReportConfig, *, seed: int) -> Record:
    """Writes the page, its pictures and `summary.json`; returns the summary.

    Raises:
      UserError: a stage that the config names has not left its files, or the
        evaluations cannot be compared.
    """
    teacher = read_json(workdir / config.rl / "done.json")["summary"]
    metrics = read_lines(workdir / config.rl / "metrics.jsonl")
    traces = {
        label: read_lines(workdir / folder / "traces.jsonl")
        for label, folder in config.traces
    }
    results = {
        label: read_json(workdir / folder / "results.json")
        for label, folder in config.evaluations
    }
    answers = {
        label: read_lines(workdir / folder / "samples.jsonl")
        for label, folder in config.evaluations
    }
    summary = {
        "teacher_reward_warmup": teacher["held_out_reward_first"],
        "teacher_reward_warmup_standard_error": teacher[
            "held_out_reward_standard_error_first"
        ],
        "teacher_reward_rl": teacher["held_out_reward_last"],
        "teacher_reward_rl_standard_error": teacher[
            "held_out_reward_standard_error_last"
        ],
        **_accuracies(results, answers),
        "seed": seed,
        **_seconds(workdir),
    }
    write_page(
        workdir / OUT,
        "page.html",
        _pictures(metrics, results),
        run=workdir.resolve().name,
        summary=summary,
        teacher=teacher,
        evaluations=list(results),
        explanations=_side_by_side(traces, config.num_examples),
        answers=_side_by_side(answers, config.num_examples),
        z_95=plots.Z_95,
    )
    text = json.dumps(summary, indent=2) + "\n"
    (workdir / "summary.json").write_text(text, encoding="utf-8")
    return summary


def _accuracies(
    results: Mapping[str, Record], answers: Mapping[str, Sequence[Record]]
) -> Record:
    if not results:
        return {}
    sizes = {(r["num_questions"], r["samples_per_question"]) for r in results.values()}
    if len(sizes) > 1:
        raise UserError(
            f"the evaluations {', '.join(results)} differ in questions or in samples "
            f"per question: {sorted(sizes)}. Evaluate all on the same."
        )
    summary: Record = {}
    for label, result in results.items():
        summary[f"accuracy_{label}"] = result["accuracy"]
        summary[f"accuracy_{label}_standard_error"] = result["standard_error"]
    if len(results) > 1:
        before, after = list(results)[-2:]
        compared = statistics.compare(
            statistics.accuracy_by_question(answers[after], after),
            statistics.accuracy_by_question(answers[before], before),
            (after, before),
        )
        for name, value in compared._asdict().items():
            key = "accuracy_difference"
            summary[key if name == "difference" else f"{key}_{name}"] = value
    summary["n_eval"], summary["samples_per_question"] = sizes.pop()
    return summary


def _seconds(workdir: Path) -> Record:
    """Seconds of every completed stage but the report itself, in the order they ended."""
    done = [path for path in workdir.glob("*/done.json") if path.parent.name != OUT]
    done.sort(key=lambda path: (path.stat().st_mtime_ns, path))
    seconds = {path.parent.name: read_json(path)["seconds"] for path in done}
    return {"seconds_total": math.fsum(seconds.values()), "seconds": seconds}


def _pictures(
    metrics: Sequence[Record], results: Mapping[str, Record]
) -> dict[str, bytes]:
    pictures = {
        group: plots.metric_curves(metrics, names)
        for group, names in plots.metric_groups(metrics).items()
    }
    if results:
        pictures["accuracy"] = plots.accuracy_bars(
            {label: result["accuracy"] for label, result in results.items()},
            {label: result["standard_error"] for label, result in results.items()},
        )
    return pictures


def _side_by_side(
    records: Mapping[str, Sequence[Record]], count: int
) -> list[dict[str, Record]]:
    """The first record of each of the first questions that every label holds.

    The first ones, not the best ones: what is shown is not picked by its success.
    """
    first: list[dict[str, Record]] = []
    for rows in records.values():
        by_question: dict[str, Record] = {}
        for row in rows:
            by_question.setdefault(row["question"], row)
        first.append(by_question)
    if not first:
        return []
    shared = [q for q in first[0] if all(q in questions for questions in first)]
    return [
        {label: questions[q] for label, questions in zip(records, first)}
        for q in shared[:count]
    ]
