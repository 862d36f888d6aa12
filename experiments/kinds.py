"""Kinds of explanations of the embedded arithmetic task, and of puzzles."""

import re

from experiments.countdown import evaluate
from rlt_jax.data.tasks.arithmetic import apply

_SIGNS = str.maketrans("asm", "+-*")
_FORMS = ("restating", "careful", "skipping")  # by the operations of the largest step


def kind_of(question: str, explanation: str) -> str:
    """Classifies an explanation of a question.

    "wrong" if a step is false, does not continue the previous step, or is not in the
    question; otherwise "careful" if every step has one operation, "skipping" if a step
    has several, "restating" if there are no steps, and "other" if correct steps do not
    cover the question.
    """
    asked = re.findall(r"\d", question.partition(":")[0])
    chains = [
        [(sign.translate(_SIGNS), int(x)) for sign, x in re.findall(r" (\D)(\d)", text)]
        for text in question.partition(":")[2].split(",")
    ]
    parts = [_steps(part) for part in explanation.split(",")]
    if not any(parts):
        return "restating"
    if len(parts) > len(chains):
        return "wrong"
    done = [
        _covered(int(start), chain, steps)
        for start, chain, steps in zip(asked, chains, parts)
    ]
    if None in done:
        return "wrong"
    if done != [len(chain) for chain in chains]:
        return "other"
    return form_of(explanation)


def form_of(explanation: str) -> str:
    """ "restating", "careful" or "skipping", whether or not the steps are right."""
    largest = max((len(x[1]) // 2 for x in _steps(explanation)), default=0)
    return _FORMS[min(largest, 2)]


def form_and_errors(question: str, explanation: str) -> str:
    """The form of an explanation; "careful, wrong" where `kind_of` finds an error."""
    kind, form = kind_of(question, explanation), form_of(explanation)
    return form if kind == form else f"{form}, {kind}"


def kind_of_puzzle(question: str, explanation: str) -> str:
    """How many steps an explanation of a countdown puzzle has, and whether all are true."""
    number = r"(?:0|[1-9]\d*)"
    steps = re.findall(rf"\b({number}(?:[+*-]{number})+)=(\d+)", explanation)
    if not steps:
        return "no step"
    right = all(evaluate(text, []) == int(result) for text, result in steps)
    count = "one step" if len(steps) == 1 else "several steps"
    return f"{count}, {'right' if right else 'wrong'}"


def _steps(text: str) -> list[tuple[str, str, str]]:
    """(digit, operations, result) of each step."""
    return re.findall(r"(\d)((?:[+\-*]\d)+)=(\d)", text)


def _covered(
    start: int, chain: list[tuple[str, int]], steps: list[tuple[str, str, str]]
) -> int | None:
    """How many operations of a chain the steps cover; None if a step is wrong."""
    value, done = start, 0
    for before, text, after in steps:
        group = [(sign, int(operand)) for sign, operand in re.findall(r"(.)(.)", text)]
        if int(before) != value or group != chain[done : done + len(group)]:
            return None
        for operation in group:
            value = apply(value, operation)
        if int(after) != value:
            return None
        done += len(group)
    return done
