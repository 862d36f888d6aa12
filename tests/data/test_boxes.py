"""The last box of a text."""

import pytest

from rlt_jax.data.boxes import final_answer, last_box


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", None),
        ("3", None),
        (r"so \boxed{3}.", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{3} or \boxed{\frac{1}{2}} {so}", r"\frac{1}{2}"),
        (r"{\boxed {x_{1}}}", "x_{1}"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{1 \boxed{2} 3}", "2"),
        (r"} \boxed{3}", "3"),
        (r"{ \boxed{1 { \boxed{3}", "3"),
        (r"\boxed{3} \boxed{4", None),
        (r"\boxed{3 \}", None),
        (r"\boxed3", None),
        (r"\boxes{3}", None),
    ],
)
def test_braces_are_counted(text: str, content: str | None) -> None:
    assert last_box(text) == content


def test_long_texts_take_no_longer() -> None:
    assert last_box(r"\boxed{" * 100_000) is None
    assert last_box(r"\boxed{" * 100_000 + "}" * 100_000) == ""
    assert final_answer("#" * 10**6 + " x") == "x"
    assert final_answer("1," + "111," * 10**6 + "x") is None
    assert final_answer("x " * 10**6 + "#### 5") == "5"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so 3, \boxed{4}. 5", "4"),
        ("6*7 = 42", "42"),
        ("It is 42.", "42"),
        ("It costs $1,234.50.", "1234.50"),
        ("That is -7 **", "-7"),
        ("in all 35%.", "35"),
        ("steps #### 1,200", "1200"),
        ("steps\n#### x+1", "x+1"),
        ("12 eggs", None),
        ("see v1.2b3", None),
        ("", None),
    ],
)
def test_the_answer_that_a_solution_ends_with(solution: str, answer: str) -> None:
    assert final_answer(solution) == answer
