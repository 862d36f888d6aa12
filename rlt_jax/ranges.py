"""Ranges of settings, written as types of fields, and the check of values against them.

    steps: PositiveInt
    schedule: Annotated[str, OneOf(SCHEDULES)] = "constant"
    b1: Annotated[float, Range(0, 1, below=True)] = 0.9
    clip: PositiveFloat | None = None
    head_dim: Annotated[int, Range(1, 4096), Condition("even", lambda x: x % 2 == 0)]

`settings.build` checks every section of a config, a `Checked` dataclass also checks itself.
Upper ends are generous: beyond what any model or machine of today needs.
"""

import dataclasses
import functools
import inspect
import re
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from ml_collections import ConfigDict

from rlt_jax.errors import UserError

INT32, FLOAT32 = 2**31 - 1, 3.4e38  # the largest ones


class Range(NamedTuple):
    """The numbers of an interval.

    Attributes:
      least: its lower end.
      most: its upper end; infinite where infinity is a value, too.
      above: whether the lower end is left out.
      below: whether the upper end is left out.
    """

    least: float
    most: float = FLOAT32
    above: bool = False
    below: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a number is in the interval; NaN never is."""
        low = self.least < value if self.above else self.least <= value
        return low and (value < self.most if self.below else value <= self.most)

    def allowed(self, value: Any) -> str:
        """The interval as text; the limit of 32 bits only where a number passes it."""
        low = f"{'above' if self.above else 'at least'} {self.least}"
        high = f"{'below' if self.below else 'at most'} {self.most}"
        too_large = isinstance(value, Real) and not value <= self.most
        return f"{low}, {high}" if too_large or self.most < INT32 else low


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """The values of a collection, which may grow later."""

    known: Collection[Any]

    def holds(self, value: Any) -> bool:
        """Whether the collection has a value."""
        return value in self.known

    def allowed(self, value: Any) -> str:
        """The collection as text."""
        return f"one of {', '.join(map(str, self.known))}"


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
    """The values for which `holds` is true, in words; it is given those of the type."""

    words: str
    holds: Callable[[Any], Any]

    def allowed(self, value: Any) -> str:
        """The words."""
        return self.words


NOT_EMPTY = Condition("not empty", bool)
PositiveInt = Annotated[int, Range(1, INT32)]
NonNegativeInt = Annotated[int, Range(0, INT32)]
Count = Annotated[int, Range(1, 2**16)]  # of rows, completions and the like at once
Size = Annotated[int, Range(1, 2**20)]  # of an axis of a model, or of a sequence
Limit = PositiveInt | None  # None for none
PositiveFloat = Annotated[float, Range(1e-6, 10**6)]  # a divisor, also in float32
NonNegativeFloat = Annotated[float, Range(0, 10**6)]
Fraction = Annotated[float, Range(0, 1)]
Amount = Annotated[int, Range(0, 10**7)]  # of problems to make; more would take hours
Split = Annotated[str, OneOf(("train", "test"))]
Weight = Annotated[float, Range(-(10**6), 10**6)]
# 0 is greedy; less than the least would be 0 in float32, or nearly.
_TEMPERATURES = Condition("0, or 0.001 to 1000", lambda x: not x or 1e-3 <= x <= 1e3)
Temperature = Annotated[float, _TEMPERATURES]
# The first step, and the one after the last; () for none.
_SPAN = Condition("(first, end)", lambda x: len(x) in (0, 2) and [*x] == sorted({*x}))
Steps = Annotated[Sequence[NonNegativeInt], _SPAN]
SHARES = Condition("numbers that sum to 1", lambda x: round(sum(x.values()), 8) == 1)

# Type -> its name in messages, and the values that fit; True and False are no numbers.
_KINDS: dict[Any, tuple[str, type]] = {
    int: ("a whole number", Integral),
    float: ("a number", Real),
    bool: ("True or False", bool),
    str: ("a text", str),
    NoneType: ("None", NoneType),
}


class Checked:
    """Base of a dataclass that checks its values, before its own `__post_init__` does.

    Lists, the only sequences of JSON, become tuples: a config has to be hashable.
    """

    def __post_init__(self) -> None:
        check_ranges(type(self).__name__, type(self), vars(self))
        for name, value in vars(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))


def check_ranges(where: str, owner: Any, values: Mapping[str, Any]) -> None:
    """Checks values against the types of a dataclass's fields or a function's arguments.

    Args:
      where: name of the section, for messages.
      owner: the dataclass or function.
      values: some or all of them, by name; others are not looked at.

    Raises:
      UserError: a value of another type, or outside its range.
    """
    dotted = "." if re.fullmatch(r"[\w.\[\]]+", where) else ": "
    for name, hint in hints_of(owner).items():
        if name in values:
            check_value(f"{where}{dotted}{name}", hint, values[name])


def check_value(key: str, hint: Any, value: Any) -> None:
    """Checks one value; see `check_ranges`."""
    if wrong := _mismatch(hint, value):
        raise UserError(f"{key}={' '.join(reprlib.repr(value).split())}: {wrong}.")


@functools.cache
def hints_of(owner: Callable[..., Any]) -> dict[str, Any]:
    """The types of a dataclass's fields or a function's arguments, by name."""
    parameters = inspect.signature(owner).parameters
    return {name: parameter.annotation for name, parameter in parameters.items()}


def _mismatch(hint: Any, value: Any) -> str:
    """What a value would have to be to fit a type; "" if it does, or for other types."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        wrong = _mismatch(args[0], value)
        rules = [x for x in args[1:] if isinstance(x, Range | OneOf | Condition)]
        fits = not wrong and all(rule.holds(value) for rule in rules)
        said = [wrong, *(rule.allowed(value) for rule in rules)]
        return "" if fits else ", ".join(filter(None, said))
    if kind in (Union, UnionType):
        wrong = [_mismatch(one, value) for one in args]
        return ", or ".join(wrong) if all(wrong) else ""
    if kind in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return "a list"
        if not args:  # of anything
            return ""
        is_fixed = kind is tuple and args and args[-1] is not ...
        hints = args if is_fixed else (args[:1] or (Any,)) * len(value)
        if len(hints) != len(value):
            return f"a list of {len(hints)}"
        wrong = next(filter(None, map(_mismatch, hints, value)), "")
        return wrong and f"a list, each {wrong}"
    if kind in (dict, Mapping):
        if not isinstance(value, Mapping | ConfigDict):
            return "keys and values"
        pairs = [x for item in value.items() for x in zip(args, item)]
        wrong = next(filter(None, (_mismatch(*pair) for pair in pairs)), "")
        return wrong and f"keys and values, each {wrong}"
    if isinstance(kind, type) and issubclass(kind, Checked):
        return "" if isinstance(value, kind) else f"a {kind.__name__}"
    text, wanted = _KINDS.get(kind, ("", object))
    fits = isinstance(value, wanted) and isinstance(value, bool) <= (kind is bool)
    return "" if fits else text
