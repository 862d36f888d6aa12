"""Mathematical equality by math-verify, and other graders, in processes with limits.

Completions are parsed and compared as lighteval and Open R1 do for AIME and MATH-500
(see `_equal`), so that accuracies can be compared with theirs.

A completion may keep a parser busy forever or fill all memory, so each comparison has a
time limit and each process a memory limit; so have graders that are functions with an
argument. The processes start with the first comparison, do not import JAX, and end with the
interpreter.
"""

import atexit
import contextlib
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
from rlt_jax.settings import load_function

SECONDS = 5.0  # for one comparison; the start of a process does not count
FUNCTION_SECONDS = 20.0  # the same for other graders, with the import of a library
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
    """Texts to compare: a completion and the reference answer.

    `grader` is "math", or the function that compares them, "module:function?argument".
    """

    prediction: str
    answer: str
    grader: str = "math"


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
            "the processes that grade answers are ended, as by a system short of memory, or "
            'do not start: a script has to keep its work under `if __name__ == "__main__":`.'
        )
    return verdicts


def _compare(pairs: Collection[Pair]) -> dict[Pair, Verdict]:
    """Like `compare`, but without the pairs that a broken pool did not get to."""
    pool, futures, verdicts = _running(), {}, {}
    with contextlib.suppress(RuntimeError):  # the pool has just broken
        for pair in pairs:
            limit = SECONDS if pair.grader == "math" else FUNCTION_SECONDS
            futures[pair] = pool.schedule(_judge, (pair, 2 * limit), timeout=limit)
    for pair, future in futures.items():
        while pool.active and not future.done():
            wait([future], timeout=1)  # a broken pool forgets what waits in its queue
        error = future.exception() if future.done() else BrokenProcessPool()
        if not isinstance(error, BrokenProcessPool):  # else it waits for the next pool
            kind = "timeout" if isinstance(error, TimeoutError) else "crash"
            verdicts[pair] = Verdict(False, error=kind) if error else future.result()
    return verdicts


def _running() -> pebble.ProcessPool:
    global _pool
    with _lock:
        if _pool is None or not _pool.active:  # idle processes that die break a pool
            _stop()
            count = min(MAX_PROCESSES, os.cpu_count() or 1)
            spawn = multiprocessing.get_context("spawn")  # never fork: JAX has threads
            _pool = pebble.ProcessPool(count, initializer=_begin, context=spawn)
        return _pool


def _stop() -> None:
    if _pool is not None:
        _pool.stop()
        _pool.join()


@atexit.register
def _exit() -> None:
    _lock.acquire()  # never released: no thread may start another pool
    _stop()


def _begin() -> None:
    """Prepares a process before its first pair."""
    logging.disable()  # math-verify warns that its own time limits are off
    # Imports and compiles now, when no time limit counts.
    _judge(Pair("2/4", "0.5"), alarm=0)
    # The handler of the pool would wait for the end of a long computation.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _judge(pair: Pair, alarm: float) -> Verdict:
    """Compares in a process of the pool.

    Args:
      pair: the texts to compare.
      alarm: seconds after which the process ends itself, should the pool be gone.
    """
    signal.setitimer(signal.ITIMER_REAL, alarm)
    verdict = _equal(pair) if pair.grader == "math" else call_grader(pair)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return verdict


def call_grader(pair: Pair) -> Verdict:
    """Compares with a grader "module:function" or "module:function?argument"."""
    path, *argument = pair.grader.split("?", 1)
    correct = bool(load_function(path)(pair.prediction, pair.answer, *argument))
    vote = pair.answer if correct else pair.prediction
    return Verdict(correct, vote.strip() or None)


def _equal(pair: Pair) -> Verdict:
    """Compares as lighteval and Open R1 do.

    This is the protocol of their `latex_gold_metric` and `expr_gold_metric`. From the
    prediction math-verify extracts the `\\boxed{}` (those that stand close together are
    a set), else what follows "the answer is", else the last LaTeX in a math environment
    or plain expression; of LaTeX without an environment it parses only fractions. The
    reference answer is LaTeX without an environment, so it is put into a `\\boxed{}`.
    Numbers are compared to 5 decimals. Before that the signs − and √ are rewritten, and
    separators of thousands and signs of currencies left out, which math-verify does not
    parse everywhere.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    answer = pair.answer.strip()
    latex = LatexExtractionConfig(boxed_match_priority=0)
    prediction, boxed = _ascii(pair.prediction.strip()), _ascii(f"\\boxed{{{answer}}}")
    parsed = parse(prediction, [ExprExtractionConfig(), latex], parsing_timeout=None)
    gold = parse(boxed, [latex], parsing_timeout=None)
    correct = verify(gold, parsed, float_rounding=5, timeout_seconds=None)
    return Verdict(correct, answer if correct else _canonical(prediction, parsed))


def _ascii(text: str) -> str:
    """Writes − as - and 10{,}080 as 10080.

    Writes √2 as \\sqrt{2}, between dollars in a text without LaTeX.
    """
    text = _IGNORED.sub("", text.replace("−", "-"))
    dollar = "" if _ENVIRONMENT.search(text) else "$"
    return _ROOT.sub(rf"{dollar}\1\\sqrt{{\2\3}}{dollar}", text)


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
