"""Figures of a run: pure functions from numbers to the bytes of a PNG.

Figures are created without pyplot, so there is no global state.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlt_jax.settings import Section

Z_95 = 1.96  # half width of a 95% interval in standard errors
WIDTH = 9.9  # inches; the same for all figures, so that a page scales them equally
INK, MUTED, GRID = "#1f2328", "#59636e", "#dfe3e8"
BLUE, PALE = "#2563c9", "#8db3ec"

# Unit of a metric -> words in its name; the first unit with a word in the name is used.
UNITS = {
    "per second": {"second"},
    "seconds": {"seconds"},
    "tokens": {"length", "tokens"},
    "fraction": {"fraction"},
    "nats per token": {"kl", "entropy", "score"},
    "reward": {"value", "penalty"},
}


def metric_groups(records: Sequence[Section]) -> dict[str, list[str]]:
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


def metric_curves(records: Sequence[Section], names: Sequence[str]) -> bytes:
    """Plots each metric over the steps in a panel of its own, at most three per line."""
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, 2.7 * lines), layout="constrained")
    for index, name in enumerate(names, start=1):
        _curve(figure.add_subplot(lines, columns, index), records, name)
    return png(figure)


def accuracy_bars(results: Mapping[str, Section]) -> bytes:
    """Plots the accuracy of each evaluation with its 95% interval, in percent."""
    heights = [100 * result["accuracy"] for result in results.values()]
    spans = [100 * Z_95 * result["standard_error"] for result in results.values()]
    places = range(len(heights))
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.add_subplot()
    style(axes)
    below = [min(height, span) for height, span in zip(heights, spans)]
    errors = {"yerr": [below, spans], "ecolor": INK, "capsize": 5}
    bars = axes.bar(places, heights, width=0.5, color=PALE, zorder=2, **errors)
    texts = [f"{height:.1f} ± {span:.1f}" for height, span in zip(heights, spans)]
    axes.bar_label(bars, texts, padding=5, color=INK)
    wrap = max(90 // len(heights), 8)
    labels = [textwrap.fill(label.replace("_", " "), wrap) for label in results]
    axes.set_xticks(places, labels, parse_math=False, color=INK)
    axes.set_xlim(-0.6, len(heights) - 0.4)
    axes.set_ylim(0, 1.15 * max(1.0, *map(sum, zip(heights, spans))))
    axes.set_ylabel("accuracy (%)", color=MUTED)
    return png(figure)


def _curve(axes: Axes, records: Sequence[Section], name: str) -> None:
    present = [record for record in records if record.get(name) is not None]
    steps = [record["step"] for record in present]
    values = [record[name] for record in present]
    style(axes)
    marker = "o" if len(steps) <= 40 else None  # a line of one point is invisible
    axes.plot(steps, values, color=BLUE, linewidth=1.6, marker=marker, markersize=3)
    std = name.removesuffix("_mean") + "_std"
    band = [record for record in present if record.get(std) is not None]
    if band and name.endswith("_mean"):
        x, mean, spread = np.array([(r["step"], r[name], r[std]) for r in band]).T
        pale = {"color": BLUE, "alpha": 0.15, "linewidth": 0}
        axes.fill_between(x, mean - spread, mean + spread, **pale)
        # A few outliers may have a wide band, but the line must stay readable.
        usual = np.sort(spread)[len(spread) // 2] + 0.1
        axes.set_ylim(min(values) - usual, max(values) + usual)
    words = re.split("[/_]", name)
    unit = next((unit for unit, of in UNITS.items() if of & {*words}), "value")
    title = {"loc": "left", "fontsize": 10, "color": INK, "parse_math": False}
    axes.set_title(" ".join(words), **title)
    axes.set_xlabel("step", color=MUTED)
    axes.set_ylabel(unit, color=MUTED)
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
