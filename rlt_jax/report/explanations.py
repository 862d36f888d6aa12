"""A page of explanations whose tokens are colored by their reward."""

import math
from collections.abc import Sequence
from pathlib import Path

from rlt_jax.report.files import write_page
from rlt_jax.settings import Section

MAX_NATS = 4.0  # value with the most intense color
Token = tuple[str, str, str]  # text, CSS background color, tooltip


def write_explanations(records: Sequence[Section], folder: Path) -> None:
    """Writes `index.html` with the completions in the given order.

    Args:
      records: records of the stage `score` with per-token arrays, best reward first.
      folder: folder of the page; created if it does not exist.
    """
    items = [(x, explanation_tokens(x), solution_tokens(x)) for x in records]
    write_page(folder, "explanations.html", {}, items=items)


def explanation_tokens(record: Section) -> list[Token]:
    """Tokens of the explanation: red if the KL is positive, blue if it is negative."""
    names = ["explanation_tokens", "explanation_kl_tokens"]
    names += ["teacher_log_probs_explanation", "student_log_probs_explanation"]
    return [
        (text, _color(kl), f"KL {kl:.3f} = teacher {t:.3f} - student {s:.3f}")
        for text, kl, t, s in zip(*(record[name] for name in names), strict=True)
    ]


def solution_tokens(record: Section) -> list[Token]:
    """Tokens of the solution: red if the student gives them a low probability."""
    log_probs = record["student_log_probs_solution"]
    return [
        (token, _color(-log_prob), f"log-probability {log_prob:.3f}")
        for token, log_prob in zip(record["solution_tokens"], log_probs, strict=True)
    ]


def _color(nats: float) -> str:
    """CSS color: red for positive and blue for negative values, by their square root."""
    strength = min(math.sqrt(abs(nats) / MAX_NATS), 1.0)
    red, green, blue = (214, 39, 40) if nats > 0 else (31, 119, 180)
    return f"rgba({red},{green},{blue},{0.75 * strength:.3f})"
