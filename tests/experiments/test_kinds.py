"""Explanations are classified by their steps."""

import numpy as np
import pytest

from experiments.kinds import form_and_errors, kind_of, kind_of_puzzle
from rlt_jax.data.tasks import arithmetic
from rlt_jax.data.tasks.arithmetic import Chain, Exercise

ONE = Exercise(
    (Chain(4, (("+", 3), ("*", 7), ("-", 2), ("+", 9), ("*", 3), ("-", 8))),)
)
TWO = Exercise((Chain(7, (("*", 7), ("*", 3))), Chain(1, (("+", 2), ("-", 9)))))


def test_generated_explanations_have_their_kind() -> None:
    rng = np.random.default_rng(0)
    for n in range(200):
        kind, chains = arithmetic.KINDS[n % 4], 1 + n // 4 % 3
        exercise = Exercise(tuple(arithmetic.sample_chain(rng) for _ in range(chains)))
        text, _ = arithmetic.explain(exercise, kind, rng, known_answer=bool(n % 5))
        assert kind_of(exercise.question(), text) == kind
        assert kind_of(exercise.question("letters"), text) == kind
        form = "careful, wrong" if kind == "wrong" else kind
        assert form_and_errors(exercise.question(), text) == form


@pytest.mark.parametrize(
    ("explanation", "kind"),
    [
        ("4+3=7 7*7=9", "other"),
        ("4+3=7 7-2=5", "wrong"),  # a step was left out
        ("4+3=7 8*7=6", "wrong"),  # does not go on from 7
        ("4+3=8", "wrong"),
        ("5+3=8", "wrong"),
        ("4+3=7 7*7=4 4-2=2 2+9=1 1*3=4 4-8=0", "wrong"),  # * taken for +
        ("", "restating"),
        ("I know: it is 0", "restating"),
    ],
)
def test_kinds_by_hand(explanation: str, kind: str) -> None:
    assert kind_of(ONE.question(), explanation) == kind


@pytest.mark.parametrize(
    ("explanation", "kind"),
    [
        ("7*7=9 9*3=7, 1+2=3 3-9=4", "careful"),
        ("7*7*3=7, 1+2=3 3-9=4", "skipping"),
        ("7*7=9 9*3=7", "careful, other"),  # only one of two chains
        ("7*7=9 9*3=7, ", "careful, other"),
        ("7*7=9 9*3=7, 1+2=3", "careful, other"),
        ("1+2=3 3-9=4, 7*7=9 9*3=7", "careful, wrong"),  # chains in another order
        ("7*7*3=7, 1+2-9=5", "skipping, wrong"),
        ("7*7=9 9*3=7, 1+2=3 3-9=4, 1+1=2", "careful, wrong"),  # there is no third
        ("it is 74", "restating"),
    ],
)
def test_chains_side_by_side_by_hand(explanation: str, kind: str) -> None:
    assert form_and_errors(TWO.question(), explanation) == kind


@pytest.mark.parametrize(
    ("explanation", "kind"),
    [
        ("it is 2*2*6", "no step"),
        ("", "no step"),
        ("02*2=4", "no step"),
        ("2*2=2", "one step, wrong"),
        ("2*2*6=24", "one step, right"),
        ("7*4=28 28-3=25", "several steps, right"),
        ("7*4=28 28-3=24", "several steps, wrong"),
    ],
)
def test_kinds_of_puzzles_by_hand(explanation: str, kind: str) -> None:
    assert kind_of_puzzle("Make 24 from 2, 2, 6.", explanation) == kind
