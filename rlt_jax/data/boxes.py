"""The answer in a solution: what LaTeX marks, `\\boxed{...}`, or a final number."""

import re

_FINAL = re.compile(
    r"####\s*(\S+)\s*\Z|"  # as in GSM8K
    r"(?<![\w.])(-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)%?[\s.!)*]*\Z"
)
_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)


def last_box(text: str) -> str | None:
    """Content of the last `\\boxed{}` or `\\fbox{}`, None where there is none.

    Braces in it are counted, except escaped ones; of nested boxes it is the inner one.
    If the last box is not closed there is none, whatever precedes it.
    """
    open_braces: list[int | None] = []  # where a box's content begins; None for others
    last, content = -1, None
    for match in _BRACES.finditer(text):
        if match[1]:
            last, content = match.end(), None
            open_braces.append(last)
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0] == "}" and open_braces and open_braces.pop() == last:
            content = text[last : match.start()]
    return content


def final_answer(solution: str) -> str | None:
    """The last box of a solution, or the number that it ends with; None without both."""
    match = _FINAL.search(solution[-1000:])  # its time grows with the square
    return last_box(solution) or match and (match[1] or match[2]).replace(",", "")
