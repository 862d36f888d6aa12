"""Which sequences a student is trained on: overlong ones, several of a question."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from rlt_jax.data.examples import Example, Span
from rlt_jax.data.selection import (
    OVERLONG,
    SelectionConfig,
    choose,
    fit_examples,
)
from rlt_jax.errors import UserError

LIMIT = 4
# Question -> lengths of its sequences; "b" has one that fits, "c" none.
LENGTHS = {"a": (2, 3, 4), "b": (5, 4, 6), "c": (5, 7), "d": (1,)}
QUESTIONS = [question for question, lengths in LENGTHS.items() for _ in lengths]
EXAMPLES = [
    Example(
        np.full(length, number, np.int32),
        np.arange(length) > 0,
        Span(1, length, np.zeros((length - 1, 2), np.int32)),
        Span(1, 1, np.zeros((0, 2), np.int32)),
    )
    for number, length in enumerate(n for several in LENGTHS.values() for n in several)
]


def fit(
    overlong: str, per_question: int = 0, seed: int = 0, **change: Any
) -> tuple[list[Example], dict[str, int]]:
    given = {"made": EXAMPLES, "questions": QUESTIONS, "limit": LIMIT} | change
    return fit_examples(
        overlong=overlong, per_question=per_question, seed=seed, what="it", **given
    )


def numbers(made: list[Example]) -> list[int]:
    """Places of the sequences in `EXAMPLES`."""
    return [int(one.tokens[0]) for one in made]


def per_question(made: list[Example]) -> Counter[str]:
    return Counter(QUESTIONS[number] for number in numbers(made))


def test_sequences_that_are_too_long_are_an_error() -> None:
    message = r"^it: sequence 3 has 5 tokens, the limit is 4 \(4 of 9 sequences"
    with pytest.raises(UserError, match=message):
        fit("error")
    made, counts = fit("error", limit=7)
    assert made == EXAMPLES
    assert counts == dict.fromkeys(counts, 0) | {"read": 9, "used": 9}


def test_sequences_that_are_too_long_are_dropped() -> None:
    made, counts = fit("drop")
    assert numbers(made) == [0, 1, 2, 4, 8]
    assert counts == dict.fromkeys(counts, 0) | {"read": 9, "used": 5, "dropped": 4}


def test_shorter_sequences_of_the_same_question_replace_long_ones() -> None:
    made, counts = fit("shorter")
    assert numbers(made) == [0, 1, 2, 4, 4, 4, 8]
    some = {"read": 9, "used": 7, "dropped": 2, "replaced": 2}
    assert counts == dict.fromkeys(counts, 0) | some


def test_long_sequences_are_cut_and_lose_their_spans() -> None:
    made, counts = fit("truncate")
    # Sequence 8 has one token, and nothing to learn.
    assert numbers(made) == list(range(8))
    assert [len(one.tokens) for one in made] == [2, 3, 4, 4, 4, 4, 4, 4]
    assert [len(one.loss_mask) for one in made] == [2, 3, 4, 4, 4, 4, 4, 4]
    assert [one.explanation.end for one in made] == [2, 3, 4, 0, 4, 0, 0, 0]
    some = {"read": 9, "used": 8, "dropped": 1, "truncated": 4}
    assert counts == dict.fromkeys(counts, 0) | some


def test_a_sequence_cut_before_its_first_learned_token_is_dropped() -> None:
    late = EXAMPLES[7]._replace(loss_mask=np.arange(7) >= LIMIT)
    made, counts = fit("truncate", made=[*EXAMPLES[:3], late], questions=list("aaac"))
    assert numbers(made) == [0, 1, 2]
    assert counts["dropped"] == 1 and counts["truncated"] == 0


@pytest.mark.parametrize("overlong", ["drop", "shorter"])
@pytest.mark.parametrize("seed", range(4))
def test_some_of_each_question_are_chosen_among_those_that_fit(
    overlong: str, seed: int
) -> None:
    made, _ = fit(overlong, 1, seed)
    assert per_question(made) == {"a": 1, "b": 1, "d": 1}
    assert all(len(one.tokens) <= LIMIT for one in made)
    made, _ = fit(overlong, 2, seed)
    assert per_question(made) == {"a": 2, "b": 1 + (overlong == "shorter"), "d": 1}
    assert len(set(numbers(made))) == 4


def test_the_seed_chooses() -> None:
    chosen = [numbers(fit("drop", 1, seed)[0]) for seed in (*range(9), 0)]
    assert chosen[0] == chosen[-1]
    assert {some[0] for some in chosen} == {0, 1, 2}


@pytest.mark.parametrize("overlong", OVERLONG)
@pytest.mark.parametrize("per_question", [0, 1, 2, 5])
def test_every_trace_is_accounted_for(overlong: str, per_question: int) -> None:
    limit = 7 if overlong == "error" else LIMIT
    for seed in range(3):
        made, counts = fit(overlong, per_question, seed, limit=limit)
        assert counts["used"] == len(made)
        assert counts["read"] == len(EXAMPLES)
        left_out = counts["dropped"] + counts["surplus"]
        assert counts["used"] + left_out == counts["read"]
        cut = [one for one in made if one.explanation.end == 0]
        assert counts["truncated"] == len(cut)


def test_replaced_traces_are_those_whose_turn_it_was() -> None:
    replaced = 0
    for seed in range(20):
        chosen, counts = choose("aa", [True, False], 1, True, seed)
        assert chosen == [0] and counts["surplus"] == 1
        replaced += counts["replaced"]
    assert 0 < replaced < 20


@pytest.mark.parametrize("overlong", ["drop", "shorter", "truncate"])
def test_no_trace_left_is_an_error(overlong: str) -> None:
    limit = 1 if overlong == "truncate" else 0
    with pytest.raises(
        UserError, match=f"^it: none of 9 .*overlong='{overlong}'.*{limit}"
    ):
        fit(overlong, limit=limit)


def test_negative_numbers_are_refused() -> None:
    for name in ("max_tokens", "best_per_question"):
        with pytest.raises(UserError, match=f"SelectionConfig.{name}=-1: at least 0"):
            SelectionConfig(**{name: -1})
