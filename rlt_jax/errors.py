"""What users are told: the log, and the exception for input that they have to fix."""

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

# Reasons that pass, or that space or a repair of the storage removes.
STORAGE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
)

LOG = logging.getLogger("rlt_jax")


class _Unfailing(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def keep_telling() -> None:
    """Lets standard error drop what it cannot take: a full log must not end a run.

    A standard stream that is closed becomes /dev/null. Otherwise the next file that the run
    opens would have its number, and get what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It gets the lowest free number, which is that of the closed stream.
            opened = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(opened, mode, closefd=False))
    sys.stdout.reconfigure(errors="backslashreplace")  # as standard error has it
    raw, encoding = _Unfailing(2, "w", closefd=False), sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(raw, encoding, "backslashreplace", write_through=True)


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


def storage_errno(error: BaseException | None) -> int | None:
    """The number of the storage error that an exception or its causes tell of, if any.

    TensorStore, which writes checkpoints for Orbax, raises ValueError with the text of the
    operating system's error.
    """
    while error is not None and not isinstance(error, UserError):
        for number in STORAGE_ERRORS:
            told = number == error.errno if isinstance(error, OSError) else False
            if told or os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def as_user_error(what: str, *kinds: type[Exception], end: str = ".") -> Iterator[None]:
    """Raises UserError with `what` and the reason where exceptions of these kinds occur.

    Failures of the storage or the network are raised as they are.
    """
    try:
        yield
    except kinds as error:
        if storage_errno(error):
            raise
        raise UserError(f"{what}: {error}{end}") from error
