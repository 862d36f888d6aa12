"""GPQA in its published layout: a question, its right answer and three wrong ones."""

import itertools

import numpy as np

from rlt_jax.data.tables import Row, read_rows
from rlt_jax.data.templates import Problem
from rlt_jax.errors import UserError

SOURCE = "gpqa_diamond.csv of https://huggingface.co/datasets/Idavidrein/gpqa"
OPTIONS = ("Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)))
LETTERS = "ABCD"


def problems(
    path: str, limit: int | None = None, shuffle_seed: int = 0
) -> list[Problem]:
    """Reads questions, their options listed as (A) to (D) in a random order each.

    Args:
      path: `gpqa_diamond.csv` or another file of the data set.
      limit: read no more questions than this.
      shuffle_seed: of the order. It is not the run's seed: evaluations with other seeds
        ask the same questions and can be compared.

    Raises:
      UserError: no file, or a row without one of the columns.
    """
    rows = itertools.islice(read_rows(path, SOURCE), limit)
    return [
        _problem(where, row, np.random.default_rng([shuffle_seed, n]))
        for n, (where, row) in enumerate(rows)
    ]


def _problem(where: str, row: Row, rng: np.random.Generator) -> Problem:
    question, *options = (
        str(row.get(name) or "").strip() for name in ("Question", *OPTIONS)
    )
    if not question or not all(options):
        raise UserError(f"{where}: needs the columns Question, {', '.join(OPTIONS)}.")
    order = rng.permutation(len(options)).tolist()
    listed = (f"({LETTERS[n]}) {options[i]}" for n, i in enumerate(order))
    prompt = "\n".join(
        [question, "", *listed, "", "Answer with the letter of the right option."]
    )
    letter = LETTERS[order.index(0)]
    solution = f"The answer is \\boxed{{{letter}}}."
    return Problem(prompt, solution, letter, grader="choice")
