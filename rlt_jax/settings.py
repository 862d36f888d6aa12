"""From a section of the config to the dataclass or function that owns its keys."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ml_collections

from rlt_jax.errors import UserError

T = TypeVar("T")


def build(factory: Callable[..., T], values: Mapping[str, Any], where: str) -> T:
    """Calls `factory(**values)`; a key it does not know is an error with its name.

    Args:
      factory: a dataclass or function with named parameters.
      values: the config section.
      where: name of the section, for messages, such as "config.rl.grpo".

    Raises:
      UserError: unknown or missing keys.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    parameters = inspect.signature(factory).parameters
    unknown = sorted(set(values) - set(parameters))
    if unknown:
        raise UserError(
            f"{where}: unknown key {unknown[0]!r}; known are {', '.join(parameters)}."
        )
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in values
    ]
    if missing:
        raise UserError(f"{where}: the key {missing[0]!r} is missing.")
    return factory(**values)
