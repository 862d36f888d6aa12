"""Where the formula of an answer is, written so that math-verify reads all of it.

Left to itself it takes a number that it finds: the 2 of "2\\sqrt{3}", the 5 of "5x".
"""

import re

from rlt_jax.data.boxes import last_box

_MARK = re.compile(r"\$|(?<!\\)\\[()\[\]]")
_MARKED = re.compile(r"\$([^$\n]+)\$|(?<!\\)\\\(([^\n]+?)\\\)")
_COMMAND = re.compile(
    r"\\(?:text\w*|mbox|math[a-z]+|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+"
)
_TEXT = re.compile(r"\\(?:text\w*|mbox|mathrm)\s*\{([^{}]*)\}")
_BASED = re.compile(r"\\boxed\{[-\d ,]+_ *\{?(\d+)\}?\}")
_NAME = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|log|ln|sqrt)(?![A-Za-z])")
# Letters behind a digit are a product; so are two, but for common words and units.
_WORD = re.compile(
    r"(?<![A-Za-z\d])[A-Za-z]{3,}|[A-Za-z]['’][A-Za-z]|[^\W\d_A-Za-z]{2,}|"
    r"(?<!\S)[^\w\s]*(?i:am|an|as|at|be|by|cm|do|ft|he|hr|if|in|is|it|kg|km|lb|mg|mi|"
    r"ml|mm|my|no|of|on|or|oz|pm|so|to|up|us|we|yd)[^\w\s]*(?!\S)"
)
_SIGN = re.compile(
    r"(?<![\d)}] )\b(?:minus|negative)\s+(?=[\d\\])|(?:(?<=\bis )|(?<=[:=] ))- +(?=\d)"
)

_REWRITTEN = [
    (re.compile(pattern), written)
    for pattern, written in (
        (r"\\!", ""),
        (r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~|\s", " "),
        (" +", " "),
        ("[·⋅]", r"\\cdot "),
        ("²", "^{2}"),
        ("³", "^{3}"),
        ("½", r"\\frac{1}{2}"),
        ("√", r"\\sqrt "),
        ("^[–—‐‑﹣－] *", "-"),
        ("∞", r"\\infty "),
        ("°", r"^\\circ "),
        (_NAME.pattern.replace("|sqrt", ""), r"\\\1 "),
        (r"(?<![\\A-Za-z])sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\*\*\s*(-?\d+)", r"^{\1}"),
        (r"(?<=\d)[eE]([-+]?\d+)", r"*10^{\1}"),
        (r"(?<=\d)(?:st|nd|rd|th)$", ""),
        (r"^([^=]*\d[^=]*)= *([A-Za-z])$", r"\2=\1"),
        # 1 000, and 1 1/2, which would be (1+1)/2
        (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)", lambda m: m[0].replace(" ", "")),
        (
            r"(?<![\d.,/^] )(?<![\d.,/^])(\d+) +(\d+) */ *(\d+)(?!\d)",
            r"\1\\frac{\2}{\3}",
        ),
        # 2(3), which would be 2+3
        (r"(?<![\d_])(\d[\d.]*) *(?=\()|(\)) *(?=[\d(])", r"\1\2*"),
    )
]
# What would be read in part, or as a sum: 3 5, 3{5}, > 5, 5 @ 6.
_UNREAD = re.compile(
    r"\d\.? +\.?\d|(?<![\\A-Za-z}\d^_])\d+ *\{|[\"@#`?]|\\phantom"
    r"|[^\x00-\x7f×÷π±≤≥≠≈∪∩∈]"
    r"|^ *(?:[<>≤≥≠]|\\(?:neq?|neg|not|leq?|geq?|lt|gt)(?![A-Za-z]))"
)
_QUANTITY = re.compile(r"[-+]?[\d.,]+ [cdghlmst]")


def marked(text: str) -> str:
    """The text with its formula in a box, "" where that cannot be read.

    The formula is that of the last box, or the last line of a text without words; a
    text with words keeps them, its formulas between dollars.
    """
    formula = last_box(text)
    if formula is None:
        text = re.sub(r"(?<![\w)])\*\*|\*\*(?![\s\w(-])|\\\$(?=\d)", "", text)
        formula = _MARK.sub(" ", text)
        if has_words(formula):
            text = _SIGN.sub("-", text)
            if _MARK.search(text):
                return _MARKED.sub(_tidied, text)
            return "\n".join(map(_with_dollars, text.splitlines()))
        if "\\begin" not in formula:
            formula = next(iter(formula.rstrip().splitlines()[::-1]), "")
    formula = tidy(formula)
    return f"\\boxed{{{formula}}}" if formula else ""


def has_words(text: str) -> bool:
    """Whether there are words beside commands, names of functions and variables."""
    return bool(_WORD.search(_NAME.sub("", _COMMAND.sub("", text))))


def plain(text: str) -> str:
    """The text without commands for words, its whitespace squeezed."""
    return " ".join(_TEXT.sub(r"\1", text).split())


def other_base(prediction: str, answer: str) -> bool:
    """Whether a number names a base, as 2516_7, that the answer does not name."""
    found = _BASED.fullmatch(marked(prediction))
    return found is not None and not re.search(rf"_\{{?{found[1]}\b", answer)


def tidy(formula: str) -> str:
    """The formula in signs that math-verify knows; "" where it would misread it."""
    for pattern, written in _REWRITTEN:
        formula = pattern.sub(written, formula)
    formula = formula.strip(" *€£¥").rstrip(".,;: ")
    if not _QUANTITY.fullmatch(formula):  # else its letter is a unit, and dropped
        formula = re.sub(r"(?<=[\w)}\]]) *(ab|bc)$", r"*\1", formula)
        formula = re.sub(r"(\\[A-Za-z]+) +([A-Za-z])$", r"\1{\2}", formula)
        formula = re.sub(r"(?<=[\w)}\]]) +([A-Za-z])$", r"*\1", formula)
        formula = re.sub(r"(?<=[\d)}])([A-Za-z])$", r"*\1", formula)
        formula = re.sub(r" +([A-Za-z])$", r"\1", formula)
    opened = sum(map(formula.count, "([")) - sum(map(formula.count, ")]"))
    is_whole = last_box(f"\\boxed{{{formula}}}") == formula
    is_table = "\\begin" in formula
    if opened or not is_whole or ("&" in formula and not is_table):
        return ""
    if _UNREAD.search(formula) and not is_table or formula.count("|") % 2:
        return ""
    return formula


def _tidied(match: re.Match[str]) -> str:
    """A formula that the text marks; between two prices are words."""
    formula = match[1] or match[2]
    inner = "" if has_words(formula) else tidy(formula)
    return f"${inner}$" if inner else match[0]


def _with_dollars(line: str) -> str:
    """Puts dollars around what is more than numbers."""
    pieces, run = [], []
    for token in [*line.split(), ""]:
        is_word = token in ("", "a", "A", "I") or has_words(token)
        if not is_word:
            run.append(token)
        if run and (is_word or token[-1] in ".,:;?!"):
            island = " ".join(run)
            formula = island.rstrip(".,:;?!")
            run = []
            quantity = _QUANTITY.fullmatch(re.sub(r"(?<=\d)(?=[a-z]$)", " ", formula))
            more = re.search(r"[^\d\s.,:+*/=()$€£¥%-]|\d\(", formula)
            more = more and re.search(r"[\d\\]", formula) and not quantity
            if more and (inner := tidy(formula)):
                island = f"${inner}${island[len(formula) :]}"
            pieces.append(island)
        if is_word:
            pieces.append(token)
    return " ".join(pieces).strip()
