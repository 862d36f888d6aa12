"""Graders: is an answer correct, and what does it count as in a majority vote?"""

import re
from collections.abc import Sequence

from rlt_jax.data.boxes import last_box
from rlt_jax.errors import UserError
from rlt_jax.records import Problem
from rlt_jax.rl.math_answers import Pair, Verdict, call_grader, compare
from rlt_jax.settings import load_function

MAX_CHARACTERS = 2000  # searched for the letter of a choice, from the end


def grade(problems: Sequence[Problem], texts: Sequence[str | None]) -> list[Verdict]:
    """Grades predictions, each by the grader of its problem.

    A grader "module:function?argument" is called with the argument as its third, in a
    process with limits: it may evaluate what a model has written.

    Args:
      problems: the problem of each prediction.
      texts: the predictions, solutions as the model generated them, None when there is none.

    Raises:
      UserError: a problem has no answer or an unknown grader.
    """
    check_gradable(problems)
    pairs = [
        None if text is None else Pair(text, problem.answer, problem.grader)
        for problem, text in zip(problems, texts, strict=True)
    ]
    verdicts = {pair: _grade(pair) for pair in set(pairs)}
    verdicts |= compare([pair for pair in verdicts if verdicts[pair] is None])
    return [verdicts[pair] for pair in pairs]


def check_gradable(problems: Sequence[Problem]) -> None:
    """Refuses problems without an answer, or a blank one, or an unknown grader."""
    for problem in problems:
        has, grader = f"the problem {problem.question[:60]!r} has", problem.grader
        if not (problem.answer or "").strip():
            raise UserError(f"{has} no `answer`: grading needs one for every question.")
        if ":" in grader:
            load_function(grader.partition("?")[0], 2 + ("?" in grader))
        elif grader not in GRADERS:
            known = f'{", ".join(GRADERS)}, or a function, "module:function"'
            raise UserError(f"{has} the unknown grader {grader!r}; known are {known}.")


def _grade(pair: Pair | None) -> Verdict | None:
    """None for a pair that is to be compared in a process with limits."""
    if pair is None:
        return Verdict(False)
    if pair.grader in GRADERS:
        return GRADERS[pair.grader](pair.prediction, pair.answer)
    return None if "?" in pair.grader else call_grader(pair)


def _math(prediction: str, answer: str) -> Verdict | None:
    """Equal as mathematics, by math-verify as lighteval and Open R1 use it.

    A prediction with the same text as the answer needs no parsing.
    """
    verdict = _exact(prediction, answer)
    return verdict if verdict.correct or verdict.answer is None else None


# LaTeX around a letter.
_MARKUP = re.compile(r"\\(?:boxed|text[a-z]*|math[a-z]+)\b|[{}$\\]")
_IS = r"(?:is|was|would be|should be|must be|has to be)"
_GOOD = r"(?:correct|right|best|true)\b"
_GOES_ON = r"(?:because|since|as|is|which|due)"
# "A" and "I" are words, too: after them the sentence or the clause has to end.
_ENDS = rf"\b(?!-\w)(?=\W*\Z|[ \t]*(?:\n|[^\s\w'’])|[ \t]+{_GOES_ON}\b)"
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


GRADERS = {"math": _math, "choice": _choice, "exact": _exact}
