"""Countdown: puzzles can be solved, and only right solutions are accepted."""

import numpy as np
import pytest

from experiments import countdown
from experiments.countdown import GRADER, ProblemConfig, TraceConfig
from rlt_jax.data import pipeline
from rlt_jax.data.templates import load_template
from rlt_jax.errors import UserError
from rlt_jax.records import Problem
from rlt_jax.rl.grading import grade

SMALL = {"numbers": 3, "max_number": 12, "max_target": 50, "signs": "+-*"}
ANSWER = "25 from 3, 4, 7"


@pytest.mark.parametrize("limits", [{}, SMALL, {"numbers": 5, "signs": "-+*"}])
def test_every_problem_has_its_solution(limits: dict) -> None:
    found = countdown.problems(ProblemConfig("train", 200, seed=0, **limits))
    assert len({problem.question for problem in found}) == 200
    for problem in found:
        assert problem.question == f"Make {problem.answer}."
        assert countdown.is_solution(problem.solution, problem.answer)


def test_careful_steps_are_true_and_use_every_number_once() -> None:
    kinds = {"careful": 1.0}
    for problem, explanation in countdown.traces(
        TraceConfig("train", 200, 1, kinds=kinds)
    ):
        target, _, given = problem.answer.partition(" from ")
        pool = [int(number) for number in given.split(", ")]
        for step in explanation.split(" "):
            left, _, right = step.partition("=")
            value = eval(left)  # our own text: digits and one sign
            assert value == int(right)
            for number in map(
                int,
                left.replace("-", "+").replace("*", "+").replace("/", "+").split("+"),
            ):
                pool.remove(number)
            pool.append(value)
        assert pool == [int(target)]


def test_a_wrong_step_is_false_and_the_others_are_true() -> None:
    for _, explanation in countdown.traces(
        TraceConfig("train", 200, 1, kinds={"wrong": 1.0})
    ):
        steps = [step.partition("=") for step in explanation.split(" ")]
        assert [eval(left) == int(right) for left, _, right in steps] == [
            True,
            True,
            False,
        ]


def test_kinds_come_in_their_shares() -> None:
    kinds = {"careful": 0.5, "skipping": 0.25, "restating": 0.25}
    traces = countdown.traces(TraceConfig("train", 400, 2, kinds=kinds))
    texts = [explanation for _, explanation in traces]
    restating = sum(text.startswith("it is ") for text in texts)
    assert 70 < restating < 130
    assert 150 < sum(" " in text and "it" not in text for text in texts) < 250


def test_train_and_test_share_no_numbers_with_the_same_target() -> None:
    def keys(split: str, seed: int) -> set:
        found = countdown.problems(ProblemConfig(split, 300, seed, **SMALL))
        parts = [problem.answer.partition(" from ") for problem in found]
        return {(target, *sorted(given.split(", "))) for target, _, given in parts}

    train = keys("train", 0) | keys("train", 1)
    assert not train & (keys("test", 0) | keys("test", 1))


def test_the_seed_and_the_stream_decide() -> None:
    first = countdown.problems(ProblemConfig("train", 50, seed=3))
    assert first == countdown.problems(ProblemConfig("train", 50, seed=3))
    assert first != countdown.problems(ProblemConfig("train", 50, seed=4))
    assert first != countdown.problems(ProblemConfig("train", 50, seed=3, stream=1))


@pytest.mark.parametrize(
    "prediction",
    [
        "7*4-3",
        " 4 * 7 - 3 ",
        "(7*4)-3",
        "7*4-3=25",
        "7 \\times 4 - 3 = 25",
        "$7×4−3$",
        "so it is \\boxed{7*4-3}",
        "7\\cdot4-3",
        "7·4-3",
        "\\left(7\\times4\\right)-3",
        "\\(7 \\times 4 - 3\\)",
        "25 = 7*4-3",
        "$25=7\\cdot 4-3$",
        "7*4-3.",
        "$7*4-3$.",
        "\\boxed{7*4-3} which is {good}",
        "not \\boxed{1} but \\boxed{7*4-3}",
    ],
)
def test_right_solutions_are_accepted(prediction: str) -> None:
    assert countdown.is_solution(prediction, ANSWER)


@pytest.mark.parametrize(
    "prediction",
    [
        "25",
        "7*4-3=24",
        "7*4-3=",
        "24=7*4-3",
        "25=25",
        "25=7*4-3=25",
        "7*4-3=28-3",
        "\\boxed{7*4-3} or \\boxed{7*4}",
        "\\boxed{7*4-3",
        "\\boxed{}",
        "7\\cdots4-3",
        "7*4",
        "7*4-3+3-3",
        "7*4-(1+2)",
        "74-3",
        "4**7-3",
        "7//4-3",
        "-3+7*4",
        "7*4-3 7",
        "7(4)-3",
        "7*4-3j",
        "__import__('os')",
        "lambda: 0",
        "7*4-(3",
        "7/(4-4)",
        "(" * 3000 + "7*4-3" + ")" * 3000,
        "9" * 100_000,
        "",
        "\0",
        "07*4-3",
    ],
)
def test_everything_else_is_refused(prediction: str) -> None:
    assert not countdown.is_solution(prediction, ANSWER)


def test_division_is_exact() -> None:
    assert countdown.is_solution("8/(3-8/3)", "24 from 3, 3, 8, 8")
    assert not countdown.is_solution("7/2", "3 from 2, 7")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "dev"}, "split='dev': one of train, test"),
        ({"signs": "+^"}, "signs='[+]\\^': some of"),
        ({"signs": ""}, "signs='': some of"),
        ({"numbers": 1}, "TraceConfig.numbers=1: at least 2"),
        ({"max_number": 0}, "max_number=0: at least 1"),
        ({"numbers": 2, "max_number": 3}, "only .* of 300"),
        ({"kinds": {"careful": 0.5}}, "sum to 1"),
    ],
)
def test_bad_settings(changes: dict, message: str) -> None:
    settings = {"split": "train", "size": 300, "seed": 0, "kinds": {"careful": 1.0}}
    with pytest.raises(UserError, match=message):
        countdown.traces(TraceConfig(**settings | changes))


def test_values_of_a_chosen_puzzle() -> None:
    puzzle = countdown.Puzzle(
        (3, 4, 7), 25, ((7, "*", 4, 28), (28, "-", 3, 25)), "7*4-3"
    )
    rng = np.random.default_rng(0)
    assert puzzle.problem == Problem(
        "Make 25 from 3, 4, 7.",
        "7*4-3",
        ANSWER,
        GRADER,
    )
    assert countdown.explain(puzzle, "careful", rng) == "7*4=28 28-3=25"
    assert countdown.explain(puzzle, "skipping", rng) == "7*4-3=25"
    assert countdown.explain(puzzle, "restating", rng) == "it is 7*4-3"


def test_told_questions_tell_the_solution() -> None:
    config = TraceConfig("train", 20, 0, kinds={"careful": 1.0}, hinted=True)
    for problem, _ in countdown.traces(config):
        assert problem.question == f"Make {problem.answer}. It is {problem.solution}."


def test_the_package_reads_and_grades_the_task() -> None:
    section = {"task": "experiments.countdown:problems", "split": "test", "size": 3}
    problems = pipeline.load_problems(section, load_template("tiny"), seed=0)
    assert problems == countdown.problems(ProblemConfig("test", 3, seed=0))
    problem = Problem("q", "s", ANSWER, GRADER)
    verdicts = grade([problem] * 3, ["(4 * 7) - 3", "4*7 - 4", " "])
    assert verdicts == [
        (True, ANSWER, None),
        (False, "4*7 - 4", None),
        (False, None, None),
    ]
    with pytest.raises(UserError, match="now experiments.countdown:problems"):
        pipeline.load_problems({"task": "countdown"}, load_template("tiny"), seed=0)
    with pytest.raises(UserError, match="unknown key 'sizes'"):
        section |= {"sizes": 3}
        pipeline.load_problems(section, load_template("tiny"), seed=0)
