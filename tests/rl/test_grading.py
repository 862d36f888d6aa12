"""Verdicts on answers as students write them."""

import pytest

from rlt_jax.rl.grading import is_correct


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("7", "7"),
        (" 7\n", "7"),
        ("some words", "some words"),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\boxed{\frac{3}{6}}", "0.5"),
        (r"So the answer is \boxed{42}.", "42"),
        (r"First \boxed{3}, but no: \boxed{4}", "4"),
        (r"\boxed{x+1}", "1+x"),
        ("1,000", "1000"),
        ("It is 7.", "7"),
    ],
)
def test_right_answers_in_other_words(prediction: str, answer: str) -> None:
    assert is_correct(prediction, answer)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        (None, "7"),
        (None, ""),
        ("", "7"),
        ("8", "7"),
        ("-7", "7"),
        ("70", "7"),
        ("0.333", "1/3"),
        (r"First \boxed{4}, but no: \boxed{3}", "4"),
        (r"The known 7 gives \boxed{8}", "7"),
        (r"\boxed{", "7"),
        ("{}{$$", "7"),
        ("other words", "some words"),
    ],
)
def test_wrong_or_missing_answers(prediction: str | None, answer: str) -> None:
    assert not is_correct(prediction, answer)
