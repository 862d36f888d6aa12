"""Controls and selection."""

import pytest

from rlt_jax.data.controls import controlled, copied_share
from rlt_jax.data.selection import Candidate, SelectionConfig, select
from rlt_jax.errors import UserError


def test_controls_replace_the_explanation_and_close_it() -> None:
    completions = ["a b c d e f</e>after", "x y"]
    found = controlled(completions, ["p", "q"], "</e>", seed=0)
    assert found["empty"] == ["</e>", "</e>"]
    assert found["other"] == ["x y</e>", "a b c d e f</e>"]
    shuffled = found["shuffled"][0]
    assert shuffled is not None
    assert shuffled.endswith("</e>")
    assert sorted(shuffled.removesuffix("</e>").split()) == list("abcdef")
    assert shuffled != "a b c d e f</e>"


def test_there_may_be_no_other_question() -> None:
    assert controlled(["a", "b"], ["p", "p"], "</e>", 0)["other"] == [None, None]


@pytest.mark.parametrize(
    ("explanation", "solution", "share"),
    [
        ("so it is 42", " 42 ", 1.0),
        ("nothing", "42", 0.0),
        ("", "", 0.0),
        ("0123456789abcdef", "0123456789abcdefghij????????????????????", 16 / 40),
        ("short ab", "ab and some more text", 0.0),
    ],
)
def test_copied_share(explanation: str, solution: str, share: float) -> None:
    assert copied_share(explanation, solution) == pytest.approx(share)


CANDIDATES = [
    Candidate("p", 0.1, 10),
    Candidate("p", 0.3, 50),
    Candidate("q", 0.2, 20),
    Candidate("q", 0.2, 20),
    Candidate("q", -1.0, 5),
]


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (SelectionConfig(), [0, 1, 2, 3, 4]),
        (SelectionConfig(max_tokens=20), [0, 2, 3, 4]),
        (SelectionConfig(best_per_question=1), [1, 2]),
        (SelectionConfig(top_fraction=0.4), [1, 2]),
        (SelectionConfig(max_tokens=20, best_per_question=1), [0, 2]),
        (SelectionConfig(best_per_question=2, top_fraction=0.5), [1, 2]),
    ],
)
def test_selection(config: SelectionConfig, kept: list[int]) -> None:
    assert select(config, CANDIDATES) == kept


def test_selection_of_nothing() -> None:
    assert select(SelectionConfig(max_tokens=1), CANDIDATES) == []
    with pytest.raises(UserError, match="top_fraction"):
        SelectionConfig(top_fraction=0.0)
