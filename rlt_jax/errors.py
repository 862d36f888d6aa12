"""The exception for input that the user has to fix."""

from collections.abc import Collection
from typing import Any


class UserError(ValueError):
    """Invalid input: the message says what is wrong, where, and how to fix it.

    `main` prints the message without a traceback and exits with status 1.
    """


def check_choice(name: str, value: Any, known: Collection[Any]) -> None:
    """Raises UserError if a setting is not one of the known values."""
    if value not in known:
        raise UserError(f"{name}={value!r}: one of {', '.join(map(str, known))}.")


def check_minima(where: str, settings: Any, **minima: int) -> None:
    """Raises UserError if an attribute of a section is below its minimum."""
    for name, least in minima.items():
        if (value := getattr(settings, name)) < least:
            raise UserError(f"{where}.{name}={value}: at least {least}.")
