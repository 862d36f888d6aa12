"""Figures of a run: pure functions from numbers to the bytes of a PNG.

Figures are created without pyplot, so there is no global state.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Z_95 = 1.96  # half width of a 95% interval in standard errors
WIDTH = 9.9  # inches; the same for all figures, so that a page scales them equally
INK, MUTED, GRID = "#1f2328", "#59636e", "#dfe3e8"
BLUE, PALE = "#2563c9", "#8db3ec"

# Word in the name of a metric -> unit of the metric; the first match is used.
UNITS = {
    "second": "per second",
    "seconds": "seconds",
    "length": "tokens",
    "tokens": "tokens",
    "fraction": "fraction",
    "kl": "nats per token",
    "entropy": "nats per token",
    "score": "nats per token",
    "value": "reward",
    "penalty": "reward",
}


def metric_groups(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Groups metrics into figures: the reward, its terms, then the other areas.

    If a metric has a `_mean`, its `_std` is the band of that curve and has no panel of
    its own; neither have its `_min` and `_max`.

        >>> metric_groups([{"step": 0, "reward/value_mean": 1.0, "policy/entropy": 2.0}])
        {'reward': ['reward/value_mean'], 'policy': ['policy/entropy']}
    """
    names = sorted({name for record in records for name in record if "/" in name})
    groups: dict[str, list[str]] = {"reward": [], "reward_terms": []}
    for name in names:
        area, _, quantity = name.partition("/")
        stem, _, statistic = name.rpartition("_")
        if statistic in ("std", "min", "max") and f"{stem}_mean" in names:
            continue
        if area == "reward" and quantity != "value_mean":
            area = "reward_terms"
        groups.setdefault(area, []).append(name)
    return {group: members for group, members in groups.items() if members}


def metric_curves(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    """Plots each metric over the steps in a panel of its own, at most three per line."""
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, 2.7 * lines), layout="constrained")
    for index, name in enumerate(names, start=1):
        _curve(figure.add_subplot(lines, columns, index), records, name)
    return png(figure)


def accuracy_bars(
    accuracies: Mapping[str, float], standard_errors: Mapping[str, float]
) -> bytes:
    """Plots a bar with a 95% interval for each evaluation, in percent."""
    heights = [100 * value for value in accuracies.values()]
    errors = [100 * Z_95 * standard_errors[label] for label in accuracies]
    tops = [height + error for height, error in zip(heights, errors)]
    positions = range(len(heights))
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.add_subplot()
    style(axes)
    axes.bar(positions, heights, width=0.5, color=PALE, zorder=2)
    lower = [min(height, error) for height, error in zip(heights, errors)]
    axes.errorbar(
        positions, heights, [lower, errors], fmt="none", ecolor=INK, capsize=5, zorder=3
    )
    for position, height, error, top in zip(positions, heights, errors, tops):
        axes.annotate(
            f"{height:.1f} ± {error:.1f}",
            (position, top),
            (0, 5),
            textcoords="offset points",
            ha="center",
            color=INK,
        )
    wrap = max(90 // len(heights), 8)
    labels = [textwrap.fill(label.replace("_", " "), wrap) for label in accuracies]
    axes.set_xticks(positions, labels, parse_math=False, color=INK)
    axes.set_xlim(-0.6, len(heights) - 0.4)
    axes.set_ylim(0, max(*tops, 1.0) * 1.15)
    axes.set_ylabel("accuracy (%)", color=MUTED)
    return png(figure)


def _curve(axes: Axes, records: Sequence[Mapping[str, Any]], name: str) -> None:
    present = [record for record in records if record.get(name) is not None]
    steps = [record["step"] for record in present]
    values = [record[name] for record in present]
    style(axes)
    marker = "o" if len(steps) <= 40 else None  # a single point has no visible line
    axes.plot(steps, values, color=BLUE, linewidth=1.6, marker=marker, markersize=3)
    if name.endswith("_mean"):
        std = name.removesuffix("_mean") + "_std"
        band = [record for record in present if record.get(std) is not None]
        axes.fill_between(
            [record["step"] for record in band],
            [record[name] - record[std] for record in band],
            [record[name] + record[std] for record in band],
            color=BLUE,
            alpha=0.15,
            linewidth=0,
        )
        if band:  # the median, so that outliers of the band do not set the scale
            median = sorted(record[std] for record in band)[len(band) // 2]
            axes.set_ylim(min(values) - median - 0.1, max(values) + median + 0.1)
    words = re.split("[/_]", name)
    axes.set_title(
        " ".join(words), loc="left", fontsize=10, color=INK, parse_math=False
    )
    axes.set_xlabel("step", color=MUTED)
    axes.set_ylabel(
        next((unit for word, unit in UNITS.items() if word in words), "value"),
        color=MUTED,
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_formatter("{x:.6g}")


def style(axes: Axes) -> None:
    """Applies the common style of all figures."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, length=0, labelsize=9)


def png(figure: Figure) -> bytes:
    """The bytes of the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, facecolor="white")
    return buffer.getvalue()
