"""Is an answer right, and what was it read as?"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlt_jax.data.tasks import countdown
from rlt_jax.data.templates import Problem
from rlt_jax.errors import UserError
from rlt_jax.rl.math_answers import Pair, compare

MAX_CHARACTERS = 2000  # of a text that is parsed


class Verdict(NamedTuple):
    """What became of a prediction.

    Attributes:
      correct: whether it gives the answer.
      answer: its canonical form, for votes: that of the known answer where it is
        right, None where nothing could be read.
      error: "timeout" or "crash" where reading it failed; it then counts as wrong.
    """

    correct: bool
    answer: str | None = None
    error: str | None = None


def grade(
    problems: Sequence[Problem], predictions: Sequence[str | None]
) -> list[Verdict]:
    """Grades predictions, each by the grader of its problem.

    Args:
      problems: what each prediction answers.
      predictions: solutions as they were written, None when there is none.

    Raises:
      UserError: a problem has no answer or an unknown grader.
    """
    check_gradable(problems)
    asked = [
        None if text is None else (problem.grader, text, problem.answer)
        for problem, text in zip(problems, predictions, strict=True)
    ]
    verdicts = {key: GRADERS[key[0]](*key[1:]) for key in asked if key is not None}
    pairs = {key: pair for key, pair in verdicts.items() if isinstance(pair, Pair)}
    compared = compare(pairs.values()) if pairs else {}
    for key, pair in pairs.items():
        equal, read, error = compared[pair]
        verdicts[key] = Verdict(equal, key[2].strip() if equal else read, error)
    return [Verdict(False) if key is None else verdicts[key] for key in asked]


def check_gradable(problems: Sequence[Problem]) -> None:
    """Refuses problems without an answer or with an unknown grader."""
    for problem in problems:
        if problem.answer is None:
            raise UserError(
                f"the problem {problem.question[:60]!r} has no `answer`: grading needs "
                "an 'answer' for every question."
            )
        if problem.grader not in GRADERS:
            raise UserError(
                f"the problem {problem.question[:60]!r} has the unknown grader "
                f"{problem.grader!r}; known are {', '.join(GRADERS)}."
            )


_INTEGER = re.compile(r"\s*([-+]?[0-9]+)\s*")
_BOXED_INTEGER = re.compile(r"\\boxed\{\s*([-+]?[0-9]+)\s*\}")


def _math(prediction: str, answer: str) -> Verdict | Pair:
    """Equal as mathematics: "1/2" is "0.5", the last box of a text is its answer.

    Of a longer text `MAX_CHARACTERS` are read: from the last box on, or at its end.
    """
    if prediction.strip() == answer.strip():
        return Verdict(True, answer.strip())
    if not prediction.strip():
        return Verdict(False)
    # math-verify would take several boxes for one answer of several parts.
    box = prediction.rfind("\\boxed{")
    last = (
        prediction[-MAX_CHARACTERS:]
        if box < 0
        else prediction[box : box + MAX_CHARACTERS]
    )
    number = _INTEGER.fullmatch(last) or _BOXED_INTEGER.match(last)
    known = _INTEGER.fullmatch(answer[:MAX_CHARACTERS])
    if number and known:
        equal = int(number[1]) == int(known[1])
        return Verdict(equal, answer.strip() if equal else str(int(number[1])))
    return Pair(last, answer)


# LaTeX that may stand around a letter, and Markdown's stars.
_ORNAMENTS = re.compile(r"\\(?:boxed|text[a-z]*|math[a-z]+)\b|[{}$*\\]")
_LETTERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\W*([A-Za-z])\W*",  # nothing else
        r".*\b(?i:answer(?: is)?|option|choice)\W*(?:(?i:option|choice)\W*)?\b([A-Z])\b.*",
        r".*\(([A-Z])\).*",
        r"\W*([A-Z])[).:](?:\s.*)?",  # a line of the list, repeated
    )
)


def _letter(text: str) -> str | None:
    text = text[max(text.rfind("\\boxed{"), 0) :].strip()
    bare = _ORNAMENTS.sub("", text[-MAX_CHARACTERS:]).replace("\n", " ")
    matches = (pattern.fullmatch(bare) for pattern in _LETTERS)
    return next((match[1].upper() for match in matches if match), None)


def _choice(prediction: str, answer: str) -> Verdict:
    """The letter of an option: "(C)", "c", "The answer is C.", "\\boxed{\\text{C}}"."""
    letter, known = _letter(prediction), _letter(answer)
    return Verdict(letter is not None and letter == known, letter)


def _exact(prediction: str, answer: str) -> Verdict:
    """The same text, whitespace around it aside."""
    text = prediction.strip()
    return Verdict(text == answer.strip(), text or None)


def _countdown(prediction: str, answer: str) -> Verdict:
    """An expression of the given numbers that makes the target; see the task."""
    correct = countdown.is_solution(prediction, answer)
    return Verdict(correct, answer.strip() if correct else prediction.strip() or None)


GRADERS: dict[str, Callable[[str, str], Verdict | Pair]] = {
    "math": _math,
    "choice": _choice,
    "exact": _exact,
    "countdown": _countdown,
}
