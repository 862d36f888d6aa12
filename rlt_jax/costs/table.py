"""Formats a plan as text of at most 100 columns."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 100
_BYTES = ("arguments", "temporaries", "outputs", "resident", "total", "limit")
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def render(plan: Mapping[str, Any]) -> str:
    """Formats the memory and costs of a plan's programs and of the whole recipe.

    Args:
      plan: `topology`, `fits`, `programs` and `recipe`. A program has `name`, `fits`,
        `bytes` per device by name, `collectives` by kind with `count` and `bytes`,
        `model_flops`, `roofline` with `seconds` and `bound`, `runs_per_step` and
        `compile_seconds`. The recipe has `name`, `hours`, `chip_hours`,
        `efficiency`, `stages` with `steps` and `step_seconds`, and `advice`, a list of
        sentences. A program that was not compiled has no `roofline` and fewer `bytes`,
        shown as "-".
    """
    programs = plan["programs"]
    fits = "fits" if plan["fits"] else "does not fit"
    memory = [
        [p["name"], "yes" if p["fits"] else "NO", *_gigabytes(p["bytes"])]
        for p in programs
    ]
    costs = [
        [
            p["name"],
            _number(p["runs_per_step"]),
            _amount(p["model_flops"], "FLOP"),
            _seconds(p["roofline"]["seconds"]) if "roofline" in p else "-",
            p["roofline"]["bound"] if "roofline" in p else "-",
            _seconds(p["compile_seconds"]),
        ]
        for p in programs
    ]
    traffic = [
        [p["name"], kind, _number(cost["count"]), _amount(cost["bytes"], "B")]
        for p in programs
        for kind, cost in p.get("collectives", {}).items()
    ]
    names = ("program", "fits", *_BYTES, "free")
    parts = [
        f"{plan['topology']}: {fits}",
        "GB of memory per device\n" + _table(names, memory),
        _table(("program", "runs/step", "model", "at best", "bound", "compile"), costs),
    ]
    if traffic:
        heads = ("program", "between devices", "times", "per device")
        parts.append(_table(heads, traffic))
    return "\n\n".join([*parts, _recipe(plan["recipe"])]) + "\n"


def _recipe(recipe: Mapping[str, Any]) -> str:
    hours, chip_hours = _number(recipe["hours"]), _number(recipe["chip_hours"])
    line = f"{recipe['name']}: {hours} h, {chip_hours} chip-hours at "
    line += f"{recipe['efficiency']:.0%} of the speed above"
    stages = [
        f"  {name}: {_number(stage['steps'])} steps of {_seconds(stage['step_seconds'])}"
        for name, stage in recipe["stages"].items()
    ]
    lines = [_shorten(text, WIDTH) for text in (line, *stages)]
    for advice in recipe["advice"]:
        indents = {"initial_indent": "- ", "subsequent_indent": "  "}
        lines.append(textwrap.fill(advice, WIDTH, **indents))
    return "\n".join(lines)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns the first column to the left and the others to the right."""
    rows = [[_shorten(cell, 24) for cell in row] for row in (names, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


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
    for size, letter in _UNITS:
        if value >= size:
            return f"{_number(value / size)} {letter}{unit}"
    return f"{_number(value)} {unit}"


def _seconds(value: float) -> str:
    return f"{_number(value)} s" if value >= 1 else f"{_number(value * 1e3)} ms"
