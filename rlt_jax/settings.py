"""From a section of the config to the dataclass or function that owns its keys."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from rlt_jax.errors import UserError

T = TypeVar("T")


def section(owner: type, **values: Any) -> ml_collections.ConfigDict:
    """A config section with all settings of a dataclass, so that all can be overridden.

    Args:
      owner: the dataclass.
      **values: where the section differs from its defaults, and what has none.

    Raises:
      UserError: unknown or missing keys.
    """
    config = ml_collections.ConfigDict()
    built = build(owner, values, owner.__name__)
    for field in dataclasses.fields(owner):
        value = getattr(built, field.name)
        if isinstance(value, Mapping):
            value = dict(value)
        elif field.type not in (int, float, str, bool):
            # Several types, or none: the owner checks what is given.
            config[field.name] = config_dict.placeholder(object)
        config[field.name] = value
    return config


def build(factory: Callable[..., T], values: Mapping[str, Any], where: str) -> T:
    """Calls `factory(**values)`; a key it does not know is an error with its name.

    Args:
      factory: a dataclass or function with named parameters.
      values: the config section.
      where: name of the section, for messages, such as "config.rl.loop".

    Raises:
      UserError: unknown or missing keys.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    known = inspect.signature(factory).parameters
    required = [k for k, x in known.items() if x.default is inspect.Parameter.empty]
    _check_keys(values, known, required, where)
    return factory(**values)


def load_function(path: str) -> Callable[..., Any]:
    """A function that a config names as "module:function".

    Raises:
      UserError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f'{path!r} is no "module:function": {error}.') from error


def check(owner: Any, values: Any, where: str) -> None:
    """Checks all keys of a section before anything is done with them.

    Args:
      owner: what `build` takes; or a mapping from every key of the section to the owner
        of its value; or None for a value that is checked by its reader.
      values: the config section, or a value in it.
      where: name of the section, for messages.

    Raises:
      UserError: unknown or missing keys, or values that their owner refuses.
    """
    if isinstance(owner, Mapping):
        _check_keys(values, owner, owner, where)
        for name, part in owner.items():
            check(part, values[name], f"{where}.{name}")
    elif owner is not None:
        build(owner, values, where)


def _check_keys(
    values: Any, known: Collection[str], required: Collection[str], where: str
) -> None:
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is {values!r}; give it as keys and values.")
    if unknown := sorted(set(values) - set(known)):
        names = ", ".join(known)
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {names}.")
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{where}: the key {missing[0]!r} is missing.")
