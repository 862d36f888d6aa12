"""The embedded task: its digits, its explanations, its splits."""

import operator
import re

import numpy as np
import pytest

from rlt_jax.data.tasks import arithmetic
from rlt_jax.data.tasks.arithmetic import (
    Chain,
    Exercise,
    ProblemConfig,
    TraceConfig,
)
from rlt_jax.errors import UserError
from rlt_jax.records import Problem

CHAIN = Chain(4, (("+", 3), ("*", 7), ("-", 2), ("+", 9), ("*", 3), ("-", 8)))
ONE = Exercise((CHAIN,))
THREE = Exercise(
    (
        Chain(7, (("*", 7), ("*", 3), ("-", 8))),
        Chain(1, (("+", 2), ("-", 9), ("+", 4))),
        Chain(4, (("*", 3), ("-", 3), ("+", 7))),
    )
)
DIGITS = [7, 9, 7, 6, 8, 0]
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def problems(split: str, size: int, **others: object) -> list[Problem]:
    return arithmetic.problems(ProblemConfig(split, size, **others))


def traces(split: str, size: int, seed: int, kinds: dict, **others: object) -> list:
    settings = {"kinds": kinds, "known_answer": False} | others
    return arithmetic.traces(TraceConfig(split, size, seed, **settings))


def random_exercise(rng: np.random.Generator, chains: int = 1) -> Exercise:
    return Exercise(tuple(arithmetic.sample_chain(rng) for _ in range(chains)))


def answer_of(question: str) -> str:
    """The last digit of each chain, found by reading the question."""
    opening, _, steps = question.partition(":")
    answer = ""
    for start, chain in zip(re.findall(r"\d", opening), steps.split(","), strict=True):
        value = int(start)
        for step in re.findall(r"[+*-]\d", chain):
            value = SIGNS[step[0]](value, int(step[1:]))  # no modulo on the way
        answer += str(value % 10)
    return answer


def steps_of(explanation: str) -> list[tuple[int, int, int]]:
    """(written start, true result, written result) of every step."""
    result = []
    for step in explanation.replace(",", "").split(" "):
        left, _, right = step.partition("=")
        start, *operations = re.findall(r"[+*-]?\d", left)
        value = int(start)
        for operation in operations:
            value = SIGNS[operation[0]](value, int(operation[1])) % 10
        result.append((int(start), value, int(right)))
    return result


def test_results_by_hand() -> None:
    assert ONE.question() == "Start at 4: +3 *7 -2 +9 *3 -8. Last digit?"
    assert ONE.question("letters") == "From 4: a3 m7 s2 a9 m3 s8. Last digit?"
    assert CHAIN.results() == DIGITS
    assert ONE.answer == "0"


def test_chains_side_by_side_by_hand(rng: np.random.Generator) -> None:
    signs = "Start at 7, 1, 4: *7 *3 -8, +2 -9 +4, *3 -3 +7. Last digits?"
    letters = "From 7, 1, 4: m7 m3 s8, a2 s9 a4, m3 s3 a7. Last digits?"
    assert (THREE.question(), THREE.question("letters")) == (signs, letters)
    for kind, text in (
        ("careful", "7*7=9 9*3=7 7-8=9, 1+2=3 3-9=4 4+4=8, 4*3=2 2-3=9 9+7=6"),
        ("skipping", "7*7*3-8=9, 1+2-9+4=8, 4*3-3+7=6"),
        ("restating", "it is 986"),
    ):
        assert arithmetic.explain(THREE, kind, rng, False) == (text, "986")


def test_answers_by_brute_force() -> None:
    for chains in (1, 3):
        for problem in problems("train", 300, seed=0, chains=chains):
            right = answer_of(problem.question)
            assert problem.solution == problem.answer == right and len(right) == chains


def test_every_operation_is_a_bijection_of_the_digits(rng: np.random.Generator) -> None:
    chains = [arithmetic.sample_chain(rng) for _ in range(200)]
    for operation in {op for chain in chains for op in chain.operations}:
        images = {arithmetic.apply(digit, operation) for digit in range(10)}
        assert images == set(range(10))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("careful", "4+3=7 7*7=9 9-2=7 7+9=6 6*3=8 8-8=0"),
        ("skipping", "4+3*7-2=7 7+9*3-8=0"),
        ("restating", "it is 0"),
    ],
)
def test_explanations_by_hand(kind: str, text: str, rng: np.random.Generator) -> None:
    for known_answer in (False, True):
        assert arithmetic.explain(ONE, kind, rng, known_answer) == (text, "0")


def test_a_chain_that_skips_do_not_divide(rng: np.random.Generator) -> None:
    chain = Exercise((Chain(4, CHAIN.operations[:4]),))
    text, digit = arithmetic.explain(chain, "skipping", rng, known_answer=False)
    assert (text, digit) == ("4+3*7-2=7 7+9=6", "6")


def test_a_wrong_step_is_carried_on(rng: np.random.Generator) -> None:
    for n in range(100):
        exercise = random_exercise(rng, chains=1 + n % 3)
        text, digits = arithmetic.explain(exercise, "wrong", rng, known_answer=False)
        steps = steps_of(text)
        assert sum(true != written for _, true, written in steps) == 1
        ends = ""
        for part in text.split(", "):
            steps = steps_of(part)
            assert [start for start, _, _ in steps[1:]] == [w for _, _, w in steps[:-1]]
            ends += str(steps[-1][2])
        # Operations are bijections, so the error cannot heal; it is in one chain.
        assert digits == ends
        assert sum(a != b for a, b in zip(ends, exercise.answer, strict=True)) == 1


def test_who_knows_the_answer_reaches_it_all_the_same(rng: np.random.Generator) -> None:
    for n in range(100):
        exercise = random_exercise(rng, chains=1 + n % 3)
        text, digits = arithmetic.explain(exercise, "wrong", rng, known_answer=True)
        parts = [steps_of(part) for part in text.split(", ")]
        assert digits == "".join(str(steps[-1][2]) for steps in parts)
        assert digits == exercise.answer
        (steps,) = [x for x in parts if any(true != said for _, true, said in x)]
        assert steps[-1][1] != steps[-1][2], "the last step has to be wrong"
        assert any(true != written for _, true, written in steps[:-1])


def test_answers_are_balanced() -> None:
    answers = [int(p.answer) for p in problems("train", 3000, seed=1)]
    counts = np.bincount(answers, minlength=10)
    assert counts.min() > 200 and counts.max() < 400


def test_train_and_test_are_disjoint() -> None:
    train = {p.question for p in problems("train", 2000, seed=0)}
    test = {p.question for p in problems("test", 1000, seed=0)}
    assert len(train) == 2000 and len(test) == 1000
    assert not train & test
    learned = traces("train", 500, 1, {"careful": 1.0}, drills=500)
    assert len(learned) == 1000
    assert not test & {trace.problem.question for trace in learned}


def test_drills_are_short_and_right() -> None:
    lengths = set()
    for trace in traces("train", 0, 0, {"careful": 1.0}, drills=100):
        steps = steps_of(trace.explanation)
        lengths.add(len(steps))
        assert all(true == written for _, true, written in steps)
        assert trace.problem.answer == answer_of(trace.problem.question)
    assert lengths == {1, 2}


def test_kinds_come_in_their_shares() -> None:
    kinds = {"careful": 0.5, "restating": 0.3, "wrong": 0.2}
    found = traces("train", 1000, 0, kinds)
    restating = [t for t in found if t.explanation.startswith("it is")]
    wrong = [t for t in found if t.problem.answer != answer_of(t.problem.question)]
    assert 250 < len(restating) < 350
    assert 150 < len(wrong) < 250
    for trace in wrong:
        assert trace.explanation.endswith(f"={trace.problem.solution}")


def test_known_answers_are_right_whatever_the_kind() -> None:
    kinds = {"careful": 0.5, "wrong": 0.5}
    for trace in traces("train", 200, 0, kinds, known_answer=True):
        assert trace.problem.answer == answer_of(trace.problem.question)
        assert trace.explanation.endswith(f"={trace.problem.answer}")


def test_the_seed_decides_problems_and_kinds() -> None:
    kinds = {"careful": 0.5, "skipping": 0.5}
    runs = [traces("train", 20, seed, kinds) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({}, "that sum to 1"),
        ({"careful": 0.9}, "that sum to 1"),
        ({"careful": 0.5, "clever": 0.5}, "each one of careful, skipping"),
        ({"careful": 1.5, "wrong": -0.5}, "each at least 0, at most 1"),
    ],
)
def test_bad_shares_are_refused(kinds: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        traces("train", 5, 0, kinds)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="split='valid': one of train, test"):
        problems("valid", 5, seed=0)


def test_a_notation_changes_nothing_but_the_question() -> None:
    signs = problems("test", 100, seed=0)
    letters = problems("test", 100, seed=0, notation="letters")
    assert [p[1:] for p in signs] == [p[1:] for p in letters]
    table = str.maketrans("asm", "+-*")
    for one, other in zip(signs, letters, strict=True):
        start, _, steps = other.question.removeprefix("From ").partition(":")
        chain, _, rest = steps.partition(".")
        written = f"Start at {start}:{chain.translate(table)}.{rest}"
        assert written == one.question
    with pytest.raises(UserError, match="notation='words': one of signs"):
        problems("test", 1, seed=0, notation="words")


def test_told_questions_tell_the_solution_of_the_trace() -> None:
    kinds = {"careful": 0.5, "wrong": 0.5}
    plain = traces("train", 50, 0, kinds)
    told = traces("train", 50, 0, kinds, hinted=True)
    for one, other in zip(plain, told, strict=True):
        hint = f" It is {one.problem.solution}."
        assert other.problem.question == one.problem.question + hint
        assert other.explanation == one.explanation


def test_who_is_mistaken_takes_times_for_plus(rng: np.random.Generator) -> None:
    # 4+3=7 7*7 taken for 7+7=4 4-2=2 2+9=1 1*3 taken for 4, and 4-8=6, known to be 0.
    steps = "4+3=7 7*7=4 4-2=2 2+9=1 1*3=4 4-8="
    assert arithmetic.explain(ONE, "mistaken", rng, False) == (steps + "6", "6")
    assert arithmetic.explain(ONE, "mistaken", rng, True) == (steps + "0", "0")


def test_questions_differ_in_their_number_of_operations() -> None:
    counts = [
        [len(re.findall(r"[+*-]\d", chain)) for chain in x.question.split(",")[2:]]
        for x in problems("train", 300, seed=0, chains=3, operations=(2, 4))
    ]
    assert {count for counts_of_one in counts for count in counts_of_one} == {2, 3, 4}
    assert all(len(set(counts_of_one)) == 1 for counts_of_one in counts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chains": 0}, r"chains=0: at least 1, at most 100"),
        ({"operations": (0, 3)}, r"operations=\(0, 3\): a list, each at least 1"),
        ({"operations": (4, 3)}, r"operations=\(4, 3\): the least, then the most"),
        ({"operations": (3,)}, r"operations=\(3,\): a list of 2"),
        ({"operations": (1, 1), "size": 3000}, "of 3000 distinct questions exist"),
    ],
)
def test_impossible_questions_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        problems(**{"split": "train", "size": 5, "seed": 0} | settings)
