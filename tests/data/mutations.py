"""Values and files as damage and malice leave them, for tests with generated inputs."""

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rlt_jax.errors import UserError

JUNK = [
    *[None, True, False, 0, 1, -1, 3, 2.5, -0.0, 1e300, float("inf"), float("nan")],
    *[10**6, 2**31, 2**40, 10**30, "", "x", "1", "\ud800", "\0", "é" * 40],
    *[[], {}, [1], ["a"], {"a": 1}, [[[]]], [None], {"content": 5}, [0.5] * 500],
]
# Whole files: not JSON, or not an object.
TEXTS = [
    *["", " ", "{", "[]", "[{}]", "null", "true", "5", '"x"', "NaN", "{'a': 1}"],
    *['{"a": 1} x', "[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}"],
]
# Of a test that is given the number of its examples.
COUNTS = (100, 1000)


def check_settings(examples: int) -> settings:
    """Settings of a test with generated inputs, always the same ones."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def mutated_json(draw: st.DrawFn, value: Any) -> Any:
    """The value with up to three changes: other values, less, or more of them."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        value = _changed(draw, value)
    return value


def _changed(draw: st.DrawFn, value: Any) -> Any:
    places = list(value) if isinstance(value, dict) else []
    if isinstance(value, list):
        places = list(range(len(value)))
    if not places:
        return copy.deepcopy(draw(st.sampled_from(JUNK)))
    place = draw(st.sampled_from(places))
    action = draw(st.sampled_from(["inside"] * 6 + ["remove", "double", "all"]))
    if action == "remove":
        del value[place]
    elif action == "double" and isinstance(value, list):
        value.insert(place, copy.deepcopy(value[place]))
    elif action == "all" and draw(st.booleans()):
        return copy.deepcopy(draw(st.sampled_from(JUNK)))
    else:
        value[place] = _changed(draw, value[place])
    return value


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes, whole: int = 8) -> bytes:
    """The bytes cut short, with other ones inside, or without some; or random ones.

    Half of the changes are in the first `whole` bytes.
    """
    kind = draw(st.sampled_from(["change"] * 4 + ["cut", "remove", "insert", "random"]))
    if kind == "random":
        return draw(st.binary(max_size=200))
    end = draw(st.sampled_from([whole, len(data) - 1]))
    place, some = draw(st.integers(0, end)), draw(st.binary(min_size=1, max_size=9))
    if kind == "cut":
        return data[:place]
    removed = {"change": len(some), "insert": 0, "remove": draw(st.integers(1, 40))}
    inserted = b"" if kind == "remove" else some
    return data[:place] + inserted + data[place + removed[kind] :]


def message_of(function: Callable[[], Any], *names: str) -> str:
    """The message of a UserError, "" if there is none; other errors are raised.

    It is a few lines at most, and has one of the names.
    """
    try:
        function()
    except UserError as error:
        message = str(error)
        assert message.count("\n") < 4 and len(message) < 1200, message
        assert any(name in message for name in names), message
        return message
    return ""
