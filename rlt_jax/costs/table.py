"""Formats a plan as text of at most 100 columns."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 100
_BYTES = ("arguments", "temporaries", "outputs", "resident", "total", "limit")
# Heading -> what a time is bound by; between chips of a slice (ICI) and slices (DCN).
_LIMITS = {
    "compute": "compute",
    "HBM": "memory",
    "ICI": "interconnect",
    "DCN": "network",
}
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def render(plan: Mapping[str, Any]) -> str:
    """Formats the memory and costs of a plan's programs and of the whole recipe.

    Args:
      plan: `topology`, `fits`, `programs` and `recipe`. A program has `name`, `fits`,
        `bytes` per device by name, `collectives` by kind with `count` and `bytes`,
        `model_flops`, `executed_flops`, `roofline` with `compute_seconds`,
        `memory_seconds`, `interconnect_seconds` and `network_seconds`, and `runs_per_step`. The recipe has `name`, `hours`, `chip_hours`,
        `efficiency`, `stages` with `steps` and `step_seconds`, and `advice`, a list of
        sentences. A program that was not compiled has no `roofline` and fewer `bytes`,
        shown as "-".
    """
    fits = "fits" if plan["fits"] else "does not fit"
    memory = [("program", "fits", *_BYTES, "free")]
    costs = [("program", "runs/step", "model", "executed", "max MFU", *_LIMITS)]
    traffic = [("program", "between devices", "times", "per device")]
    for p in plan["programs"]:
        name, limits = p["name"], p.get("roofline")
        memory.append((name, "yes" if p["fits"] else "NO", *_gigabytes(p["bytes"])))
        cells = ("-",) * (2 + len(_LIMITS))
        if limits:
            executed = p["executed_flops"]
            share = f"{p['model_flops'] / executed:.0%}" if executed else "-"
            times = [_seconds(limits[f"{limit}_seconds"]) for limit in _LIMITS.values()]
            cells = (_amount(executed, "FLOP"), share, *times)
        runs, flops = _number(p["runs_per_step"]), _amount(p["model_flops"], "FLOP")
        costs.append((name, runs, flops, *cells))
        for kind, one in p.get("collectives", {}).items():
            sizes = _number(one["count"]), _amount(one["bytes"], "B")
            traffic.append((name, kind, *sizes))
    tables = [memory, costs, traffic] if len(traffic) > 1 else [memory, costs]
    parts = [*map(_table, tables), _recipe(plan["recipe"])]
    heading = f"{plan['topology']}: {fits}\n\nGB of memory per device\n"
    return heading + "\n\n".join(parts) + "\n"


def _recipe(recipe: Mapping[str, Any]) -> str:
    hours, chip_hours = _number(recipe["hours"]), _number(recipe["chip_hours"])
    line = f"{recipe['name']}: {hours} h, {chip_hours} chip-hours at "
    line += f"{recipe['efficiency']:.0%} of the speed above"
    stages = [
        f"  {name}: {_number(stage['steps'])} steps of {_seconds(stage['step_seconds'])}"
        for name, stage in recipe["stages"].items()
    ]
    lines = [_shorten(text, WIDTH) for text in (line, *stages)]
    indents = {"initial_indent": "- ", "subsequent_indent": "  "}
    lines += [textwrap.fill(advice, WIDTH, **indents) for advice in recipe["advice"]]
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell, the first to the left, others to the right."""
    rows = [[_shorten(cell, 24) for cell in row] for row in rows]
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    form = f"{{:<{first}}}" + "".join(f"  {{:>{width}}}" for width in others)
    return "\n".join(form.format(*row).rstrip() for row in rows)


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _gigabytes(sizes: Mapping[str, float]) -> list[str]:
    cells = [
        "-" if size is None else f"{size / 1e9:,.{2 if abs(size) < 100e9 else 0}f}"
        for size in map(sizes.get, _BYTES)
    ]
    return [*cells, f"{sizes['headroom']:.0%}"]


def _number(value: float) -> str:
    """Formats a number with at least three digits: "0.125", "12.5", "31,250"."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _amount(value: float, unit: str) -> str:
    """Formats an amount with its unit: 1.23e13 -> "12.3 TFLOP"."""
    size, letter = next((pair for pair in _UNITS if value >= pair[0]), (1, ""))
    return f"{_number(value / size)} {letter}{unit}"


def _seconds(value: float) -> str:
    return f"{_number(value)} s" if value >= 1 else f"{_number(value * 1e3)} ms"
