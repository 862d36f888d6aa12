"""Pictures of a comparison: pure functions from its numbers to the bytes of a PNG."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlt_jax.report.plots import BLUE, GRID, INK, MUTED, PALE, WIDTH, png, style

GOOD, BAD = "#1a7f37", "#b42318"
LABEL_WIDTH = 38  # characters before a label is broken


class Row(NamedTuple):
    """A line of `intervals`; all numbers in percent or points."""

    section: str
    label: str
    numbers: Mapping[str, Any]  # as of comparison.over_seeds, in shares
    seeds: Sequence[float]  # in shares
    note: str
    colour: str


def routes(found: Mapping[str, Any]) -> bytes:
    """Accuracy of every route, with its intervals and every run."""
    rows = []
    for route in found["routes"].values():
        accuracy = route["accuracy"]
        seeds = [of_seed["accuracy"] for of_seed in route["seeds"].values()]
        note = f"{100 * accuracy['mean']:.1f}"
        label = wrapped(route["label"])
        row = Row(route["section"], label, accuracy, seeds, note, BLUE)
        rows.append(row)
    return intervals(rows, "right answers (%)", (0, 100), None)


def claims(found: Mapping[str, Any]) -> bytes:
    """The difference of every claim, with its intervals, every run, and the verdict."""
    rows = []
    for claim in found["claims"]:
        seeds = [of_seed["difference"] for of_seed in claim["seeds"].values()]
        verdict = textwrap.fill(claim["verdict"], 22)
        points = f"{100 * claim['difference']['mean']:+.1f}".replace("-", "−")
        note = f"{points}  {verdict}"
        if claim["margin"]:
            note += f"\n(margin {100 * claim['margin']:.1f})"
        colour = {"seen": GOOD, "opposite": BAD}.get(claim["verdict"], BLUE)
        label = f"{wrapped(claim['better'])}\n− {wrapped(claim['worse'])}"
        row = Row(claim["section"], label, claim["difference"], seeds, note, colour)
        rows.append(row)
    what = "difference in right answers (points; as published: to the right)"
    return intervals(rows, what, (-100, 100), 0.0)


def intervals(
    rows: Sequence[Row], what: str, limits: tuple[float, float], zero: float | None
) -> bytes:
    """Rows from top to bottom: mean, both intervals, a point for each run, a note.

    Args:
      rows: in the order of their sections, whose names stand above them.
      what: label of the axis.
      limits: what the axis can hold; intervals may reach beyond and are cut there.
      zero: where a line is drawn.
    """
    places, headers, y = [], [], 0.0
    section, sections = "", list(dict.fromkeys(row.section for row in rows))
    rows = sorted(rows, key=lambda row: sections.index(row.section))
    for row in rows:
        if row.section != section:
            section = row.section
            headers.append((y + 0.7, wrapped(section)))
            y += 1.2
        height = 1.0 + 0.4 * max(row.label.count("\n"), row.note.count("\n"))
        places.append(y + height / 2)
        y += height
    figure = Figure(figsize=(WIDTH, 1.1 + 0.36 * y), layout="constrained")
    axes = figure.add_subplot()
    style(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    for place, row in zip(places, rows):
        _interval(axes, place, row)
    for place, name in headers:
        axes.annotate(
            name,
            (0, place),
            (-6, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="center",
            color=INK,
            weight="bold",
            parse_math=False,
        )
    if zero is not None:
        axes.axvline(zero, color=MUTED, linewidth=1.2, zorder=1)
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, limits[0] - 2), min(high, limits[1] + 2))
    axes.set_ylim(y, 0)
    axes.set_yticks(places, [row.label for row in rows], parse_math=False, color=INK)
    axes.set_xlabel(what, color=MUTED)
    _legend(figure)
    return png(figure)


def correlation(found: Mapping[str, Any]) -> bytes:
    """Rank of the traces against accuracy, a point for each run of a route."""
    ranks = found["correlation"]
    figure, axes = _scatter("mean rank of the traces' reward (1 = lowest)")
    places = []
    for name, label in ranks["routes"].items():
        runs = [of_seed["routes"][name] for of_seed in ranks["seeds"].values()]
        x = [run["mean_rank"] for run in runs]
        y = [100 * run["accuracy"] for run in runs]
        middle = sum(x) / len(x), sum(y) / len(y)
        for run in zip(x, y):
            axes.plot(*zip(middle, run), color=PALE, linewidth=1, zorder=2)
        axes.scatter(x, y, s=30, color=PALE, zorder=2)
        places.append((*middle, label))
    _label_points(axes, places)
    return png(figure)


def costs(found: Mapping[str, Any]) -> bytes | None:
    """Accuracy against operations; None where no route counted any."""
    places, labels = [], [route["label"] for route in found["routes"].values()]
    for route in found["routes"].values():
        label = route["label"]
        if labels.count(label) > 1:
            label = f"{label} ({route['section']})"
        flops = route["cost"]["mean"]["flops"] if route["cost"] else 0.0
        if flops > 0:
            places.append((flops, 100 * route["accuracy"]["mean"], label))
    if not places:
        return None
    figure, axes = _scatter("floating-point operations of all stages, mean over runs")
    axes.set_xscale("log")
    axes.tick_params(which="both", colors=MUTED, length=0, labelsize=9)
    _label_points(axes, places)
    return png(figure)


def _interval(axes: Axes, place: float, row: Row) -> None:
    numbers = row.numbers
    questions, runs = numbers["over_questions"], numbers["over_runs"]
    if runs is not None:
        ends = [100 * end for end in runs]
        axes.plot(ends, [place] * 2, "|-", color=row.colour, linewidth=1.3, zorder=3)
    if questions is not None:
        ends = [100 * end for end in questions]
        axes.plot(
            ends, [place] * 2, color=row.colour, linewidth=6, alpha=0.35, zorder=2,
            solid_capstyle="butt",
        )  # fmt: skip
    seeds = [100 * value for value in row.seeds]
    axes.scatter(
        seeds, [place + 0.24] * len(seeds), s=13, facecolor="white", edgecolor=MUTED,
        linewidth=0.9, zorder=4,
    )  # fmt: skip
    axes.scatter([100 * numbers["mean"]], [place], s=38, color=row.colour, zorder=5)
    axes.annotate(
        row.note,
        (1, place),
        (8, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="center",
        color=row.colour if row.colour != BLUE else INK,
        fontsize=9,
        parse_math=False,
    )


def _legend(figure: Figure) -> None:
    hollow = {"markerfacecolor": "white", "markeredgecolor": MUTED, "markersize": 4}
    marks = {
        "mean over runs": Line2D([], [], color=BLUE, marker="o", linestyle=""),
        "95% over runs": Line2D([], [], color=BLUE, marker="|", linewidth=1.3),
        "95% over questions": Line2D([], [], color=BLUE, linewidth=6, alpha=0.35),
        "each run": Line2D([], [], marker="o", linestyle="", **hollow),
    }
    figure.legend(
        marks.values(), marks, loc="outside upper left", ncols=len(marks),
        frameon=False, fontsize=9, labelcolor=MUTED,
    )  # fmt: skip


def _scatter(what: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    axes = figure.add_subplot()
    style(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_xlabel(what, color=MUTED)
    axes.set_ylabel("right answers (%)", color=MUTED)
    return figure, axes


def _label_points(axes: Axes, places: Sequence[tuple[float, float, str]]) -> None:
    """Draws points and names them in a column on the right, where none overlap."""
    places = sorted(places, key=lambda place: place[1])
    labels = [wrapped(label) for _, _, label in places]
    axes.scatter(*zip(*[place[:2] for place in places]), s=44, color=BLUE, zorder=3)
    lines = sum(label.count("\n") + 1.35 for label in labels)
    axes.figure.set_figheight(max(5.4, 0.8 + 0.17 * lines))
    axes.margins(0.06)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    room = [(label.count("\n") + 1.35) / max(lines, 27.0) for label in labels]
    heights = [(y - low) / (high - low) for _, y, _ in places]
    for (x, y, _), label, height in zip(places, labels, spread_out(heights, room)):
        axes.annotate(
            label,
            (x, y),
            (1.04, height),
            textcoords="axes fraction",
            va="center",
            color=INK,
            fontsize=9,
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "color": MUTED,
                "linewidth": 0.6,
            },
        )


def wrapped(label: str) -> str:
    """A label in lines that leave room for what it names."""
    return textwrap.fill(label, LABEL_WIDTH)


def spread_out(centres: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Moves centres, in rising order, as little as keeps all apart and inside 0 to 1.

    >>> spread_out([0.5, 0.5], [0.25, 0.25])
    [0.5, 0.75]
    """
    moved: list[float] = []
    floor = 0.0
    for centre, size in zip(centres, sizes):
        moved.append(max(centre, floor + size / 2))
        floor = moved[-1] + size / 2
    ceiling = 1.0
    for n in reversed(range(len(moved))):
        moved[n] = min(moved[n], ceiling - sizes[n] / 2)
        ceiling = moved[n] - sizes[n] / 2
    return moved
