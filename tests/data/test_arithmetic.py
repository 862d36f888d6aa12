"""The embedded task: its digits, its explanations, its splits."""

import operator
import re

import numpy as np
import pytest

from rlt_jax.data.tasks import arithmetic
from rlt_jax.data.tasks.arithmetic import Chain, TraceConfig
from rlt_jax.errors import UserError

CHAIN = Chain(4, (("+", 3), ("*", 7), ("-", 2), ("+", 9), ("*", 3), ("-", 8)))
DIGITS = [7, 9, 7, 6, 8, 0]
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def answer_of(question: str) -> int:
    """The last digit, found by reading the question."""
    start, *steps = re.findall(r"(?:[+*-])?\d+", question)
    value = int(start)
    for step in steps:
        value = SIGNS[step[0]](value, int(step[1:]))  # no modulo on the way
    return value % 10


def steps_of(explanation: str) -> list[tuple[int, int, int]]:
    """(written start, true result, written result) of every step."""
    result = []
    for step in explanation.split(" "):
        left, _, right = step.partition("=")
        start, *operations = re.findall(r"[+*-]?\d", left)
        value = int(start)
        for operation in operations:
            value = SIGNS[operation[0]](value, int(operation[1])) % 10
        result.append((int(start), value, int(right)))
    return result


def test_results_by_hand() -> None:
    assert CHAIN.question() == "Start at 4: +3 *7 -2 +9 *3 -8. Last digit?"
    assert CHAIN.question("letters") == "From 4: a3 m7 s2 a9 m3 s8. Last digit?"
    assert CHAIN.results() == DIGITS


def test_answers_by_brute_force() -> None:
    for problem in arithmetic.problems("train", 300, seed=0):
        assert problem.solution == problem.answer == str(answer_of(problem.question))


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
        assert arithmetic.explain(CHAIN, kind, rng, known_answer) == (text, 0)


def test_a_chain_that_skips_do_not_divide(rng: np.random.Generator) -> None:
    chain = Chain(4, CHAIN.operations[:4])
    text, digit = arithmetic.explain(chain, "skipping", rng, known_answer=False)
    assert (text, digit) == ("4+3*7-2=7 7+9=6", 6)


def test_a_wrong_step_is_carried_on(rng: np.random.Generator) -> None:
    for _ in range(100):
        chain = arithmetic.sample_chain(rng)
        text, digit = arithmetic.explain(chain, "wrong", rng, known_answer=False)
        steps = steps_of(text)
        assert sum(true != written for _, true, written in steps) == 1
        assert [start for start, _, _ in steps[1:]] == [w for _, _, w in steps[:-1]]
        # Operations are bijections, so the error cannot heal.
        assert digit == steps[-1][2] != chain.results()[-1]


def test_who_knows_the_answer_reaches_it_all_the_same(rng: np.random.Generator) -> None:
    for _ in range(100):
        chain = arithmetic.sample_chain(rng)
        text, digit = arithmetic.explain(chain, "wrong", rng, known_answer=True)
        steps = steps_of(text)
        assert digit == steps[-1][2] == chain.results()[-1]
        assert steps[-1][1] != steps[-1][2], "the last step has to be wrong"
        assert any(true != written for _, true, written in steps[:-1])


def test_answers_are_balanced() -> None:
    answers = [int(p.answer) for p in arithmetic.problems("train", 3000, seed=1)]
    counts = np.bincount(answers, minlength=10)
    assert counts.min() > 200 and counts.max() < 400


def test_train_and_test_are_disjoint() -> None:
    train = {p.question for p in arithmetic.problems("train", 2000, seed=0)}
    test = {p.question for p in arithmetic.problems("test", 1000, seed=0)}
    assert len(train) == 2000 and len(test) == 1000
    assert not train & test
    kinds = {"careful": 1.0}
    traces = arithmetic.traces(TraceConfig("train", 500, 1, kinds, False, drills=500))
    assert len(traces) == 1000
    assert not test & {trace.problem.question for trace in traces}


def test_drills_are_short_and_right() -> None:
    traces = arithmetic.traces(
        TraceConfig("train", 0, 0, {"careful": 1.0}, False, drills=100)
    )
    lengths = set()
    for trace in traces:
        steps = steps_of(trace.explanation)
        lengths.add(len(steps))
        assert all(true == written for _, true, written in steps)
        assert trace.problem.answer == str(answer_of(trace.problem.question))
    assert lengths == {1, 2}


def test_kinds_come_in_their_shares() -> None:
    kinds = {"careful": 0.5, "restating": 0.3, "wrong": 0.2}
    traces = arithmetic.traces(TraceConfig("train", 1000, 0, kinds, known_answer=False))
    restating = [t for t in traces if t.explanation.startswith("it is")]
    wrong = [
        t for t in traces if t.problem.answer != str(answer_of(t.problem.question))
    ]
    assert 250 < len(restating) < 350
    assert 150 < len(wrong) < 250
    for trace in wrong:
        assert trace.explanation.endswith(f"={trace.problem.solution}")


def test_known_answers_are_right_whatever_the_kind() -> None:
    kinds = {"careful": 0.5, "wrong": 0.5}
    for trace in arithmetic.traces(
        TraceConfig("train", 200, 0, kinds, known_answer=True)
    ):
        assert trace.problem.answer == str(answer_of(trace.problem.question))
        assert trace.explanation.endswith(f"={trace.problem.answer}")


def test_the_seed_decides_problems_and_kinds() -> None:
    kinds = {"careful": 0.5, "skipping": 0.5}
    runs = [
        arithmetic.traces(TraceConfig("train", 20, seed, kinds, False))
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "kinds",
    [
        {},
        {"careful": 0.9},
        {"careful": 0.5, "clever": 0.5},
        {"careful": 1.5, "wrong": -0.5},
    ],
)
def test_bad_shares_are_refused(kinds: dict[str, float]) -> None:
    with pytest.raises(UserError, match="that sum to 1"):
        arithmetic.traces(TraceConfig("train", 5, 0, kinds, known_answer=False))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="split='valid': one of train, test"):
        arithmetic.problems("valid", 5, seed=0)


def test_a_notation_changes_nothing_but_the_question() -> None:
    signs = arithmetic.problems("test", 100, seed=0)
    letters = arithmetic.problems("test", 100, seed=0, notation="letters")
    assert [p[1:] for p in signs] == [p[1:] for p in letters]
    table = str.maketrans("asm", "+-*")
    for one, other in zip(signs, letters, strict=True):
        start, _, steps = other.question.removeprefix("From ").partition(":")
        chain, _, rest = steps.partition(".")
        written = f"Start at {start}:{chain.translate(table)}.{rest}"
        assert written == one.question
    with pytest.raises(UserError, match="notation='words': one of signs"):
        arithmetic.problems("test", 1, seed=0, notation="words")


def test_told_questions_tell_the_solution_of_the_trace() -> None:
    settings = {"kinds": {"careful": 0.5, "wrong": 0.5}, "known_answer": False}
    plain = arithmetic.traces(TraceConfig("train", 50, 0, **settings))
    told = arithmetic.traces(TraceConfig("train", 50, 0, **settings, hinted=True))
    for one, other in zip(plain, told, strict=True):
        hint = f" It is {one.problem.solution}."
        assert other.problem.question == one.problem.question + hint
        assert other.explanation == one.explanation


def test_who_is_mistaken_takes_times_for_plus(rng: np.random.Generator) -> None:
    # 4+3=7 7*7 taken for 7+7=4 4-2=2 2+9=1 1*3 taken for 4, and 4-8=6, known to be 0.
    steps = "4+3=7 7*7=4 4-2=2 2+9=1 1*3=4 4-8="
    assert arithmetic.explain(CHAIN, "mistaken", rng, False) == (steps + "6", 6)
    assert arithmetic.explain(CHAIN, "mistaken", rng, True) == (steps + "0", 0)
