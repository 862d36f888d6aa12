"""Completions sampled by other tools, matched to problems by the question."""

from collections.abc import Sequence

from rlt_jax.data.tables import as_text, convert, read_records
from rlt_jax.errors import UserError
from rlt_jax.records import Problem


def read_predictions(path: str, problems: Sequence[Problem]) -> list[list[str]]:
    """Reads the same number of completions for each problem, in the order of the file.

    Args:
      path: files, see `tables.read_records`; a record has `question` and either
        `completions`, a list of texts, or `completion`, one text.
      problems: problems with distinct questions; whitespace around a question is ignored.

    Raises:
      UserError: the questions do not match, or they have different numbers of completions
        or none.
    """
    found: dict[str, list[str]] = {problem.question.strip(): [] for problem in problems}
    if len(found) < len(problems):
        raise UserError(
            f"predictions are matched by the question, but the {len(problems)} problems "
            f"have only {len(found)} distinct questions; remove duplicates."
        )
    columns = ("question", "completions", "completion")
    for where, record in convert(read_records(path, "", columns, halves=True)):
        question = as_text(where, "question", record.get("question")).strip()
        if question not in found:
            raise UserError(
                f"{where}: the data has no question {question[:60]!r}; use the data "
                "(task, path, limit) that the predictions are for."
            )
        texts = record.get("completions")
        if texts is None:
            texts = [record.get("completion")]
        if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
            raise UserError(
                f"{where}: needs `completions`, a list of texts, or `completion`, a text."
            )
        found[question] += texts
    expected = max(map(len, found.values()))
    if not expected:
        raise UserError(
            f"{path}: there are no predictions; add one or more texts to `completions` "
            "for every question, or a `completion` to every record."
        )
    for question, completions in found.items():
        if len(completions) < expected:
            raise UserError(
                f"{path}: {len(completions)} predictions for the question "
                f"{question[:60]!r}, but {expected} for others; all questions need the "
                "same number."
            )
    return list(found.values())
