"""Controls that tell an explanation from something that only earns its reward."""

import difflib
from collections.abc import Sequence

import numpy as np

CONTROLS = ("empty", "shuffled", "other")


def controlled(
    completions: Sequence[str],
    questions: Sequence[str],
    closing: str,
    seed: int | Sequence[int],
) -> dict[str, list[str | None]]:
    """Completions that should be worth less than the real ones.

    Args:
      completions: N texts.
      questions: the question of each.
      closing: closing tag of an explanation; the controls are all closed.
      seed: of the shuffling.

    Returns:
      Control -> N completions: "empty", the words of the real one "shuffled", and the
      explanation of the next "other" question, None where all questions are the same.
    """
    rng = np.random.default_rng(seed)
    bodies = [text.partition(closing)[0] for text in completions]
    shuffled = [" ".join(rng.permutation(body.split(" "))) for body in bodies]
    count = len(completions)
    other = []
    for n in range(count):
        later = [(n + k) % count for k in range(1, count)]
        found = [m for m in later if questions[m] != questions[n]]
        other.append(bodies[found[0]] + closing if found else None)
    return {
        "empty": [closing] * count,
        "shuffled": [body + closing for body in shuffled],
        "other": other,
    }


def copied_share(explanation: str, solution: str, shortest: int = 12) -> float:
    """Share of the solution's characters that the explanation repeats.

    Args:
      explanation: what the teacher wrote.
      solution: what it was given.
      shortest: matches of fewer characters do not count, but for a whole solution.

    Returns:
      0 to 1; 0 for an empty solution.
    """
    solution = solution.strip()
    if not solution:
        return 0.0
    if solution in explanation:
        return 1.0
    matcher = difflib.SequenceMatcher(None, explanation, solution, autojunk=False)
    blocks = [block.size for block in matcher.get_matching_blocks()]
    return sum(size for size in blocks if size >= shortest) / len(solution)
