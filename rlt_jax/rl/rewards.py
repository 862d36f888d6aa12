"""The reward of a rollout: a sum of weighted, named terms, each its own metric.

A term is a function of a rollout and of its own settings; it returns [E] numbers, larger
for better, NumPy on the host. The RLT reward is the one term that is computed on the
device, from log-probs.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlt_jax.data.controls import copied_share
from rlt_jax.data.templates import Template
from rlt_jax.errors import UserError
from rlt_jax.ranges import NonNegativeInt, Weight, check_value
from rlt_jax.rl.grading import grade
from rlt_jax.settings import bind, load_function
from rlt_jax.training import hosts
from rlt_jax.types import Array, Batch, Reward, Rollout

RLT = "rlt"


def correctness(
    rollout: Rollout,
    template: Template,
    right: Weight = 1.0,
    wrong: Weight = -0.5,
    unreadable: Weight = -1.0,
) -> np.ndarray:
    """Graded answers; the defaults are those of the published baseline."""
    problems = [request.problem for request in rollout.requests]
    answers = [template.solution_of(text) for text in rollout.texts]
    correct = [verdict.correct for verdict in grade(problems, answers)]
    missing = [answer is None for answer in answers]
    return np.where(missing, unreadable, np.where(correct, right, wrong))


def length(rollout: Rollout, template: Template, budget: NonNegativeInt) -> np.ndarray:
    """Minus the tokens beyond a budget, stop token included."""
    return -np.maximum(np.array(list(map(len, rollout.tokens))) - budget, 0)


def copy(rollout: Rollout, template: Template) -> np.ndarray:
    """Minus the fraction of the solution's characters that the text repeats."""
    solutions = [request.problem.solution for request in rollout.requests]
    return -np.array(list(map(copied_share, rollout.texts, solutions)))


def truncated(rollout: Rollout, template: Template) -> np.ndarray:
    """-1 for a completion that was cut off."""
    return np.where(rollout.finished, 0.0, -1.0)


TermFunction = Callable[..., np.ndarray]
_OWN = (correctness, length, copy, truncated)
TERMS: dict[str, TermFunction] = {function.__name__: function for function in _OWN}


# How the names of parts of the RLT reward, and of what a teacher says, begin.
_PARTS = ("solution_", "explanation_", "kl_", "format_", "empty_", "student_")
_PARTS += ("teacher_", "taught_", "clipped_")


class Term(NamedTuple):
    """A weighted term.

    Attributes:
      name: key of the term in the reward and in the metrics.
      weight: factor of the term in the sum.
      function: (rollout, template) -> [E], settings bound; None for the RLT reward.
    """

    name: str
    weight: float
    function: TermFunction | None


class RewardFunction(NamedTuple):
    """How completions are rewarded, fixed for a run.

    Attributes:
      terms: weighted terms.
      template: reads solutions from texts.
      rlt: compiled `rlt_reward.ensemble_reward`: (batch, KL weight) -> reward; None
        without students.
    """

    terms: tuple[Term, ...]
    template: Template
    rlt: Callable[[Batch, Array], Reward] | None = None


def make_terms(config: Mapping[str, Mapping[str, Any]]) -> tuple[Term, ...]:
    """The terms of a reward, such as {"rlt": {}, "length": {"budget": 90, "weight": 2}}.

    Args:
      config: name -> settings, among them `weight`, 1 by default. The name is "rlt", one
        of `TERMS`, or any other with a `function` of the user's, "module:function", that
        takes the problems, texts and token ids of E completions and returns [E] numbers.

    Raises:
      UserError: unknown names, functions or settings.
    """
    check_value("reward_terms", Mapping[str, Mapping[str, Any]], config)
    terms = []
    for name, entry in config.items():
        settings = {"weight": 1.0, **entry}
        where, weight = f"reward term {name!r}", settings.pop("weight")
        check_value(f"{where}: weight", Weight, weight)
        if name in ("value", "reward", "accuracy") or name.startswith(_PARTS):
            raise UserError(f"{where}: a name of results; pick another.")
        if name not in (RLT, *TERMS) and "function" not in settings:
            raise UserError(
                f"{where}: one of {', '.join((RLT, *TERMS))}; or name a "
                'function of your own, function="module:function".'
            )
        if name == RLT and settings:
            raise UserError(f"reward term 'rlt': unknown setting {min(settings)!r}.")
        function = None
        if name != RLT:
            function = TERMS.get(name) or _user_function(settings.pop("function"))
            bind(functools.partial(function, None, None), settings, where)
            function = functools.partial(function, **settings)
        terms.append(Term(name, weight, function))
    return tuple(terms)


def compute(
    reward: RewardFunction, batch: Batch, rollout: Rollout, kl_coef: float = 0.0
) -> Reward:
    """The reward of E completions; the parts of the RLT reward are among its terms.

    Args:
      reward: terms.
      batch: of the rollout, with the log-probs that the RLT reward needs; it may be
        filled up with examples that the rollout lacks.
      rollout: E completions.
      kl_coef: weight of the explanation KL.

    Returns:
      "value" [E] float32, the weighted sum, and every term by its name.
    """
    values: Reward = {}
    if reward.rlt:
        values = reward.rlt(batch, jnp.float32(kl_coef))
        values = {RLT: values["value"]} | values
        E = len(rollout.requests)
        if E < len(values[RLT]):
            values = {name: value[:E] for name, value in values.items()}
    for term in reward.terms:
        if term.function:
            values[term.name] = _on_first_host(term, rollout, reward.template)
    parts = (term.weight * values[term.name] for term in reward.terms)
    values["value"] = sum(parts, np.zeros(len(rollout.requests), np.float32))
    return values


def _on_first_host(term: Term, rollout: Rollout, template: Template) -> np.ndarray:
    """Computed on one host for all: time limits or a user's function may differ."""
    values = hosts.from_first(lambda: term.function(rollout, template).tolist())
    return np.asarray(values, np.float32)


def _user_function(path: str) -> TermFunction:
    function = load_function(path, 3)

    def checked(rollout: Rollout, template: Template) -> np.ndarray:
        problems = [request.problem for request in rollout.requests]
        values = function(problems, rollout.texts, rollout.tokens)
        values = np.asarray(values, np.float32)
        if values.shape != (len(problems),) or not np.isfinite(values).all():
            wanted = "must return a finite number for each completion"
            raise UserError(f"{path} {wanted}, returned {values!r}.")
        return values

    return checked
