"""Terms of the reward: numbers by hand, a user's own function, refused settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.data.templates import Template
from rlt_jax.errors import UserError
from rlt_jax.records import Problem
from rlt_jax.rl.rewards import RewardFunction, compute, make_terms
from rlt_jax.types import Batch, Request, Reward, Rollout

SOLUTION = "three plus four is seven"
NO_BATCH = Batch(None, None, None, None)  # terms of the host do not read it


def rollout_of(problem: Problem, texts: list[str]) -> Rollout:
    """Completions of 4, 9 and 6 tokens, the last of which was cut off."""
    tokens = [np.arange(n) for n in (4, 9, 6)]
    return Rollout(
        requests=[Request(np.arange(2), n, 9, problem) for n in range(3)],
        tokens=tokens,
        log_probs=[np.zeros(len(ids), np.float32) for ids in tokens],
        finished=np.array([True, True, False]),
        texts=texts,
    )


PROBLEM = Problem("3+4?", SOLUTION, "7")
ROLLOUT = rollout_of(PROBLEM, ["it is seven", f"well, {SOLUTION}!", "no idea"])


@pytest.fixture
def values_of(rlt: Template) -> Callable[..., np.ndarray]:
    def values(name: str, rollout: Rollout = ROLLOUT, **settings: Any) -> np.ndarray:
        """The values of a single term."""
        (term,) = make_terms({name: settings})
        return term.function(rollout, rlt)

    return values


def test_terms_by_hand(values_of: Callable[..., np.ndarray], rlt: Template) -> None:
    opening, closing = rlt.solution_tags
    solutions = [f"hm {opening}{text}{closing}" for text in ("14/2", "8")]
    answered = rollout_of(PROBLEM, [*solutions, "no idea"])
    graded = values_of("correctness", answered)
    np.testing.assert_array_equal(graded, [1.0, -0.5, -1.0])
    graded = values_of("correctness", answered, right=2, wrong=0, unreadable=-3)
    np.testing.assert_array_equal(graded, [2, 0, -3])
    np.testing.assert_array_equal(values_of("length", budget=5), [0, -4, -1])
    np.testing.assert_array_equal(values_of("copy"), [0, -1, 0])
    np.testing.assert_array_equal(values_of("truncated"), [0, 0, -1])


def compute_with(
    terms: dict[str, Any], rlt_reward: Reward, template: Template, kl_coef: float = 0.0
) -> Reward:
    """The reward of `ROLLOUT`, for which the RLT reward is given."""

    def rlt(batch: Batch, coef: Any) -> Reward:
        assert batch is NO_BATCH
        return rlt_reward | {"coef": jnp.full(3, coef)}

    function = RewardFunction(make_terms(terms), template, rlt)
    return compute(function, NO_BATCH, ROLLOUT, kl_coef)


def test_the_sum_of_host_and_device_terms(rlt: Template) -> None:
    scored = {"value": jnp.array([1.0, 2.0, 3.0]), "solution_score": jnp.arange(3.0)}
    terms = {"rlt": {"weight": 2.0}, "truncated": {"weight": 0.5}}
    reward = compute_with(terms, scored, rlt, kl_coef=7.0)
    np.testing.assert_allclose(reward["value"], [2, 4, 5.5])
    assert set(reward) == {"value", "rlt", "solution_score", "coef", "truncated"}
    np.testing.assert_array_equal(reward["truncated"], [0, 0, -1])
    np.testing.assert_array_equal(reward["rlt"], scored["value"])
    # The parts of the RLT reward are reported, and not added again.
    np.testing.assert_array_equal(reward["solution_score"], [0, 1, 2])
    np.testing.assert_array_equal(reward["coef"], 7.0)


def test_the_rlt_term_alone_is_the_rlt_reward(rlt: Template) -> None:
    value = jnp.array([-1.7, 0.3, 1e-7], jnp.float32)
    reward = compute_with({"rlt": {}}, {"value": value}, rlt)
    np.testing.assert_array_equal(reward["value"], value)


def test_without_students_the_host_terms_are_all_there_is(rlt: Template) -> None:
    function = RewardFunction(make_terms({"length": {"budget": 5}}), rlt)
    reward = compute(function, NO_BATCH, ROLLOUT)
    assert set(reward) == {"value", "length"}
    for values in reward.values():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, [0, -4, -1])


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


def test_a_users_own_function(mine: str, values_of: Callable[..., np.ndarray]) -> None:
    values = values_of("volume", function=f"{mine}:shout")
    np.testing.assert_array_equal(values, [11 + 4 + 24, 31 + 9 + 24, 7 + 6 + 24])
    for wrong in ("total", "endless"):
        message = f"{wrong} must return a finite number for each completion"
        with pytest.raises(UserError, match=message):
            values_of("volume", function=f"{mine}:{wrong}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lenght": {}}, "'lenght': one of rlt, correctness, length, copy, truncated"),
        ({"length": {}}, "'length': the key 'budget' is missing"),
        ({"copy": {"budget": 3}}, "'copy': unknown key 'budget'; it takes none"),
        ({"rlt": {"budget": 3}}, "'rlt': unknown setting 'budget'"),
        ({"reward": {"function": "math:exp"}}, "'reward': a name of results; pick"),
        ({"accuracy": {"function": "math:exp"}}, "'accuracy': a name of results"),
        ({"value": {"function": "math:exp"}}, "'value': a name of results; pick"),
        (
            {"x": {"function": "no_such_module:f"}},
            "'no_such_module:f' is not a .*No module",
        ),
        ({"x": {"function": "math:no_such"}}, "'math:no_such' is not a .*no_such"),
        ({"x": {"function": "math"}}, "'math' is not a \"module:function\""),
        ({"x": {"function": 5}}, "5 is not a .* no attribute 'partition'"),
        ({"x": {"function": "math:pi"}}, "'math:pi' is not a .* not a callable"),
        (
            {"x": {"function": "math:exp"}},
            "'math:exp' is not a .*: too many positional",
        ),
        ({"x": {"function": ".x:y"}}, "'.x:y' is not a \"module:function\""),
        ({"kl_mean": {"function": "builtins:pow"}}, "'kl_mean': a name of results"),
        ({"solution_score": {"function": "builtins:pow"}}, "a name of results; pick"),
        (
            {"x": {"function": "builtins:pow", "base": 2}},
            "'x': unknown key 'base'; it takes none",
        ),
    ],
)
def test_bad_settings_are_refused(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_terms(config)


def test_a_problem_without_an_answer_cannot_be_graded(
    values_of: Callable[..., np.ndarray],
) -> None:
    ungraded = rollout_of(Problem("Why?", "Because."), list(ROLLOUT.texts))
    with pytest.raises(UserError, match="'Why.' has no `answer`"):
        values_of("correctness", ungraded)
