"""The one exception for input that the user has to mend."""

from collections.abc import Collection
from typing import Any


class UserError(ValueError):
    """Bad input: the message says what is wrong, where, and how to mend it.

    `main` prints the message without a traceback and exits with status 1.
    """


def check_choice(name: str, value: Any, known: Collection[Any]) -> None:
    """Refuses a setting that is not among the known values."""
    if value not in known:
        raise UserError(f"{name}={value!r}: one of {', '.join(map(str, known))}.")
