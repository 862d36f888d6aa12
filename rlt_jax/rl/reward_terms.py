"""The reward as a sum of weighted, named terms, each its own metric.

A term is a pure function of what was written and of its own settings; it gives [N]
numbers, larger for better, NumPy on the host or an array of the device.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlt_jax.data.controls import copied_share
from rlt_jax.data.templates import Problem
from rlt_jax.errors import UserError
from rlt_jax.rl.grading import grade
from rlt_jax.settings import load_function
from rlt_jax.training import hosts
from rlt_jax.types import Reward


class Written(NamedTuple):
    """N completions as the host sees them.

    Attributes:
      problems: what each answers or explains.
      texts: decoded, without stop token.
      completions: ids, [t] int32 each, stop token included.
      answers: the solution that each text gives, None where there is none to read.
      finished: [N] bool, False where a completion was cut off.
      scored: the RLT reward, None where no student scores.
    """

    problems: Sequence[Problem]
    texts: Sequence[str]
    completions: Sequence[np.ndarray]
    answers: Sequence[str | None]
    finished: np.ndarray
    scored: Reward | None = None


def rlt(written: Written) -> jax.Array:
    """The reward of a reinforced teacher, as `scorer.score` gave it."""
    return written.scored.value


def correctness(
    written: Written, right: float = 1.0, wrong: float = -0.5, unreadable: float = -1.0
) -> np.ndarray:
    """Graded answers; the defaults are those of the published baseline."""

    correct = [v.correct for v in grade(written.problems, written.answers)]
    missing = [answer is None for answer in written.answers]
    return np.where(missing, unreadable, np.where(correct, right, wrong))


def length(written: Written, budget: int) -> np.ndarray:
    """Minus the tokens beyond a budget, stop token included."""
    lengths = np.array([len(ids) for ids in written.completions])
    return -np.maximum(lengths - budget, 0)


def copy(written: Written) -> np.ndarray:
    """Minus the share of the solution's characters that the text repeats."""
    pairs = zip(written.problems, written.texts, strict=True)
    return -np.array([copied_share(text, p.solution) for p, text in pairs])


def truncated(written: Written) -> np.ndarray:
    """-1 for a completion that was cut off."""
    return np.where(written.finished, 0.0, -1.0)


TERMS: dict[str, Callable[..., Any]] = {
    "rlt": rlt,
    "correctness": correctness,
    "length": length,
    "copy": copy,
    "truncated": truncated,
}


@dataclasses.dataclass(frozen=True)
class Term:
    """A weighted term: a function of what was written, its settings bound."""

    name: str
    weight: float
    function: Callable[[Written], Any]


def make_terms(config: Mapping[str, Mapping[str, Any]]) -> tuple[Term, ...]:
    """The terms of a reward, such as {"rlt": {}, "length": {"budget": 90, "weight": 2}}.

    Args:
      config: name -> settings, among them `weight`, 1 by default. The name is one of
        `TERMS`, or any other with a `function` of the user's, "module:function", that
        makes [N] numbers of problems, texts and completions (see `Written`).

    Raises:
      UserError: unknown names, functions or settings.
    """
    terms = []
    for name, entry in config.items():
        settings = {"weight": 1.0, **entry}
        weight = settings.pop("weight")
        if name not in TERMS and "function" not in settings:
            raise UserError(
                f"reward term {name!r}: one of {', '.join(TERMS)}; or name a function "
                'of your own, function="module:function".'
            )
        function = TERMS.get(name) or _user_function(settings.pop("function"))
        try:
            inspect.signature(function).bind(None, **settings)
        except TypeError as error:
            raise UserError(f"reward term {name!r}: {error}.") from error
        terms.append(Term(name, weight, functools.partial(function, **settings)))
    return tuple(terms)


def total_reward(terms: Sequence[Term], written: Written) -> Reward:
    """The reward of N completions; the terms of the RLT reward are among its own."""
    parts = {} if written.scored is None else written.scored.terms
    values = {term.name: _value(term, written) for term in terms}
    return combine_terms(parts | values, {term.name: term.weight for term in terms})


def _value(term: Term, written: Written) -> Any:
    if term.function.func is rlt:
        return term.function(written)
    # On one host for all: a grader's time limit or a user's function may differ.
    values = hosts.from_first(lambda: np.asarray(term.function(written)).tolist())
    return np.array(values)


def combine_terms(values: Mapping[str, Any], weights: Mapping[str, float]) -> Reward:
    """The sum of weight times value; values [N] without a weight are only reported."""
    values = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    return Reward(
        sum(weight * values[name] for name, weight in weights.items()), values
    )


def _user_function(path: str) -> Callable[[Written], np.ndarray]:
    function = load_function(path)

    def checked(written: Written) -> np.ndarray:
        values = np.asarray(function(*written[:3]), np.float32)
        if values.shape != (len(written.texts),) or not np.isfinite(values).all():
            raise UserError(f"{path} must give a finite number each, gave {values!r}.")
        return values

    return checked
