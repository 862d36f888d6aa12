"""Statistics of graded samples: pure functions of NumPy arrays, Q questions, n samples."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rlt_jax.errors import UserError
from rlt_jax.ranges import Weight, check_value
from rlt_jax.records import Record
from rlt_jax.settings import Section

Shares = Mapping[str, float]  # question -> share of right samples
# Columns of samples.jsonl: after the student's own thought, and after none.
SOLUTION_LOG_PROBS = ("solution_log_prob", "solution_log_prob_without_thought")


class PairedDifference(NamedTuple):
    """The mean of a minus b over questions that both have answered.

    Attributes:
      difference: the mean.
      standard_error: of the mean over questions.
      low: lower end of the 95% interval.
      high: its upper end.
      p_value: of a difference as large, either way, if a and b were equally good.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    p_value: float


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of [Q] and its standard error, 0 for a single question."""
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return float(values.mean()), float(spread / np.sqrt(len(values)))


def means_with_errors(values: Mapping[str, ArrayLike]) -> dict[str, float]:
    """The mean of each array [Q] by its name, and its `<name>_standard_error`."""
    results = {}
    for name, value in values.items():
        mean, error = mean_and_error(np.asarray(value))
        results |= {name: mean, f"{name}_standard_error": error}
    return results


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Chance that one of k samples is right, for each question, without bias.

    It is 1 - C(n - c, k) / C(n, k) with c right ones of n (arXiv 2107.03374).

    Args:
      correct: [Q, n] bool.
      k: at most n.

    Returns:
      [Q] float.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples.")

    def chance(c: int) -> float:
        # As a product the binomials do not overflow.
        return 1.0 if n - c < k else 1 - np.prod(1 - k / np.arange(n - c + 1, n + 1))

    return np.array([chance(c) for c in correct.sum(axis=1)])


def majority_at_k(
    correct: np.ndarray, answers: Sequence[Sequence[str | None]]
) -> np.ndarray:
    """Chance that the most frequent answer to each question is right.

    Args:
      correct: [Q, k] bool.
      answers: [Q, k], equal texts for equal answers; None has no vote.

    Returns:
      [Q] float: between 0 and 1 where a right answer shares the first place.
    """

    def chance(right: np.ndarray, texts: Sequence[str | None]) -> float:
        votes = Counter(text for text in texts if text is not None)
        most = max(votes.values(), default=0)
        first = {text for text, count in votes.items() if count == most}
        winners = {text for text, good in zip(texts, right) if good} & first
        return len(winners) / max(len(first), 1)

    return np.array([chance(*row) for row in zip(correct, answers, strict=True)])


def paired_difference(a: ArrayLike, b: ArrayLike) -> PairedDifference:
    """Compares two values of each question, such as shares of right samples.

    Interval and p value are those of the paired t test: they agree with each other and
    need no random numbers, and means over questions are near enough to normal from some
    ten questions on. Where all differences are the same, t has no scale: the interval is
    a point, and p that of flipping signs, 2^(1 - Q), or 1 for no difference.

    Args:
      a: [Q] float, two questions at least.
      b: [Q] float.
    """
    differences = np.asarray(a, float) - np.asarray(b, float)
    mean, error = mean_and_error(differences)
    if np.ptp(differences) < 1e-12:
        p_value = 1.0 if abs(mean) < 1e-12 else 2.0 ** (1 - len(differences))
        return PairedDifference(mean, 0.0, mean, mean, p_value)
    freedom = len(differences) - 1
    p_value = float(2 * special.stdtr(freedom, -abs(mean / error)))
    reach = float(error * special.stdtrit(freedom, 0.975))
    return PairedDifference(mean, error, mean - reach, mean + reach, p_value)


def by_question(
    samples: Iterable[Section], where: str, name: str = "correct"
) -> dict[str, float]:
    """Question -> mean of a column over its samples, such as the share of right ones.

    Args:
      samples: rows of `samples.jsonl`; those without a value are left out.
      where: the file, for messages.
      name: the column.

    Raises:
      UserError: two questions have the same text, which cannot be told apart here, or a
        row has no question, or a value that is no number.
    """
    answers: Record = {}
    values: dict[str, list[float]] = {}
    for row in samples:
        if row.get(name) is None:
            continue
        question, answer = row.get("question"), row.get("answer")
        check_value(f"{where}: question", str, question)
        check_value(f"{where}: {name}", bool | Weight, row[name])
        if answers.setdefault(question, answer) != answer:
            raise UserError(
                f"{where}: the question {question[:60]!r} has several answers, "
                f"{answers[question]!r} and {answer!r}; evaluations are compared by the "
                "text of the question, so give each question a text of its own."
            )
        values.setdefault(question, []).append(float(row[name]))
    counts = Counter({question: len(some) for question, some in values.items()})
    if len(set(counts.values())) > 1:
        (most, many), (least, few) = counts.most_common(1)[0], counts.most_common()[-1]
        raise UserError(
            f"{where}: {many} samples of the question {most[:60]!r}, but {few} of "
            f"{least[:60]!r}. Either the evaluation is not complete: give its command "
            "again; or questions have the same text: leave one of them in the data."
        )
    return {question: sum(some) / len(some) for question, some in values.items()}


def compare(a: Shares, b: Shares, names: Sequence[str]) -> PairedDifference:
    """The paired difference of two evaluations.

    Raises:
      UserError: see `check_same_questions`.
    """
    check_same_questions(a, b, names)
    return paired_difference(list(a.values()), [b[question] for question in a])


def check_same_questions(
    a: Collection[str], b: Collection[str], names: Sequence[str]
) -> None:
    """Refuses evaluations on other, or on fewer than two different questions."""
    a, b = set(a), set(b)
    if a != b or len(a) < 2:
        raise UserError(
            f"the evaluations {names[0]!r} and {names[1]!r} cannot be compared question "
            f"by question: they answered {len(a)} and {len(b)} questions, {len(a & b)} "
            "of them the same. Evaluate both on the same two or more questions."
        )
