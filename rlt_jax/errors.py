"""What users are told: the log, and the exception for input that they have to fix."""

import contextlib
import logging
import sys
from collections.abc import Iterator

LOG = logging.getLogger("rlt_jax")


def tell(message: str) -> None:
    """Prints a message of the program to standard error at once."""
    print(f"rlt_jax: {message}", file=sys.stderr, flush=True)


class UserError(ValueError):
    """Invalid input: the message says what is wrong, where, and how to fix it.

    `main` prints the message without a traceback and exits with status 1.
    """


class StorageError(Exception):
    """A file cannot be written, for a reason that passes: the same command goes on later.

    `main` prints the message without a traceback and exits with status 75.
    """


@contextlib.contextmanager
def as_user_error(what: str, *kinds: type[Exception], end: str = ".") -> Iterator[None]:
    """Raises UserError with `what` and the reason where exceptions of these kinds occur."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {error}{end}") from error
