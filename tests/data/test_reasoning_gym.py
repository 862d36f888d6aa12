"""Puzzles of the library: their splits and seeds, its verifiers, wrong settings."""

import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from ml_collections import ConfigDict

from rlt_jax.data import pipeline
from rlt_jax.data.tasks import reasoning_gym
from rlt_jax.data.templates import Template
from rlt_jax.errors import UserError
from rlt_jax.records import Problem
from rlt_jax.rl.grading import grade

FEW = {"max_value": 20}  # questions are repeated soon
HASHES = """
from rlt_jax.data.tasks.reasoning_gym import PuzzleConfig, problems
if __name__ == "__main__":
    for name in ("ransom_note", "word_ladder", "list_functions", "gcd"):
        print(problems(PuzzleConfig(name, "train", 8, seed=3)))
"""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puzzles are generated in this process, which takes less time."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.setenv("PYTHONHASHSEED", "0")


def puzzles(dataset: str = "gcd", split: str = "train", **keys: Any) -> list[Problem]:
    keys = {"size": 30, "seed": 0} | keys
    return reasoning_gym.problems(
        reasoning_gym.PuzzleConfig(dataset=dataset, split=split, **keys)
    )


def questions(*args: Any, **keys: Any) -> set[str]:
    return {problem.question for problem in puzzles(*args, **keys)}


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def is_right(problem: Problem, prediction: str) -> bool:
    return grade([problem], [prediction])[0].correct


@pytest.mark.usefixtures("here")
def test_problems_have_readable_answers_and_a_solution_around_them() -> None:
    for problem in puzzles(config=FEW):
        given = numbers(problem.question)
        assert problem.answer == str(math.gcd(*given)) and max(given) <= 20
        assert problem.solution == f"The answer is \\boxed{{{problem.answer}}}."
    for problem in puzzles(solution="{answer}, or \\text{no}: {answer}"):
        assert (
            problem.solution == f"{problem.answer}, or \\text{{no}}: {problem.answer}"
        )


@pytest.mark.usefixtures("here")
def test_no_question_is_in_both_splits_or_twice_in_one() -> None:
    train = questions(config=FEW, size=150)
    test = questions(split="test", config=FEW, size=20)
    other = questions(split="test", config=FEW, size=20, seed=1, stream=2)
    assert (len(train), len(test), len(other)) == (150, 20, 20)
    assert not train & (test | other)
    assert test & other, "the check would notice nothing"


@pytest.mark.usefixtures("here")
def test_seeds_and_streams_have_other_questions() -> None:
    assert puzzles(size=7) == puzzles(size=30)[:7] == puzzles(size=7)
    # The library's own seeds share all but one of their questions with the next seed.
    assert len(questions() | questions(seed=1) | questions(stream=1)) > 85


@pytest.mark.usefixtures("here")
def test_entries_of_more_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning_gym, "CHUNK", 10)
    assert len(questions("word_ladder", size=35)) == 35


def test_every_process_generates_the_same() -> None:
    pytest.importorskip("reasoning_gym")
    outputs = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", HASHES]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        outputs.append(subprocess.check_output(command, env=environment))
    assert outputs[0] == outputs[1] and outputs[0].count(b"Problem(") == 32


def test_the_environment_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    with pytest.raises(UserError, match="data.dataset='gdc': one of .* gcd,"):
        puzzles("gdc")
    assert os.environ["PYTHONHASHSEED"] == "5"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "dataset",
    # Their verifiers need tuples, fractions, keys that are no texts, numbers.
    ["arc_1d", "rearc", "gsm_symbolic", "course_schedule", "countdown", "mini_sudoku"],
)
def test_known_solutions_are_right(dataset: str) -> None:
    made = puzzles(dataset, size=6)
    for texts in ("solution", "answer"):
        verdicts = grade(made, [getattr(problem, texts) for problem in made])
        assert all(verdict.correct for verdict in verdicts), verdicts
    assert not any(v.correct for v in grade(made, [r"\boxed{no idea}"] * len(made)))


@pytest.mark.usefixtures("here")
def test_the_verifier_accepts_other_solutions() -> None:
    for problem in puzzles("countdown", size=5):
        target = numbers(problem.question)[-1]
        other = f"-(-({problem.answer}))"
        assert is_right(problem, f"It is \\boxed{{{other}}}")
        assert is_right(problem, f" {other}\n")
        assert not is_right(problem, f"{target}")
        assert not is_right(problem, f"{other} + 1 - 1")
        assert not is_right(problem, f"\\boxed{{{other}}}, no: \\boxed{{{target}}}")


@pytest.mark.usefixtures("here")
def test_a_part_of_the_score_is_not_enough() -> None:
    (problem,) = puzzles(size=1)
    assert not is_right(problem, f"{problem.answer} or {int(problem.answer) + 1}")


@pytest.mark.usefixtures("here")
def test_composites_are_generated_from_a_config(tiny: Template) -> None:
    parts = [
        {"name": "gcd", "weight": 1, "config": {"max_value": 9}},
        {"name": "spell_backward", "weight": 1.0, "config": {}},
    ]
    data = {"task": "reasoning_gym", "dataset": "composite", "split": "test"}
    section = ConfigDict(data | {"size": 20, "config": {"datasets": parts}})
    made = pipeline.load_problems(section, tiny, seed=0)
    gcds = [problem for problem in made if "GCD" in problem.question]
    assert 0 < len(gcds) < len(made) == 20
    assert max(max(numbers(problem.question)) for problem in gcds) <= 9
    assert all(verdict.correct for verdict in grade(made, [p.solution for p in made]))
    assert made != pipeline.load_problems(section, tiny, seed=1)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"dataset": "chain_sums"},
            "dataset='chain_sums': one of ab, acre, .* chain_sum, .* zebra_puzzles",
        ),
        ({"split": "dev"}, "split='dev': one of train, test"),
        ({"config": {"max_valu": 3}}, "'max_valu'.* 'gcd' are .* max_value"),
        ({"config": {"max_numbers": 1}}, "data.config={.*max_numbers must be >="),
        ({"config": {"size": 3}}, "'size'.*seed and size are those of the run"),
        ({"config": {"max_value": "9"}}, "data.config=.*TypeError"),
        ({"config": "max_value"}, "config='max_value': keys and values"),
        ({"dataset": "composite"}, "Must specify at least one dataset"),
        ({"config": {"max_value": 2}}, r"data.size=30: 'gcd' .* only \d questions"),
        (
            {"dataset": "rush_hour"},
            "'rush_hour' .* has only 0 questions with an answer",
        ),
    ],
)
def test_what_cannot_be_generated(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        puzzles(**keys)


@pytest.mark.usefixtures("here")
def test_a_config_without_solutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning_gym, "CHUNK", 3)
    impossible = {"min_target": 10**9, "max_target": 10**9}
    with pytest.raises(UserError, match="only 0 .* failed: ValueError.'Failed to gen"):
        puzzles("countdown", config=impossible)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"pip install 'rlt_jax\[reasoning_gym\]'"):
        puzzles()
