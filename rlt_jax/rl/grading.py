"""Graders: is an answer correct, and what does it count as in a majority vote?"""

import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import wait

from rlt_jax.data.boxes import last_box
from rlt_jax.errors import UserError
from rlt_jax.records import Problem
from rlt_jax.rl import math_answers
from rlt_jax.rl.math_answers import Pair, Verdict, compare
from rlt_jax.settings import load_function

MAX_CHARACTERS = 2000  # searched for the letter of a choice, from the end
SECONDS = 20.0  # for a grader in a process of its own, with the import of its library


def grade(
    problems: Sequence[Problem], predictions: Sequence[str | None]
) -> list[Verdict]:
    """Grades predictions, each by the grader of its problem.

    A grader "module:function?argument" is called with the argument as its third, in a
    process with limits: it may evaluate what a model has written.

    Args:
      problems: the problem of each prediction.
      predictions: solutions as the model generated them, None when there is none.

    Raises:
      UserError: a problem has no answer or an unknown grader.
    """
    check_gradable(problems)
    keys = [
        None if text is None else (problem.grader, text, problem.answer)
        for problem, text in zip(problems, predictions, strict=True)
    ]
    apart = {key for key in keys if key is not None and "?" in key[0]}
    graded = {key: _grade(*key) for key in set(keys) - apart - {None}}
    graded |= _apart(apart) if apart else {}
    compared = compare([pair for pair in graded.values() if isinstance(pair, Pair)])
    verdicts = [Verdict(False) if key is None else graded[key] for key in keys]
    return [compared[v] if isinstance(v, Pair) else v for v in verdicts]


def check_gradable(problems: Sequence[Problem]) -> None:
    """Refuses problems without an answer, or a blank one, or an unknown grader."""
    for problem in problems:
        what = f"the problem {problem.question[:60]!r} has"
        if not (problem.answer or "").strip():
            raise UserError(
                f"{what} no `answer`: grading needs an 'answer' for every question."
            )
        if ":" in problem.grader:
            load_function(problem.grader.partition("?")[0])
        elif problem.grader not in GRADERS:
            known = f'{", ".join(GRADERS)}, or a function, "module:function"'
            raise UserError(
                f"{what} the unknown grader {problem.grader!r}; known are {known}."
            )


def _grade(grader: str, prediction: str, answer: str) -> Verdict | Pair:
    if grader in GRADERS:
        return GRADERS[grader](prediction, answer)
    path, *argument = grader.split("?", 1)
    correct = bool(load_function(path)(prediction, answer, *argument))
    return Verdict(correct, answer.strip() if correct else prediction.strip() or None)


def _apart(keys: Collection[tuple[str, str, str]]) -> dict[tuple, Verdict]:
    """`_grade` in the processes of `math_answers`."""
    compare([Pair("1/2", "0.5")])  # starts them, or says why they do not start
    pool, verdicts = math_answers._running(), {}
    futures = {key: pool.schedule(_grade, key, timeout=SECONDS) for key in keys}
    for key, future in futures.items():
        while pool.active and not future.done():
            wait([future], timeout=1)  # a broken pool forgets what waits in its queue
        error = future.exception() if future.done() else RuntimeError()
        kind = "timeout" if isinstance(error, TimeoutError) else "crash"
        verdicts[key] = Verdict(False, error=kind) if error else future.result()
    return verdicts


def _math(prediction: str, answer: str) -> Verdict | Pair:
    """Equal as mathematics, by math-verify as lighteval and Open R1 use it.

    A prediction with the same text as the answer needs no parsing.
    """
    pair = Pair(prediction.strip(), answer.strip())
    if pair.prediction == pair.answer:
        return Verdict(True, pair.answer)
    return pair if pair.prediction else Verdict(False)


# LaTeX around a letter.
_MARKUP = re.compile(r"\\(?:boxed|text[a-z]*|math[a-z]+)\b|[{}$\\]")
_IS = r"(?:is|was|would be|should be|must be|has to be)"
_GOOD = r"(?:correct|right|best|true)\b"
# "A" and "I" are words, too: after them the sentence or the clause has to end.
_ENDS = (
    r"\b(?!-\w)(?=\W*\Z|[ \t]*(?:\n|[^\s\w'’])|"
    r"[ \t]+(?:because|since|as|is|which|due)\b)"
)
_LETTER = rf"\(?(?:\b([B-HJ])\b(?!-\w)|\b([AI]){_ENDS})"
_ADVERB = r"(?:(?:\w+ly|therefore|thus|hence|then|indeed|in fact|of course)[\s,:*]+)?"
_OPTION = r"(?i:(?:the\s+)?(?:option|choice)\b)"
# In order of preference; the first match counts that the text does not deny.
_LETTERS = (
    r"\A\W*([A-Ja-j])\W*\Z",  # nothing else
    rf"(?i:\banswer(?:\W*\b{_IS}\b|\**\s*[:=]))\W*{_ADVERB}(?:{_OPTION}\W*)?{_LETTER}",
    rf"\b{_OPTION}(?i:\W*\b{_IS}\b|\**\s*[:=])\W*{_LETTER}",
    rf"\b(?i:pick|choose|select|go\s+with)\W+(?:{_OPTION}\W*)?{_LETTER}",
    rf"{_LETTER}\)?\s+{_IS}\s+{_ADVERB}(?:(?:the|my|only)\s+)*(?:{_GOOD}|answer\b)",
    rf"\b(?i:so|therefore|thus|hence|it(?:\s+{_IS}|['’]s))\W+{_LETTER}\W*\Z",
    rf"(?i:\banswer\b)\W*{_LETTER}|\b{_OPTION}\W*(?:\(?\b(A)\b|{_LETTER})",
    rf"\A\W*{_LETTER}\W*(?:\*\*|\b(?:because|since|as|due)\b)",
    r"\A[\s*]*([A-J])[).:](?=[\s*]|\Z)",  # a line of the list, repeated
    r"\(([A-J])\)(?!(?s:.*)\([A-J]\))",  # the last in brackets
    r"\(([A-J])\)",
)
_NO = r"(?:incorrect|wrong|false|(?:im|not )possible|excluded|eliminated|ruled out|out)"
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|than|over|wrong|incorrect|false)|n['’]t)"
    rf"[ \t]+(?:(?:be|the|an?|final|{_GOOD})\s+)*\(?\Z",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[)\]*]*(?:\s+(?:cannot|fails|(?:can|does|is|was)n?['’]t|"
    rf"(?:{_IS}|are|can|does|looks|seems)\s+(?:\w+ly\s+)?(?:not|{_NO}))|:\s*{_NO}|"
    rf"\s*[-–—:(]\s*(?:no|{_NO})(?=\s*(?:[).,;\n]|\Z)))\b",
    re.IGNORECASE,
)


def _letter(text: str) -> str | None:
    """The letter of the option that a text chooses, None where it chooses none."""
    bare = _MARKUP.sub("", text)
    for match in (m for pattern in _LETTERS for m in re.finditer(pattern, bare)):
        before = bare[max(match.start() - 40, 0) : match.start()]
        after = bare[match.end(match.lastindex) :]
        if not _DENIED_BEFORE.search(before) and not _DENIED_AFTER.match(after):
            return match[match.lastindex].upper()
    return None


def _choice(prediction: str, answer: str) -> Verdict:
    """The letter of an option: "(C)", "c", "The answer is C.", "\\boxed{\\text{C}}"."""
    box = last_box(prediction)
    text = (prediction if box is None else box)[-MAX_CHARACTERS:]
    letter = _letter(text)
    correct = letter is not None and letter == _letter(answer)
    return Verdict(correct, letter or " ".join(text.split()) or None)


def _exact(prediction: str, answer: str) -> Verdict:
    """The same text, apart from whitespace around it."""
    text = prediction.strip()
    return Verdict(text == answer.strip(), text or None)


GRADERS: dict[str, Callable[[str, str], Verdict | Pair]] = {
    "math": _math,
    "choice": _choice,
    "exact": _exact,
}
