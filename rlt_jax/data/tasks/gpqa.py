"""GPQA as published: questions with one correct and three incorrect answers."""

import itertools

import numpy as np

from rlt_jax.data.tables import as_text, convert, read_records
from rlt_jax.errors import UserError
from rlt_jax.ranges import Limit, NonNegativeInt
from rlt_jax.records import Problem, Record

SOURCE = "gpqa_diamond.csv of https://huggingface.co/datasets/Idavidrein/gpqa"
COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)))
LETTERS = "ABCD"


def problems(
    path: str, limit: Limit = None, shuffle_seed: NonNegativeInt = 0
) -> list[Problem]:
    """Reads questions with their answers in random order as options (A) to (D).

    Args:
      path: `gpqa_diamond.csv` or another file of the data set.
      limit: maximum number of questions to read.
      shuffle_seed: random seed of the order. It is independent of the run's seed, so that
        evaluations with different seeds have the same questions.

    Raises:
      UserError: no file, or a record without one of the columns.
    """
    rngs = (np.random.default_rng([shuffle_seed, n]) for n in itertools.count())
    records = read_records(path, SOURCE, [name.lower() for name in COLUMNS])
    return list(convert(records, lambda *row: _problem(*row, next(rngs)), limit))


def _problem(where: str, record: Record, rng: np.random.Generator) -> Problem:
    texts = [as_text(where, name, record.get(name)) for name in COLUMNS]
    question, *options = (text.strip() for text in texts)
    if not question or not all(options):
        raise UserError(f"{where}: needs the columns {', '.join(COLUMNS)}.")
    order = rng.permutation(len(options)).tolist()
    listed = (f"({LETTERS[n]}) {options[i]}" for n, i in enumerate(order))
    lines = [question, "", *listed, "", "Answer with the letter of the right option."]
    letter = LETTERS[order.index(0)]
    solution = f"The answer is \\boxed{{{letter}}}."
    return Problem("\n".join(lines), solution, letter, grader="choice")
