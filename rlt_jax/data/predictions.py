"""Completions that somebody else has sampled, joined to problems by the question."""

from collections.abc import Sequence

from rlt_jax.data.tables import Row, read_rows
from rlt_jax.data.templates import Problem
from rlt_jax.errors import UserError


def read_predictions(path: str, problems: Sequence[Problem]) -> list[list[str]]:
    """The completions of each problem, equally many, in the order of the file.

    Args:
      path: a file of `read_rows`; a row has `question`, and `completions`, a list of
        texts, or `completion`, one of several rows of the question.
      problems: with different questions; whitespace around a question does not count.

    Raises:
      UserError: questions without predictions, predictions of other questions, unequal
        numbers of them, or none at all.
    """
    texts: dict[str, list[str]] = {problem.question.strip(): [] for problem in problems}
    if len(texts) < len(problems):
        raise UserError(
            f"predictions are joined by the question, but {len(problems)} problems "
            f"of the data have only {len(texts)} different ones."
        )
    for where, row in read_rows(path):
        question = str(row.get("question")).strip()
        if question not in texts:
            raise UserError(
                f"{where}: the data has no question {question[:60]!r}; name the data "
                "(task, path, limit) that the predictions are for."
            )
        texts[question] += _completions(where, row)
    wanted = max(map(len, texts.values()))
    if not wanted:
        raise UserError(
            f"{path}: there is nothing to grade; write one or more texts into the "
            "`completions` of every question, or a `completion` into every row."
        )
    for question, found in texts.items():
        if len(found) < wanted:
            raise UserError(
                f"{path}: {len(found)} predictions for the question {question[:60]!r}, "
                f"but {wanted} for others; give equally many for every question."
            )
    return list(texts.values())


def _completions(where: str, row: Row) -> list[str]:
    found = row.get("completions")
    if found is None:
        found = [row.get("completion")]
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(
            f"{where}: needs `completions`, a list of texts, or `completion`, a text."
        )
    return found
