"""The answer that LaTeX marks: `\\boxed{...}`."""

import re

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
