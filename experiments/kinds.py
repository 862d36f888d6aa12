"""Kinds of explanations of the embedded arithmetic task."""

import re

from rlt_jax.data.tasks.arithmetic import apply

_SIGNS = str.maketrans("asm", "+-*")


def kind_of(question: str, explanation: str) -> str:
    """Classifies an explanation of a question.

    "wrong" if a step is false, does not continue the previous step, or is not in the
    question; otherwise "careful" if every step has one operation, "skipping" if a step
    has several, "restating" if there are no steps, and "other" if correct steps do not
    cover the question.
    """
    operations = [
        (sign.translate(_SIGNS), int(operand))
        for sign, operand in re.findall(r" ([+\-*asm])(\d)", question)
    ]
    steps = re.findall(r"(\d)((?:[+\-*]\d)+)=(\d)", explanation)
    value, done, largest = int(re.search(r"\d", question)[0]), 0, 0
    for before, text, after in steps:
        group = [(sign, int(operand)) for sign, operand in re.findall(r"(.)(.)", text)]
        if int(before) != value or group != operations[done : done + len(group)]:
            return "wrong"
        for operation in group:
            value = apply(value, operation)
        if int(after) != value:
            return "wrong"
        done += len(group)
        largest = max(largest, len(group))
    if not steps:
        return "restating"
    if done < len(operations):
        return "other"
    return "careful" if largest == 1 else "skipping"
