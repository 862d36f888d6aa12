"""Mathematical equality by math-verify, in a few bounded processes.

What a model writes may keep a parser busy for ever or fill all memory, so each answer has
a limit of seconds and each process one of memory. The processes start with the first
answer that needs them, import nothing of JAX, and end with the interpreter.
"""

import atexit
import logging
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Collection
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import pebble

from rlt_jax.data.boxes import last_box
from rlt_jax.errors import UserError
from rlt_jax.rl import formulas

SECONDS = 5.0  # for one answer; the start of a process does not count
MEMORY = 4 * 2**30  # bytes of address space of a process
MAX_PROCESSES = 8
ATTEMPTS = 3


class Pair(NamedTuple):
    """Texts to compare."""

    prediction: str
    answer: str


class Comparison(NamedTuple):
    """What came of a pair.

    Attributes:
      equal: as mathematics.
      read: what the prediction was read as, in sympy's words with exact numbers, or
        its text where it is no mathematics; None where it is equal or empty.
      error: "timeout", or "crash" where the process failed.
    """

    equal: bool
    read: str | None = None
    error: str | None = None


_lock = threading.Lock()
_pool: pebble.ProcessPool | None = None


def compare(pairs: Collection[Pair]) -> dict[Pair, Comparison]:
    """Compares pairs; whatever a text does to its process, it ends.

    Raises:
      UserError: no process can be started, or all are ended from outside.
    """
    done: dict[Pair, Comparison] = {}
    for _ in range(ATTEMPTS):
        if left := [pair for pair in pairs if pair not in done]:
            done |= _compare(left)
    if len(done) < len(set(pairs)):
        raise UserError(
            "the processes that grade answers do not start, or something ends them. A "
            "script of your own has to keep its work under `if __name__ == "
            '"__main__":`, as each process imports the script; on a machine short of '
            "memory, the system may end processes."
        )
    return done


def _compare(pairs: Collection[Pair]) -> dict[Pair, Comparison]:
    """The same, without those that a broken pool has left."""
    pool, futures = _running(), {}
    try:
        for pair in pairs:
            arguments = (*pair, 2 * SECONDS)
            futures[pair] = pool.schedule(_in_process, arguments, timeout=SECONDS)
    except RuntimeError:  # it has just broken
        return {}
    done = {}
    for pair, future in futures.items():
        while pool.active and not future.done():
            wait([future], timeout=1)  # a broken pool forgets what waits in its queue
        if future.done() and (comparison := _comparison(future)):
            done[pair] = comparison
    return done


def _comparison(future: Future) -> Comparison | None:
    error = future.exception()
    if error is None:
        return Comparison(*future.result())
    if isinstance(error, BrokenProcessPool):
        return None
    # Else it is whatever sympy raises, or the end of the process.
    timed_out = isinstance(error, TimeoutError)
    return Comparison(False, error="timeout" if timed_out else "crash")


def _running() -> pebble.ProcessPool:
    global _pool
    with _lock:
        if _pool is None or not _pool.active:  # idle processes that die break a pool
            if _pool is not None:
                _stop(_pool)
            _pool = pebble.ProcessPool(
                min(MAX_PROCESSES, os.cpu_count() or 1),
                initializer=_begin,
                initargs=(MEMORY,),
                # Never fork: JAX has threads.
                context=multiprocessing.get_context("spawn"),
            )
        return _pool


def _stop(pool: pebble.ProcessPool) -> None:
    pool.stop()
    pool.join()


@atexit.register
def _exit() -> None:
    _lock.acquire()  # for good: no thread begins another pool
    if _pool is not None:
        _stop(_pool)


def _begin(memory: int) -> None:
    """Prepares a process before its first pair."""
    logging.disable()  # math-verify warns that it has no limits of its own
    _in_process("2/4", "0.5", 0)  # what is imported and compiled for the first one
    # The handler of the pool would wait for the end of a long computation.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _in_process(prediction: str, answer: str, alarm: float) -> tuple[bool, str | None]:
    import math_verify

    signal.setitimer(signal.ITIMER_REAL, alarm)  # ends a process whose pool is gone
    known = f"\\boxed{{{answer}}}"
    gold, given = (
        math_verify.parse(text, parsing_timeout=None)
        for text in (formulas.marked(known) or known, formulas.marked(prediction))
    )
    equal = not formulas.other_base(prediction, answer) and math_verify.verify(
        gold, given, timeout_seconds=None
    )
    read = None if equal else _canonical(prediction, given)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return equal, read


def _canonical(prediction: str, parsed: list) -> str | None:
    """One text for equal numbers; that of the answer where it is no mathematics."""
    import sympy
    from math_verify import grader

    box = last_box(prediction)
    text = formulas.plain(prediction if box is None else box)
    value = parsed[0] if parsed else ""
    if isinstance(value, str):
        return text or None
    try:
        if grader.is_equation(value):
            value = grader.take_last_relation(value).rhs
        value = sympy.nsimplify(value.doit(), rational=True)
        is_words = not value.is_number and formulas.has_words(text)
        return text if is_words and box is not None else str(value)
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError):
        return text  # sympy's errors, and that of a number with too many digits
