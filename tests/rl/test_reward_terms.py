"""Terms of the reward: numbers by hand, a user's own function, refused settings."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rlt_jax.rl.reward_terms import (
    Written,
    combine_terms,
    make_terms,
    total_reward,
)

from rlt_jax.data.templates import Problem
from rlt_jax.errors import UserError
from rlt_jax.types import Reward

SOLUTION = "three plus four is seven"
WRITTEN = Written(
    problems=[Problem("3+4?", SOLUTION, "7")] * 3,
    texts=["it is seven", f"well, {SOLUTION}!", "no idea"],
    completions=[np.arange(4), np.arange(9), np.arange(6)],
    answers=["14/2", "8", None],
    finished=np.array([True, True, False]),
)


def values_of(name: str, **settings: Any) -> np.ndarray:
    (term,) = make_terms({name: settings})
    return term.function(WRITTEN)


def test_terms_by_hand() -> None:
    np.testing.assert_array_equal(values_of("correctness"), [1.0, -0.5, -1.0])
    graded = values_of("correctness", right=2, wrong=0, unreadable=-3)
    np.testing.assert_array_equal(graded, [2, 0, -3])
    np.testing.assert_array_equal(values_of("length", budget=5), [0, -4, -1])
    np.testing.assert_array_equal(values_of("copy"), [0, -1, 0])
    np.testing.assert_array_equal(values_of("truncated"), [0, 0, -1])


def test_the_total_of_host_and_device_terms() -> None:
    scored = Reward(jnp.array([1.0, 2.0, 3.0]), {"solution_score": jnp.arange(3.0)})
    terms = make_terms({"rlt": {"weight": 2.0}, "truncated": {"weight": 0.5}})
    reward = total_reward(terms, WRITTEN._replace(scored=scored))
    np.testing.assert_allclose(reward.value, [2, 4, 5.5])
    assert set(reward.terms) == {"solution_score", "rlt", "truncated"}
    np.testing.assert_array_equal(reward.terms["truncated"], [0, 0, -1])


def test_the_rlt_term_alone_is_the_rlt_reward() -> None:
    value = jnp.array([-1.7, 0.3, 1e-7], jnp.float32)
    terms = make_terms({"rlt": {}})
    reward = total_reward(terms, WRITTEN._replace(scored=Reward(value, {})))
    np.testing.assert_array_equal(reward.value, value)


def test_values_without_a_weight_are_only_reported() -> None:
    reward = combine_terms({"a": np.array([1.0]), "b": np.array([2.0])}, {"b": -1.0})
    np.testing.assert_array_equal(reward.value, [-2.0])
    assert set(reward.terms) == {"a", "b"}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "rewards_of_mine.py").write_text(
        "def shout(problems, texts, completions):\n"
        "    return [len(t) + len(c) + len(p.solution)\n"
        "            for p, t, c in zip(problems, texts, completions)]\n"
        "def total(problems, texts, completions):\n"
        "    return sum(map(len, texts))\n"
        "def endless(problems, texts, completions):\n"
        "    return [float('inf')] * len(texts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "rewards_of_mine"


def test_a_users_own_function(mine: str) -> None:
    values = values_of("volume", function=f"{mine}:shout")
    np.testing.assert_array_equal(values, [11 + 4 + 24, 31 + 9 + 24, 7 + 6 + 24])
    for wrong in ("total", "endless"):
        with pytest.raises(UserError, match=f"{wrong} must give a finite number each"):
            values_of("volume", function=f"{mine}:{wrong}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lenght": {}}, "'lenght': one of rlt, correctness, length, copy, truncated"),
        ({"length": {}}, "'length': missing a required argument: 'budget'"),
        ({"copy": {"budget": 3}}, "'copy': got an unexpected keyword .*'budget'"),
        (
            {"x": {"function": "no_such_module:f"}},
            "'no_such_module:f' is no .*No module",
        ),
        ({"x": {"function": "math:no_such"}}, "'math:no_such' is no .*no_such"),
        ({"x": {"function": "math"}}, "'math' is not a \"module:function\""),
        ({"x": {"function": "math:exp", "base": 2}}, "'x': got an unexpected .*'base'"),
    ],
)
def test_bad_settings_are_refused(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_terms(config)


def test_a_problem_without_an_answer_cannot_be_graded() -> None:
    (term,) = make_terms({"correctness": {}})
    ungraded = WRITTEN._replace(problems=[Problem("Why?", "Because.")] * 3)
    with pytest.raises(UserError, match="'Why.' has no `answer`"):
        term.function(ungraded)
