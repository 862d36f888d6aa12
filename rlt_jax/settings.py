"""Builds dataclasses and calls functions from sections of the config."""

import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict, config_dict

from rlt_jax.errors import UserError, as_user_error
from rlt_jax.ranges import check_ranges, check_value, hints_of

T = TypeVar("T")
PLAIN = (int, float, str, bool)
Section = Mapping[str, Any]  # settings of one part of a config


def section(owner: type, **values: Any) -> ConfigDict:
    """A config section with all fields of a dataclass, so that all can be overridden.

    Args:
      owner: the dataclass.
      **values: fields without a default, and fields that differ from their default.

    Raises:
      UserError: unknown or missing keys, or a value outside its range.
    """
    config = ConfigDict()
    built = build(owner, values, owner.__name__)
    for field in dataclasses.fields(owner):
        value = getattr(built, field.name)
        if isinstance(value, Mapping):
            value = dict(value)
        elif getattr(field.type, "__origin__", field.type) not in PLAIN:
            # Neither such a type nor one annotated; the command line's flag takes any.
            config[field.name] = config_dict.placeholder(object)
        config[field.name] = value
    return config


class _Derived(config_dict.FieldReference):
    """A value that a function computes once its config is resolved, until it is set."""

    def __init__(self, value: Any, function: Callable[[], Any]) -> None:
        super().__init__(value)
        self.function: Callable[[], Any] | None = function
        self.resolved = False

    def get(self) -> Any:
        """The value."""
        computed = self.resolved and self.function is not None
        return self.function() if computed else super().get()

    def set(self, value: Any, type_safe: bool = True) -> None:
        """Replaces the function by a value."""
        self.function = None
        super().set(value, type_safe)


def link(config: ConfigDict, **values: Callable[[], Any]) -> None:
    """Makes values of a config follow from others, which the command line may set.

    They are computed whenever they are read after `resolve`; one that is set itself is
    kept. The config must not become a part of another afterwards.

    Args:
      config: the section; each value has the type of the one that is in it.
      **values: functions that compute them.
    """
    for name, function in values.items():
        derived = _Derived(config[name], function)
        del config[name]  # it can be a reference, which would keep its place
        config[name] = derived


def resolve(config: ConfigDict) -> None:
    """Lets linked values follow from what is set by now."""
    for value in config.values(preserve_field_references=True):
        if isinstance(value, _Derived):
            value.resolved = True
        elif isinstance(value, ConfigDict):
            resolve(value)


def build(factory: Callable[..., T], values: Mapping[str, Any], where: str) -> T:
    """Calls `factory` with the keys of a config section; see `bind`."""
    return bind(factory, values, where)()


def bind(
    factory: Callable[..., T], values: Mapping[str, Any], where: str
) -> Callable[[], T]:
    """A call of `factory` with the keys of a config section, all that is checked before.

    Args:
      factory: a dataclass, a function whose keyword arguments are the keys, or a function
        of one dataclass whose fields are the keys.
      values: the config section.
      where: name of the section, for messages, such as "config.rl.loop".

    Raises:
      UserError: unknown or missing keys, or a value outside its range.
    """
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    owner = owner_of_keys(factory)
    known = inspect.signature(owner).parameters
    required = [k for k, x in known.items() if x.default is inspect.Parameter.empty]
    _check_keys(values, known, required, where)
    check_ranges(where, owner, values)
    if not dataclasses.is_dataclass(owner):
        return functools.partial(factory, **values)
    with as_user_error(where, TypeError, UserError, end=""):
        made = owner(**values)
    return (lambda: made) if owner is factory else functools.partial(factory, made)


def owner_of_keys(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The dataclass that is the only parameter of a function; otherwise `factory`."""
    hints = list(hints_of(factory).values()) if inspect.isfunction(factory) else []
    if len(hints) == 1 and dataclasses.is_dataclass(hints[0]):
        return hints[0]
    return factory


def load_function(path: str, arguments: int | None = None) -> Callable[..., Any]:
    """Imports a function that a config names as "module:function".

    Args:
      path: the two names.
      arguments: how many it is called with, where that is to be checked.

    Raises:
      UserError: there is no such function, or it does not take the arguments.
    """
    what = f'{path!r} is not a "module:function"'
    with as_user_error(what, ImportError, AttributeError, TypeError, ValueError):
        module, _, name = path.partition(":")
        found = getattr(importlib.import_module(module), name)
        if arguments:
            inspect.signature(found).bind(*range(arguments))
    return found


def check(owner: Any, values: Any, where: str) -> None:
    """Checks all keys of a section before the stage starts.

    Args:
      owner: a dataclass; or a mapping from every key of the section to the owner of its
        value; or a function of a value and its name that checks it; or the type of a value,
        see `ranges.py`; or None for any value. A section that can be None is owned by a
        pair, (owner, None).
      values: the config section, or a value in it.
      where: name of the section, for messages.

    Raises:
      UserError: unknown or missing keys, or invalid values.
    """
    if isinstance(owner, tuple):
        owner = owner[values is None]
    if isinstance(owner, Mapping):
        _check_keys(values, owner, owner, where)
        for name, section_owner in owner.items():
            check(section_owner, values[name], f"{where}.{name}")
    elif dataclasses.is_dataclass(owner):
        build(owner, values, where)
    elif inspect.isfunction(owner):
        owner(values, where)
    elif owner is not None:
        check_value(where, owner, values)


def _check_keys(
    values: Any, known: Collection[str], required: Collection[str], where: str
) -> None:
    check_value(where, Section, values)
    if unknown := sorted(map(str, set(values) - set(known))):
        names = f"known keys: {', '.join(known)}" if known else "it takes none"
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{where}: unknown key {unknown[0]!r}{meant}; {names}.")
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{where}: the key {missing[0]!r} is missing.")
