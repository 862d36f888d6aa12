"""Pictures of a comparison: pure functions from its numbers to the bytes of a PNG."""

import itertools
import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.statistics import Record
from rlt_jax.report.plots import BLUE, GRID, INK, MUTED, PALE, WIDTH, png, style

COLORS = {"seen": "#1a7f37", "opposite": "#b42318"}  # of verdicts; else blue


def make_pictures(comparison: Record) -> dict[str, bytes]:
    """Name -> PNG of every picture that the comparison has numbers for."""
    routes, claims = comparison["routes"], comparison["claims"]
    pictures = {"routes": intervals([*routes.values()], "accuracy (%)")}
    if claims:
        pictures["claims"] = intervals(claims, "difference in accuracy (points)")
    if comparison["correlation"]:
        points = pd.DataFrame(comparison["correlation"]["points"])
        points["route"] = [routes[name]["label"] for name in points["route"]]
        name = "mean rank of the traces by reward (1 is the lowest)"
        pictures["correlation"] = scatter(points.drop(columns="seed"), name)
    costs = [
        {"route": r["label"], "flops": r["cost"]["flops"], "accuracy": r["mean"]}
        for r in routes.values()
        if r["cost"]
    ]
    if costs:
        name = "model flops of all stages, mean over runs"
        pictures["costs"] = scatter(pd.DataFrame(costs), name, "log")
    return pictures


def intervals(parts: Sequence[Record], xlabel: str) -> bytes:
    """A panel for each section, in it mean, both intervals and every run of each part.

    Args:
      parts: routes or claims of a comparison, those of a section side by side.
      xlabel: label of the x axis; what is shown is in percent.
    """
    groups = [[*group] for _, group in itertools.groupby(parts, lambda x: x["section"])]
    sizes = [len(group) for group in groups]
    size = (WIDTH, 1 + 0.52 * len(parts) + 0.35 * len(groups))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(
        len(groups), sharex=True, squeeze=False, height_ratios=sizes
    )
    for axes, group in zip(panels[:, 0], groups):
        style(axes)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=GRID)
        axes.axvline(0, color=MUTED, zorder=1)
        axes.set_title(group[0]["section"], loc="left", fontsize=10, weight="bold")
        axes.set_ylim(len(group) - 0.5, -0.5)
        labels = [textwrap.fill(part["label"], 44) for part in group]
        axes.set_yticks(range(len(group)), labels, color=INK, parse_math=False)
        for y, part in enumerate(group):
            _draw(axes, y, part)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -102), min(high, 102))
    axes.set_xlabel(xlabel, color=MUTED)
    handles = dict(zip(*reversed(panels[0, 0].get_legend_handles_labels())))
    place = {"loc": "outside upper left", "ncols": len(handles), "frameon": False}
    figure.legend(handles.values(), handles, fontsize=9, **place)
    return png(figure)


def scatter(points: pd.DataFrame, xlabel: str, xscale: str = "linear") -> bytes:
    """Accuracy against something else, with labels in a column on the right.

    Args:
      points: columns `route` (label), `accuracy` (fraction) and one more for the x axis;
        several rows of a route are runs, around their mean.
      xlabel: label of the x axis.
      xscale: its scale.
    """
    (x,) = points.columns.difference(["route", "accuracy"])
    points = points.assign(accuracy=100 * points["accuracy"])
    means = points.groupby("route").mean().sort_values("accuracy")
    size = (WIDTH, max(5.4, 0.33 * len(means)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xscale=xscale, xlabel=xlabel, ylabel="accuracy (%)")
    style(axes)
    for route, run in points.set_index("route").iterrows():
        line = [[means[name][route], run[name]] for name in (x, "accuracy")]
        axes.plot(*line, "o-", color=PALE, linewidth=1)
    axes.plot(means[x], means["accuracy"], "o", color=BLUE)
    for n, (label, mean) in enumerate(means.iterrows()):
        axes.annotate(
            textwrap.fill(label, 38),
            (mean[x], mean["accuracy"]),
            (1.04, (n + 0.5) / len(means)),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "linewidth": 0.6},
        )
    return png(figure)


def _draw(axes: Axes, y: float, part: Record) -> None:
    color = COLORS.get(part.get("verdict"), BLUE)
    for name, form in (
        ("over_questions", {"linewidth": 6, "alpha": 0.35, "solid_capstyle": "butt"}),
        ("over_runs", {"linewidth": 1.3, "marker": "|"}),
    ):
        if part[name]:
            ends, label = [100 * end for end in part[name]], name.replace("_", " ")
            axes.plot(ends, [y, y], color=color, label=f"95% {label}", **form)
    mean, runs = 100 * part["mean"], [100 * run for run in part["each_run"].values()]
    axes.plot(mean, y, "o", color=color, label="mean over runs")
    places = [y + 0.24] * len(runs)
    axes.plot(runs, places, "o", color=MUTED, mfc="white", ms=4, label="each run")
    axes.annotate(
        textwrap.fill(f"{mean:.1f} {part.get('verdict', '')}", 26),
        (1.01, y),
        xycoords=axes.get_yaxis_transform(),
        va="center",
        fontsize=9,
        color=color,
    )
