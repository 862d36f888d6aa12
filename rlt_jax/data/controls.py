"""Control completions, which should get a lower reward than real explanations."""

from collections.abc import Sequence

import numpy as np

from rlt_jax.records import Problem

CONTROLS = ("empty", "shuffled", "other", "other_solution")


def controlled(
    completions: Sequence[str],
    problems: Sequence[Problem],
    closing: str,
    seed: int | Sequence[int],
) -> dict[str, list[tuple[Problem, str]]]:
    """Makes control completions, which should get a lower reward than the real ones.

    Args:
      completions: E texts.
      problems: E problems, those of the completions.
      closing: closing tag of an explanation, which every control has.
      seed: random seed of the shuffling.

    Returns:
      Name of a control -> E problems and completions: "empty" explanations; explanations
      with "shuffled" words; explanations of another question ("other"); and the
      explanations as they are, as if the solution were that of another question
      ("other_solution"). The last two are left out where a question or a solution is that
      of all problems.
    """
    rng = np.random.default_rng(seed)
    bodies = [text.partition(closing)[0] for text in completions]
    closed = [body + closing for body in bodies]
    shuffled = [" ".join(rng.permutation(x.split(" "))) + closing for x in bodies]
    empty = [closing] * len(bodies)
    made = {"empty": (problems, empty), "shuffled": (problems, shuffled)}
    asked = [(problem.question,) for problem in problems]
    others = [next_other(asked, n) for n in range(len(bodies))]
    if None not in others:
        made["other"] = problems, [closed[m] for m in others]
    solutions = other_solutions(problems)
    if None not in solutions:
        pairs = zip(problems, solutions, strict=True)
        changed = [problem._replace(solution=solution) for problem, solution in pairs]
        made["other_solution"] = changed, closed
    return {name: [*zip(*pair, strict=True)] for name, pair in made.items()}


def other_solutions(problems: Sequence[Problem]) -> list[str | None]:
    """For each problem the solution of the next one with another question and solution."""
    pairs = [(problem.question, problem.solution) for problem in problems]
    others = [next_other(pairs, n) for n in range(len(pairs))]
    return [None if m is None else problems[m].solution for m in others]


def next_other(items: Sequence[Sequence[str]], n: int) -> int | None:
    """Index of the first item after the n-th, cyclically, that differs in every part."""
    following = ((n + k) % len(items) for k in range(1, len(items)))
    differs = (m for m in following if all(map(str.__ne__, items[m], items[n])))
    return next(differs, None)


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
