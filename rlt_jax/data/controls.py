"""Control completions, which should get a lower reward than real explanations."""

from collections.abc import Sequence

import numpy as np

CONTROLS = ("empty", "shuffled", "other")


def controlled(
    completions: Sequence[str],
    questions: Sequence[str],
    closing: str,
    seed: int | Sequence[int],
) -> dict[str, list[str | None]]:
    """Makes control completions, which should get a lower reward than the real ones.

    Args:
      completions: E texts.
      questions: E questions, those of the completions.
      closing: closing tag of an explanation, which every control has.
      seed: random seed of the shuffling.

    Returns:
      Name of a control -> E completions: "empty" explanations; explanations with
      "shuffled" words; explanations of another question ("other"), None if all questions
      are the same.
    """
    rng = np.random.default_rng(seed)
    bodies = [text.partition(closing)[0] for text in completions]
    shuffled = [" ".join(rng.permutation(body.split(" "))) + closing for body in bodies]
    count = len(completions)
    other = []
    for n in range(count):
        others = ((n + k) % count for k in range(1, count))
        match = next((m for m in others if questions[m] != questions[n]), None)
        other.append(None if match is None else bodies[match] + closing)
    return {"empty": [closing] * count, "shuffled": shuffled, "other": other}


def copied_share(explanation: str, solution: str, shortest: int = 12) -> float:
    """Fraction of the solution's characters that the explanation copies.

    Every character counts that is in a match, in whatever order the matches stand. Takes
    a time in proportion to the lengths of the texts.

    Args:
      explanation: text of the explanation.
      solution: text of the solution.
      shortest: minimum number of characters of a match that is not the whole solution.

    Returns:
      A number from 0 to 1; 0 for an empty solution.
    """
    solution = solution.strip()
    if not solution:
        return 0.0
    if solution in explanation:
        return 1.0
    pieces = [solution[i : i + shortest] for i in range(len(solution) - shortest + 1)]
    windows = (explanation[i : i + shortest] for i in range(len(explanation)))
    copied = set(pieces).intersection(windows)
    covered = end = 0
    for start, piece in enumerate(pieces):
        if piece in copied:
            covered += start + shortest - max(start, end)
            end = start + shortest
    return covered / len(solution)
