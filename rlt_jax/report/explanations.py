"""A page on which explanations are read token by token, coloured by their reward."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlt_jax.report.files import write_page

DARKEST = 4.0  # nats at which a colour is full


class Token(NamedTuple):
    """A piece of text with its colour and what it says when pointed at."""

    text: str
    colour: str
    title: str


def write_explanations(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes `index.html`, best completion first, worst last.

    Args:
      rows: of the stage `score`, with per-token arrays.
      folder: made if it is not there.
    """
    items = [
        {
            **row,
            "explanation": explanation_tokens(row),
            "solved": solution_tokens(row),
            "terms": {k: f"{v:.4g}" for k, v in row["terms"].items()},
        }
        for row in rows
    ]
    write_page(folder, "explanations.html", {}, items=items)


def explanation_tokens(row: Mapping[str, Any]) -> list[Token]:
    """Tokens of the explanation, red where the KL is large, blue where negative."""
    names = "teacher_log_probs_explanation", "student_log_probs_explanation"
    columns = (
        row[name] for name in ("explanation_tokens", "explanation_kl_tokens", *names)
    )
    return [
        Token(text, _colour(kl), f"KL {kl:.3f} = teacher {t:.3f} - student {s:.3f}")
        for text, kl, t, s in zip(*columns, strict=True)
    ]


def solution_tokens(row: Mapping[str, Any]) -> list[Token]:
    """Tokens of the solution, red where the student finds them unlikely."""
    pairs = zip(row["solution_tokens"], row["student_log_probs_solution"], strict=True)
    return [Token(t, _colour(-lp), f"log-probability {lp:.3f}") for t, lp in pairs]


def _colour(nats: float) -> str:
    """CSS background: red for positive, blue for negative, by their square root."""
    strength = min(math.sqrt(abs(nats) / DARKEST), 1.0)
    red, green, blue = (214, 39, 40) if nats > 0 else (31, 119, 180)
    return f"rgba({red},{green},{blue},{0.75 * strength:.3f})"
