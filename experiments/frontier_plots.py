"""Pictures of the frontier: pure functions from its numbers to the bytes of a PNG."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.frontier import ROUTES
from experiments.frontier_cells import Cell
from experiments.statistics import Record
from rlt_jax.report.plots import BLUE, INK, MUTED, WIDTH, png, style

Curves = Mapping[Cell, Mapping[str, Sequence[tuple[float, Record]]]]

NEVER = "No careful steps (c = 0)"  # title of a panel
# Route -> color, line style, marker.
LOOKS = {
    "solver": (INK, "-", "o"),
    "solved": (INK, "--", "P"),
    "rejection": (MUTED, ":", "s"),
    "worked": ("#1a7f37", "--", "^"),
    "worked_solver": ("#1a7f37", "-", "^"),
    "warmup": ("#e8871e", "--", "v"),
    "rlt": ("#d1242f", "-", "D"),
    "rlt_clip": ("#8250df", "-", "D"),
    "on_rlt": (BLUE, "-", "x"),
    "on_itself": (BLUE, ":", "x"),
}


def frontier(of_cells: Curves) -> bytes:
    """Right answers of every route against what the base makes of the questions.

    Left: the share c of careful steps falls. Right: the base never takes careful steps,
    and the answer has more and more digits. Dots are runs, lines join their means, and
    bars are 95% intervals over runs.
    """
    most = max(cell.chains for cell in of_cells)
    panels = {
        f"Answers of {most} digits": [c for c in of_cells if c.chains == most],
        NEVER: sorted((c for c in of_cells if not c.share), key=lambda c: c.chains),
    }
    panels = {title: cells for title, cells in panels.items() if cells}
    figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
    sizes = [len(cells) for cells in panels.values()]
    axes = figure.subplots(
        1, len(panels), sharey=True, squeeze=False, width_ratios=sizes
    )
    for panel, (title, cells) in zip(axes[0], panels.items()):
        style(panel)
        panel.set_title(title, loc="left", fontsize=10, weight="bold")
        for n, name in enumerate(ROUTES):
            aside = 0.03 * (n - len(ROUTES) / 2)  # so that no bar hides another
            points = [
                (place + aside, of_cells[cell][name][-1][1])
                for place, cell in enumerate(cells)
                if name in of_cells[cell]
            ]
            if points:
                _line(panel, name, points)
        ticks = []
        for cell in cells:
            base = next(iter(of_cells[cell].values()))[0][1]["mean"]
            setting = cell.digits if title == NEVER else f"c = {cell.share:g}"
            ticks.append(f"{setting}\nbase {100 * base:.1f}%")
        panel.set_xticks(range(len(cells)), ticks, color=INK)
        panel.set_xlim(-0.3, len(cells) - 0.7)
    axes[0, 0].set_ylabel("right answers (%)", color=MUTED)
    _legend(figure)
    return png(figure)


def compute(of_cells: Curves) -> bytes:
    """Right answers against model operations, a panel per cell; dotted at 50%."""
    columns = min(3, len(of_cells))
    lines = -(-len(of_cells) // columns)
    figure = Figure(figsize=(WIDTH, 1.6 + 2.6 * lines), layout="constrained")
    for place, (cell, routes) in enumerate(of_cells.items(), start=1):
        panel = figure.add_subplot(lines, columns, place)
        style(panel)
        panel.set_title(cell.label, loc="left", fontsize=10, weight="bold")
        panel.axhline(50, color=MUTED, linestyle=":", linewidth=1)
        panel.set_ylim(-4, 104)
        for name, points in routes.items():
            _line(panel, name, [(flops / 1e12, x) for flops, x in points])
        if place % columns == 1 or columns == 1:
            panel.set_ylabel("right answers (%)", color=MUTED)
        if place > len(of_cells) - columns:
            panel.set_xlabel("model operations (10¹²)", color=MUTED)
    _legend(figure)
    return png(figure)


def _line(axes: Axes, name: str, points: Sequence[tuple[float, Record]]) -> None:
    color, line, marker = LOOKS[name]
    for place, numbers in points:
        runs = [100 * mean for mean in numbers["each_run"].values()]
        axes.plot([place] * len(runs), runs, ".", color=color, markersize=4, alpha=0.5)
    places = [place for place, _ in points]
    means = [100 * numbers["mean"] for _, numbers in points]
    ends = [numbers["over_runs"] or [numbers["mean"]] * 2 for _, numbers in points]
    errors = [
        [mean - max(0, 100 * low) for mean, (low, _) in zip(means, ends)],
        [min(100, 100 * high) - mean for mean, (_, high) in zip(means, ends)],
    ]
    axes.errorbar(
        places,
        means,
        yerr=errors,
        color=color,
        linestyle=line,
        marker=marker,
        markersize=5,
        linewidth=1.6,
        ecolor=(color, 0.5),
        elinewidth=0.8,
        capsize=2,
        label=ROUTES[name].label,
    )


def _legend(figure: Figure) -> None:
    bars = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels())
    }
    labels = [route.label for route in ROUTES.values() if route.label in bars]
    lines = [bars[label].lines[0] for label in labels]
    place = {"loc": "outside lower center", "ncols": 2, "frameon": False}
    figure.legend(lines, labels, fontsize=9, handlelength=3.5, **place)
