"""A comparison for readers: sentences, Markdown tables, one page with its pictures.

<workdir>/<stage>/...  ->  comparison.json, comparison.md, comparison/index.html, *.png
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from rlt_jax.report import comparison_plots as plots
from rlt_jax.report.comparison import COSTS, ONE_RUN, Interval, compare
from rlt_jax.report.comparison_config import CompareConfig
from rlt_jax.report.files import Record, write_page

OUT = "comparison"  # folder of the page in the workdir
TOO_FEW_QUESTIONS = "too few questions"
SECONDS_NOTE = (
    "Seconds depend on the machine and on what else it does; seeds that run side by side "
    "share its cores."
)
SESSIONS_NOTE = (
    "† A stage was cut off and given again: its seconds are those of the last session "
    "alone, and the sum is too small."
)

Table = list[list[str]]  # the first row is the heading


def write_comparison(workdir: Path, config: CompareConfig) -> Record:
    """Writes JSON, Markdown, the page and its pictures; returns the verdicts' counts.

    Raises:
      UserError: as of `compare`.
    """
    found = compare(workdir, config)
    for claim in found["claims"]:
        claim["sentence"] = sentence(claim)
    if found["correlation"]:
        found["correlation"]["sentence"] = correlation_sentence(found["correlation"])
    text = json.dumps(found, indent=1) + "\n"
    (workdir / "comparison.json").write_text(text, encoding="utf-8")
    tables, notes = tables_of(found), _cost_notes(found)
    pictures = {"routes": plots.routes(found)}
    if found["claims"]:
        pictures["claims"] = plots.claims(found)
    if found["correlation"]:
        pictures["correlation"] = plots.correlation(found)
    if (picture := plots.costs(found)) is not None:
        pictures["costs"] = picture
    write_page(
        workdir / OUT,
        "comparison.html",
        pictures,
        run=workdir.resolve().name,
        found=found,
        counts=_counts(found),
        sections=_by_section(found["claims"]),
        tables=tables,
        notes=notes,
    )
    markdown = "\n".join(
        f"### {title}\n\n{_markdown(table)}" for title, table in tables.items()
    )
    markdown += "".join(f"\n{note}\n" for note in notes)
    file = workdir / "comparison.md"
    file.write_text(markdown, encoding="utf-8", errors="replace")
    return {"routes": len(found["routes"]), "verdicts": _counts(found)}


def sentence(claim: Record) -> str:
    """A claim's verdict with all that it rests on, in one sentence."""
    found = claim["difference"]
    side = "above" if found["mean"] >= 0 else "below"
    seeds = [of_seed["difference"] for of_seed in claim["seeds"].values()]
    runs = "" if len(seeds) == 1 else f"95% over runs {_span(found['over_runs'])}; "
    questions = TOO_FEW_QUESTIONS
    if found["over_questions"]:
        questions = f"95% over questions {_span(found['over_questions'])}"
    margin = f"; margin {100 * claim['margin']:.1f}" if claim["margin"] else ""
    return (
        f"{_capital(claim['verdict'])}: {claim['better']} "
        f"{100 * abs(found['mean']):.1f} points {side} {claim['worse']} "
        f"({runs}{questions}; "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(_percent, seeds))}{margin})."
    )


def correlation_sentence(correlation: Record) -> str:
    """The verdict on ranks and accuracies, with all that it rests on."""
    text = _correlation_sentence(correlation)
    if fewer := correlation.get("without"):
        text += f" {_without(correlation)}: {_correlation_sentence(fewer)}"
    return text


def _without(correlation: Record) -> str:
    left = correlation["without"]["routes"]
    gone = [label for name, label in correlation["routes"].items() if name not in left]
    return f"Without {'; '.join(gone)}"


def _correlation_sentence(correlation: Record) -> str:
    pooled = correlation["pooled"]
    parts = []
    for name in ("pearson", "spearman"):
        value, interval = pooled[name]["value"], pooled[name]["interval"]
        if value is None:
            parts.append(f"no {name.capitalize()}, as all are the same")
            continue
        span = f" (95% {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
        parts.append(f"{name.capitalize()} {value:.2f}{span}")
    routes, seeds = len(correlation["routes"]), len(correlation["seeds"])
    return (
        f"{_capital(correlation['verdict'])}: rank of the traces' reward against right "
        f"answers, {', '.join(parts)}, over {pooled['points']} points, which are "
        f"{routes} routes in {seeds} run{'s' * (seeds > 1)}."
    )


def tables_of(found: Record) -> dict[str, Table]:
    """Title -> table, of everything that a README would show."""
    tables = {}
    for section, claims in _by_section(found["claims"]).items():
        tables[_titled("Claims", section)] = _claims_table(claims)
    for section, routes in _by_section(found["routes"].values()).items():
        tables[_titled("Right answers (%)", section)] = _routes_table(routes)
    if found["correlation"]:
        title = "Rank of the traces' reward and right answers"
        tables[title] = _correlation_table(found["correlation"])
    for section, measures in _by_section(found["measures"]).items():
        tables[_titled("Measures", section)] = _measures_table(measures)
    costly = [route for route in found["routes"].values() if route["cost"]]
    for section, routes in _by_section(costly).items():
        tables[_titled("Costs, mean over runs", section)] = _costs_table(routes)
    return tables


def _claims_table(claims: Sequence[Record]) -> Table:
    heading = ["claim", "difference (points)", "95% over runs", "95% over questions"]
    table = [heading + ["each run", "verdict"]]
    for claim in claims:
        found = claim["difference"]
        seeds = [of_seed["difference"] for of_seed in claim["seeds"].values()]
        table.append(
            [
                f"{claim['title']}: {claim['better']} − {claim['worse']}",
                _percent(found["mean"]),
                _span(found["over_runs"]),
                _span(found["over_questions"], TOO_FEW_QUESTIONS),
                ", ".join(map(_percent, seeds)),
                claim["verdict"],
            ]
        )
    return table


def _routes_table(routes: Sequence[Record]) -> Table:
    heading = ["route", "mean ± 95% over runs", "± 95% over questions", "each run"]
    table = [[*heading, "questions × samples"]]
    for route in routes:
        found = route["accuracy"]
        runs, questions = (
            f"± {50 * (ends[1] - ends[0]):.1f}" if ends else none
            for ends, none in (
                (found["over_runs"], ONE_RUN),
                (found["over_questions"], TOO_FEW_QUESTIONS),
            )
        )
        seeds = [of_seed["accuracy"] for of_seed in route["seeds"].values()]
        sizes = dict.fromkeys(
            f"{of_seed['questions']} × {of_seed['samples_per_question']}"
            for of_seed in route["seeds"].values()
        )
        table.append(
            [
                route["label"],
                f"{_percent(found['mean'])} {runs}",
                questions,
                ", ".join(map(_percent, seeds)),
                ", ".join(sizes),
            ]
        )
    return table


def _correlation_table(correlation: Record) -> Table:
    seeds = correlation["seeds"]
    table = [["", *(f"seed {s}: rank, right" for s in seeds), "all runs"]]
    for name, label in correlation["routes"].items():
        runs = [of_seed["routes"][name] for of_seed in seeds.values()]
        cells = [f"{r['mean_rank']:.2f}, {_percent(r['accuracy'])} %" for r in runs]
        table.append([label, *cells, ""])
    counts = {"": correlation}
    if fewer := correlation.get("without"):
        counts[f". {_without(correlation)}"] = fewer
    for suffix, count in counts.items():
        for name in ("pearson", "spearman"):
            parts = [*count["seeds"].values(), count["pooled"]]
            values = [part[name]["value"] for part in parts]
            shown = ["–" if value is None else f"{value:.2f}" for value in values]
            table.append([name.capitalize() + suffix, *shown])
    return table


def _measures_table(measures: Sequence[Record]) -> Table:
    table = [["measure", "mean", "standard deviation over runs", "each run"]]
    for one in measures:
        seeds = ", ".join(map(_number, one["seeds"].values()))
        deviation = one["standard_deviation"]
        spread = ONE_RUN if deviation is None else _number(deviation)
        table.append([one["label"], _number(one["mean"]), spread, seeds])
    return table


def _costs_table(routes: Sequence[Record]) -> Table:
    table = [["route", "seconds", *(name.replace("_", " ") for name in COSTS)]]
    for route in routes:
        mean = route["cost"]["mean"]
        seconds, *counts = (f"{mean[name]:,.0f}" for name in ("seconds", *COSTS[:-1]))
        seconds += "†" * _took_sessions(route)
        table.append([route["label"], seconds, *counts, f"{mean['flops']:.3g}"])
    return table


def _took_sessions(route: Record) -> bool:
    seeds = route["cost"]["seeds"].values()
    return any(of_seed["sessions"] > 1 for of_seed in seeds)


def _cost_notes(found: Record) -> list[str]:
    """What has to be known of the costs; empty where there are none."""
    costly = [route for route in found["routes"].values() if route["cost"]]
    notes = [SECONDS_NOTE] * bool(costly)
    return notes + [SESSIONS_NOTE] * any(map(_took_sessions, costly))


def _counts(found: Record) -> dict[str, int]:
    verdicts = [claim["verdict"] for claim in found["claims"]]
    return {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}


def _by_section(parts: Sequence[Record]) -> dict[str, list[Record]]:
    sections: dict[str, list[Record]] = {}
    for part in parts:
        sections.setdefault(part["section"], []).append(part)
    return sections


def _titled(title: str, section: str) -> str:
    return f"{title}: {section}" if section else title


def _markdown(table: Table) -> str:
    """A Markdown table; labels are shown as they are."""
    rows = [
        " | ".join(
            " ".join(html.escape(cell, quote=False).replace("|", "\\|").split())
            for cell in row
        )
        for row in table
    ]
    rule = " | ".join(["---"] + ["---:"] * (len(table[0]) - 1))
    return "".join(f"| {row} |\n" for row in [rows[0], rule, *rows[1:]])


def _span(interval: Interval | None, otherwise: str = ONE_RUN) -> str:
    if interval is None:
        return otherwise
    return f"{_percent(interval[0])} to {_percent(interval[1])}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".replace("-", "−")


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
