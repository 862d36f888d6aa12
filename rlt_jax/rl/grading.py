"""Is an answer right? Surface forms are compared by math-verify."""

import math_verify


def is_correct(prediction: str | None, answer: str) -> bool:
    """Whether what a student wrote as its solution gives the answer.

    Equal strings are equal; everything else is parsed and compared as mathematics
    ("1/2" is "0.5", the last "\\boxed{...}" of a text is its answer).

    Args:
      prediction: the solution, None when there is none.
      answer: the known answer.
    """
    if prediction is None:
        return False
    if prediction.strip() == answer.strip():
        return True
    # math-verify would take several boxes for one answer of several parts.
    last = prediction[max(prediction.rfind("\\boxed{"), 0) :]
    gold = math_verify.parse(f"\\boxed{{{answer}}}")
    return math_verify.verify(gold, math_verify.parse(last))
