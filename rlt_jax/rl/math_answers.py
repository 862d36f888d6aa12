"""Mathematical equality by math-verify, in a pool of processes with limits.

Completions are parsed and compared as lighteval and Open R1 do for AIME and MATH-500
(see `_compare_pair`), so that accuracies can be compared with theirs.

A completion may keep a parser busy forever or fill all memory, so each comparison has a
time limit and each process a memory limit. The processes start with the first comparison,
do not import JAX, and end with the interpreter.
"""

import atexit
import logging
import multiprocessing
import os
import re
import resource
import signal
import threading
from collections.abc import Collection
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import pebble

from rlt_jax.errors import UserError

SECONDS = 5.0  # for one comparison; the start of a process does not count
MEMORY = 4 * 2**30  # bytes of address space of a process
MAX_PROCESSES = 8
ATTEMPTS = 3

_ENVIRONMENT = re.compile(r"\$|\\[(\[]|\\boxed")
# The sign √ before a number, a variable, a fraction or a group.
_ROOT = re.compile(
    r"(-?\d{0,9})(?<!√)√ ?(?:(\d+(?:\.\d+)?|[A-Za-z]|\\frac(?:\{[^{}]*\}){2})|"
    r"[({]((?:[^(){}]|\([^(){}]*\))*)[)}])"
)
# {,} or a space of LaTeX before three digits; a sign of a currency before a number.
_IGNORED = re.compile(
    r"(?<=\d)(?:\{,\}|\\[,;: ]|~)(?=\d{3}(?!\d))|"
    r"(?:\\text\{\\\$\}|\\\$|[€£¥])(?=\.?\d)"
)


class Pair(NamedTuple):
    """Texts to compare: a completion and the reference answer."""

    prediction: str
    answer: str


class Verdict(NamedTuple):
    """Result of grading a prediction.

    Attributes:
      correct: whether it gives the reference answer; None where there is none.
      answer: its canonical form for majority votes: the reference answer where it is
        correct, None where there is no prediction or an empty one.
      error: "timeout" or "crash" where comparing it failed; it then counts as wrong and
        has no vote.
    """

    correct: bool | None
    answer: str | None = None
    error: str | None = None


_lock = threading.Lock()
_pool: pebble.ProcessPool | None = None


def compare(pairs: Collection[Pair]) -> dict[Pair, Verdict]:
    """Compares pairs within the limits, whatever their texts do to a process.

    Raises:
      UserError: no process can be started, or all are killed from outside.
    """
    verdicts: dict[Pair, Verdict] = {}
    for _ in range(ATTEMPTS):
        if left := set(pairs) - set(verdicts):
            verdicts |= _compare(left)
    if len(verdicts) < len(set(pairs)):
        raise UserError(
            "the processes that grade answers do not start, or something ends them. A "
            'script has to keep its work under `if __name__ == "__main__":`, as each '
            "process imports it; on a machine short of memory, the system may end processes."
        )
    return verdicts


def _compare(pairs: Collection[Pair]) -> dict[Pair, Verdict]:
    """Like `compare`, but without the pairs that a broken pool did not get to."""
    pool, futures, verdicts = _running(), {}, {}
    try:
        for pair in pairs:
            arguments = (pair, 2 * SECONDS)
            futures[pair] = pool.schedule(_compare_pair, arguments, timeout=SECONDS)
    except RuntimeError:  # the pool has just broken
        return {}
    for pair, future in futures.items():
        while pool.active and not future.done():
            wait([future], timeout=1)  # a broken pool forgets what waits in its queue
        error = future.exception() if future.done() else BrokenProcessPool()
        if error is None:
            verdicts[pair] = future.result()
        elif not isinstance(error, BrokenProcessPool):  # raised by sympy, or its end
            timed_out = isinstance(error, TimeoutError)
            verdicts[pair] = Verdict(False, error="timeout" if timed_out else "crash")
    return verdicts


def _running() -> pebble.ProcessPool:
    global _pool
    with _lock:
        if _pool is None or not _pool.active:  # idle processes that die break a pool
            _stop()
            _pool = pebble.ProcessPool(
                min(MAX_PROCESSES, os.cpu_count() or 1),
                initializer=_begin,
                initargs=(MEMORY,),
                # Never fork: JAX has threads.
                context=multiprocessing.get_context("spawn"),
            )
        return _pool


def _stop() -> None:
    if _pool is not None:
        _pool.stop()
        _pool.join()


@atexit.register
def _exit() -> None:
    _lock.acquire()  # never released: no thread may start another pool
    _stop()


def _begin(memory: int) -> None:
    """Prepares a process before its first pair."""
    logging.disable()  # math-verify warns that its own time limits are off
    # Imports and compiles now, when no time limit counts.
    _compare_pair(Pair("2/4", "0.5"), alarm=0)
    # The handler of the pool would wait for the end of a long computation.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _compare_pair(pair: Pair, alarm: float) -> Verdict:
    """Compares in a process of the pool, as lighteval and Open R1 do.

    This is the protocol of their `latex_gold_metric` and `expr_gold_metric`. From the
    prediction math-verify extracts the `\\boxed{}` (those that stand close together are
    a set), else what follows "the answer is", else the last LaTeX in a math environment
    or plain expression; of LaTeX without an environment it parses only fractions. The
    reference answer is LaTeX without an environment, so it is put into a `\\boxed{}`.
    Numbers are compared to 5 decimals. Before that the signs − and √ are rewritten, and
    separators of thousands and signs of currencies left out, which math-verify does not
    parse everywhere.

    Args:
      pair: the texts to compare.
      alarm: seconds after which the process ends itself, should the pool be gone.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    signal.setitimer(signal.ITIMER_REAL, alarm)
    latex = LatexExtractionConfig(boxed_match_priority=0)
    prediction, answer = _ascii(pair.prediction), _ascii(f"\\boxed{{{pair.answer}}}")
    parsed = parse(prediction, [ExprExtractionConfig(), latex], parsing_timeout=None)
    gold = parse(answer, [latex], parsing_timeout=None)
    correct = verify(gold, parsed, float_rounding=5, timeout_seconds=None)
    vote = pair.answer if correct else _canonical(prediction, parsed)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return Verdict(correct, vote)


def _ascii(text: str) -> str:
    """Writes − as - and 10{,}080 as 10080.

    Writes √2 as \\sqrt{2}, between dollars in a text without LaTeX.
    """
    text = _IGNORED.sub("", text.replace("−", "-"))
    dollar = "" if _ENVIRONMENT.search(text) else "$"
    root = rf"{dollar}\1\\sqrt{{\2\3}}{dollar}"
    return _ROOT.sub(root, text)


def _canonical(prediction: str, parsed: list) -> str:
    """One text for equal numbers; the prediction's where math-verify parses nothing."""
    import sympy
    from math_verify import grader

    if not parsed:
        return " ".join(prediction.split())
    value, text = parsed[0], parsed[-1]  # math-verify puts the text last
    if isinstance(value, str):
        return value
    try:
        if grader.is_equation(value):
            value = grader.take_last_relation(value).rhs
        return str(sympy.nsimplify(value.doit(), rational=True))
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError):
        return text  # sympy cannot evaluate it, or it has too many digits to print
