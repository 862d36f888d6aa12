"""Controls and selection."""

import numpy as np
import pytest

from rlt_jax.data.controls import CONTROLS, controlled, copied_share
from rlt_jax.data.selection import Candidate, SelectionConfig, select
from rlt_jax.errors import UserError
from rlt_jax.records import Problem


def test_controls_replace_the_explanation_or_the_solution() -> None:
    completions = ["a b c d e f</e>after", "x y", "z"]
    problems = [Problem("p", "1"), Problem("q", "1"), Problem("r", "2")]
    found = controlled(completions, problems, "</e>", seed=0)
    assert [*found] == [*CONTROLS]
    texts = {name: [text for _, text in pairs] for name, pairs in found.items()}
    assert texts["empty"] == ["</e>", "</e>", "</e>"]
    assert texts["other"] == ["x y</e>", "z</e>", "a b c d e f</e>"]
    assert texts["other_solution"] == ["a b c d e f</e>", "x y</e>", "z</e>"]
    for name in ("empty", "shuffled", "other"):
        assert [problem for problem, _ in found[name]] == problems
    # The first two have the same solution.
    others = [problem for problem, _ in found["other_solution"]]
    assert others == [Problem("p", "2"), Problem("q", "2"), Problem("r", "1")]
    shuffled = texts["shuffled"][0]
    assert shuffled.endswith("</e>")
    assert sorted(shuffled.removesuffix("</e>").split()) == list("abcdef")
    assert shuffled != "a b c d e f</e>"


def test_there_may_be_no_other_question_or_solution() -> None:
    def names(*problems: Problem) -> set[str]:
        return {*controlled(["a", "b"], problems, "</e>", 0)}

    assert names(Problem("p", "1"), Problem("p", "2")) == {"empty", "shuffled"}
    alike = names(Problem("p", "1"), Problem("q", "1"))
    assert alike == {"empty", "shuffled", "other"}


@pytest.mark.parametrize(
    ("explanation", "solution", "share"),
    [
        ("so it is 42", " 42 ", 1.0),
        ("nothing", "42", 0.0),
        ("", "", 0.0),
        ("0123456789abcdef", "0123456789abcdefghij????????????????????", 16 / 40),
        ("short ab", "ab and some more text", 0.0),
        # Eleven characters are no match, twelve are.
        ("0123456789a", "0123456789a?", 0.0),
        ("0123456789ab", "??0123456789ab?", 12 / 15),
        # Two pieces in another order, one of them twice.
        ("abcdefghijkl mnopqrstuvwx", "mnopqrstuvwx, abcdefghijkl.", 24 / 27),
        ("abcdefghijkl", "abcdefghijkl abcdefghijkl", 24 / 25),
        # Pieces that overlap count each character once.
        ("abcdefghijklm bcdefghijklmn", "abcdefghijklmn??", 14 / 16),
        ("a" * 20, "a" * 30, 1.0),
    ],
)
def test_copied_share(explanation: str, solution: str, share: float) -> None:
    assert copied_share(explanation, solution) == pytest.approx(share)


def test_copied_share_of_a_book() -> None:
    """Two million characters: with a quadratic comparison this would not end."""
    rng = np.random.default_rng(0)
    text = rng.integers(ord("a"), ord("z"), 2_000_000, np.uint8).tobytes().decode()
    middle = text[500_000:1_500_000]
    explanation = text[:500_000] + "?" + text[1_500_000:]
    assert copied_share(explanation, text) == pytest.approx(0.5, abs=1e-4)
    assert copied_share(middle, middle[::-1]) < 0.001
    # All of its pieces are alike.
    assert copied_share("a" * 1_000_000, "a" * 2_000_000) == 1.0


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


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (SelectionConfig(), [0, 1, 2, 3, 4]),
        (SelectionConfig(best_per_question=1), [1, 4]),
        (SelectionConfig(best_per_question=2), [0, 1, 3, 4]),
        (SelectionConfig(top_fraction=0.4), [1, 4]),
        (SelectionConfig(top_fraction=0.6), [0, 1, 4]),
        (SelectionConfig(max_tokens=5, best_per_question=1), [0, 3]),
    ],
)
def test_traces_that_are_not_closed_are_chosen_last(
    config: SelectionConfig, kept: list[int]
) -> None:
    """The best rewards are theirs; a question that has no others keeps one of them."""
    candidates = [
        Candidate("p", 5.0, 5, False),
        Candidate("p", 0.1, 9, True),
        Candidate("q", 3.0, 9, False),
        Candidate("q", 4.0, 5, False),
        Candidate("q", -2.0, 9, True),
    ]
    assert select(config, candidates) == kept


def test_selection_of_nothing() -> None:
    assert select(SelectionConfig(max_tokens=1), CANDIDATES) == []
    with pytest.raises(UserError, match="top_fraction"):
        SelectionConfig(top_fraction=0.0)
