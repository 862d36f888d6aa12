"""Is an answer right, and what was it read as?"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlt_jax.data.boxes import last_box
from rlt_jax.data.tasks import countdown
from rlt_jax.data.templates import Problem
from rlt_jax.errors import UserError
from rlt_jax.rl.formulas import plain
from rlt_jax.rl.math_answers import Pair, compare

MAX_CHARACTERS = 2000  # of a text that is parsed


class Verdict(NamedTuple):
    """What became of a prediction.

    Attributes:
      correct: whether it gives the answer.
      answer: its canonical form, for votes: the known answer where it is right, None
        where there is none or it is empty.
      error: "timeout" or "crash" where reading it failed; it then counts as wrong, and
        has no vote.
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
        verdicts[key] = Verdict(equal, pair.answer.strip() if equal else read, error)
    return [Verdict(False) if key is None else verdicts[key] for key in asked]


def check_gradable(problems: Sequence[Problem]) -> None:
    """Refuses problems without an answer, or a blank one, or an unknown grader."""
    for problem in problems:
        if not (problem.answer or "").strip():
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


def _math(prediction: str, answer: str) -> Verdict | Pair:
    """Equal as mathematics: "1/2" is "0.5", the last box of a text is its answer.

    Of a text without a box the last `MAX_CHARACTERS` are read.
    """
    prediction, answer = (text.replace("−", "-") for text in (prediction, answer))
    known = answer.strip()
    box = last_box(prediction)
    last = (prediction[-MAX_CHARACTERS:] if box is None else box).strip()
    if not last:
        return Verdict(False)
    if known in (last, prediction.strip()):
        return Verdict(True, known)
    if len(last) > MAX_CHARACTERS:
        return Verdict(False, plain(last[:MAX_CHARACTERS]))
    integers = _INTEGER.fullmatch(last), _INTEGER.fullmatch(answer[:MAX_CHARACTERS])
    if all(integers):
        number, right = (int(match[1]) for match in integers)
        return Verdict(number == right, known if number == right else str(number))
    return Pair(last if box is None else f"\\boxed{{{last}}}", answer)


# LaTeX that may stand around a letter.
_ORNAMENTS = re.compile(r"\\(?:boxed|text[a-z]*|math[a-z]+)\b|[{}$\\]")
_IS = r"(?:is|was|would be|should be|must be)"
# "A" and "I" may be words: after them something else than the next word has to come.
_ENDS = (
    r"\b(?!-\w)(?=\W*\Z|[ \t]*(?:\n|[^\s\w'’])|[ \t]+(?:because|since|as|is|which)\b)"
)
_LETTER = rf"\(?(?:\b([B-HJ])\b(?!-\w)|\b([AI]){_ENDS})"
_LISTED = rf"\(?(?:\b([A-HJ])\b|\b(I){_ENDS})"
_ANSWER_IS = rf"(?i:\banswer\W*\b{_IS}\b|\banswer\**\s*[:=])"
_OPTION = r"(?i:(?:the\s+)?(?:option|choice)\b)"
# In the order of preference; of several matches that are not denied the first counts.
_LETTERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\A\W*([A-Ja-j])\W*\Z",  # nothing else
        rf"{_ANSWER_IS}\W*(?:\w+ly\s+)?(?:{_OPTION}\W*)?{_LETTER}",
        rf"\b{_OPTION}(?i:\W*\b{_IS}\b|\**\s*[:=])\W*{_LETTER}",
        rf"(?i:\banswer\b)\W*{_LETTER}|\b{_OPTION}\W*{_LISTED}",
        rf"\A\W*{_LISTED}\W*(?:\*\*|\b(?:because|since|as|due)\b)",
        r"\A[\s*]*([A-J])[).:](?=[\s*]|\Z)",  # a line of the list, repeated
        r"\(([A-J])\)(?!(?s:.*)\([A-J]\))",  # the last
        r"\(([A-J])\)",
    )
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|than|over|wrong|incorrect|false)|n['’]t)"
    r"[ \t]+(?:(?:be|the|an?|best|correct|final|right)\s+)*\(?\Z",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[)\]*]*\s+(?:cannot\b|fails\b|(?:can|does|is|was)n?['’]t\b|"
    rf"(?:{_IS}|are|can|does|looks|seems)\s+(?:\w+ly\s+)?"
    r"(?:not|incorrect|wrong|false|impossible|excluded|eliminated|ruled out|out)\b)",
    re.IGNORECASE,
)


def _letter(text: str) -> str | None:
    bare = _ORNAMENTS.sub("", text)
    for pattern in _LETTERS:
        for match in pattern.finditer(bare):
            before = bare[max(match.start() - 40, 0) : match.start()]
            denied = _DENIED_AFTER.match(bare, match.end())
            if not denied and not _DENIED_BEFORE.search(before):
                return next(filter(None, match.groups())).upper()
    return None


def _choice(prediction: str, answer: str) -> Verdict:
    """The letter of an option: "(C)", "c", "The answer is C.", "\\boxed{\\text{C}}"."""
    box = last_box(prediction)
    read = (prediction if box is None else box)[-MAX_CHARACTERS:]
    letter = _letter(read)
    correct = letter is not None and letter == _letter(answer)
    return Verdict(correct, letter or plain(read) or None)


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
