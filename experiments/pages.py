"""A comparison for readers: tables and a page with pictures.

comparison.json, comparison.md, comparison/index.html, comparison/*.png
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import jinja2
import pandas as pd

from experiments import plots
from experiments.statistics import ONE_RUN, Interval, Record


def write_comparison(
    workdir: Path,
    comparison: Record,
    more_pictures: Mapping[str, bytes] = MappingProxyType({}),
    more_tables: Mapping[str, pd.DataFrame] = MappingProxyType({}),
) -> Path:
    """Writes the result of `compare` as JSON, Markdown and HTML; returns the page.

    Args:
      workdir: where it goes.
      comparison: of `compare`.
      more_pictures: shown first, by name.
      more_tables: shown below them, by title.
    """
    text = json.dumps(comparison, indent=1) + "\n"
    (workdir / "comparison.json").write_text(text, encoding="utf-8")
    tables = {**more_tables, **make_tables(comparison)}
    markdown = (
        f"### {title}\n\n{table.to_markdown(index=False, disable_numparse=True)}\n"
        for title, table in tables.items()
    )
    (workdir / "comparison.md").write_text("\n".join(markdown), encoding="utf-8")
    folder = workdir / "comparison"
    folder.mkdir(exist_ok=True)
    pictures = {**more_pictures, **plots.make_pictures(comparison)}
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    with pd.option_context("display.max_colwidth", None):  # or long cells are cut off
        html = {title: table.to_html(index=False) for title, table in tables.items()}
    template = Path(__file__).with_name("comparison.html").read_text(encoding="utf-8")
    page = jinja2.Template(template, autoescape=True).render(
        run=workdir.resolve().name,
        seeds=comparison["seeds"],
        tables=html,
        pictures=pictures,
        first_pictures=[*more_pictures],
        first_tables=[*more_tables],
    )
    (folder / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def make_tables(comparison: Record) -> dict[str, pd.DataFrame]:
    """Title -> table of texts: a table for each section of each kind of result."""
    routes = comparison["routes"].values()
    costs = [
        {"section": route["section"], "route": route["label"]}
        | {name.replace("_", " "): f"{x:.4g}" for name, x in route["cost"].items()}
        for route in routes
        if route["cost"]
    ]
    kinds = {
        "Claims": [_claim_row(claim) for claim in comparison["claims"]],
        "Accuracy (%)": [_row(route, _percent) for route in routes],
        "Correlation": _correlation_rows(comparison["correlation"]),
        "Measures": [_row(x, "{:.4g}".format) for x in comparison["measures"]],
        "Costs": costs,
    }
    return {
        f"{kind}: {section}": part.drop(columns="section")
        for kind, rows in kinds.items()
        if rows
        for section, part in pd.DataFrame(rows).groupby("section", sort=False)
    }


def _row(part: Record, text: Callable[[float], str]) -> dict[str, str]:
    """Mean, intervals and runs of a route, a claim or a measure."""
    row = {"section": part["section"], "": part["label"], "mean": text(part["mean"])}
    row["95% over runs"] = _span(part["over_runs"], text, ONE_RUN)
    if "over_questions" in part:
        span = _span(part["over_questions"], text, "too few questions")
        row["95% over questions"] = span
    return row | {"each run": ", ".join(map(text, part["each_run"].values()))}


def _claim_row(claim: Record) -> dict[str, str]:
    margin = f" (margin {_percent(claim['margin'])})" if claim["margin"] else ""
    verdict = {"verdict": claim["verdict"] + margin, "published": claim["published"]}
    return _row(claim, _percent) | verdict


def _correlation_rows(correlation: Record | None) -> list[dict[str, str]]:
    return [
        {
            "section": correlation["published"],
            "": x["label"],
            "value": _number(x["value"]),
            "95%": _span(x["interval"], _number, "–"),
            "each run": ", ".join(map(_number, x["each_run"].values())),
            "routes": str(x["routes"]),
            "verdict": x["verdict"],
        }
        for x in (correlation["correlations"] if correlation else ())
    ]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _span(
    interval: Interval | None, text: Callable[[float], str], otherwise: str
) -> str:
    return " to ".join(map(text, interval)) if interval else otherwise
