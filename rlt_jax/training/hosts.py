"""Several processes of one run: they start, stop and end together; process 0 writes.

Stop signals go through the preemption service of jax.distributed. Strings go through its
coordination service: the collectives of jax.experimental.multihost_utils take arrays of
equal shapes, need devices, and time out while process 0 works alone.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import jax
from jax.experimental import multihost_utils

from rlt_jax import stores
from rlt_jax.errors import StorageError, UserError, storage_errno, tell
from rlt_jax.files import GO_ON
from rlt_jax.training import private_jax

T = TypeVar("T")

# Stop signal -> exit status. A scheduler gives the command again after all but 1 and 130.
STOP_SIGNALS = {n: 128 + n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
USER_ERROR = 1
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: a disk, a network or another process failed
POLL_SECONDS = 1.0  # between two checks for failures of other processes
EXIT_SECONDS = 10  # that processes wait for each other when one has failed
FAILURES, BEATS = "rlt_jax_failures", "rlt_jax_beats"  # of processes, by their index
# In errors of collectives with a process that has ended.
LOST = ("Connection reset by peer", "Connection closed by peer", "Socket closed")

_stop_requested = threading.Event()
_stop_status = [STOP_SIGNALS[signal.SIGTERM]]  # that of the signal that came here
_exiting = threading.Event()
_keys = itertools.count()
_stopping_calls = itertools.count(1)


class Stopped(Exception):
    """A signal asked the run to stop, and everything needed to resume is saved."""


def is_first() -> bool:
    """Whether this is process 0, the one that writes."""
    return private_jax.process_id() == 0


def connect(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Calls `jax.distributed.initialize` if there are several processes.

    Call it before anything that starts the devices.

    Args:
      coordinator_address: HOST:PORT of process 0. Give this and the next two together;
        without them, JAX detects a TPU pod, GKE or Slurm.
      num_processes: number of processes.
      process_id: index of this process.
      timeout: seconds to wait for the other processes.
      heartbeat_timeout: seconds without a heartbeat before a process is declared dead.

    Raises:
      UserError: flags that do not fit together, or an address that cannot be used.
    """
    flags = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    if missing and len(missing) < len(flags):
        raise UserError(
            f"{' and '.join(missing)} missing: give {', '.join(flags)} together, or none "
            "of them on a TPU pod, GKE or Slurm, where JAX detects them."
        )
    if missing:
        if not _in_cluster():
            return
    elif ":" not in coordinator_address or process_id not in range(num_processes):
        given = " ".join(f"{name}={value}" for name, value in flags.items())
        raise UserError(f"{given}: give HOST:PORT, an id from 0 to num_processes - 1.")
    jax.config.update("jax_enable_preemption_service", True)  # for `stopping`
    address = coordinator_address or "the coordinator that the cluster names"
    who = "this process" if missing else f"process {process_id} of {num_processes}"
    # In a thread, as signals reach Python only while the main thread does not wait in C++.
    # JAX's own timeout, which aborts the process with a stack trace, is later than ours.
    connected = ThreadPoolExecutor(1).submit(
        jax.distributed.initialize,
        *flags.values(),
        cluster_detection_method=None if missing else "deactivate",
        initialization_timeout=timeout + 60,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )
    try:
        connected.result(timeout)
    except TimeoutError:
        tell(
            f"{who} timed out waiting for the other processes at {address} after "
            f"{timeout} s. Check that all were started with this address and the same "
            "number of processes, and that no firewall blocks the port. "
            "--init_timeout=SECONDS waits longer."
        )
        os._exit(USER_ERROR)  # sys.exit would wait for the thread
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot connect {who} at {address}: {reason}") from error
    args = [heartbeat_timeout]
    threading.Thread(target=_watch_others, args=args, daemon=True).start()


def _in_cluster() -> bool:
    try:
        return private_jax.cluster_process_count() > 1
    except (OSError, RuntimeError, LookupError, ValueError) as error:
        raise UserError(
            f"the settings of the cluster cannot be read: {error}. Give "
            "--coordinator_address, --num_processes and --process_id; on a single TPU "
            "VM without a metadata server set TPU_SKIP_MDS_QUERY=1."
        ) from error


def listen() -> None:
    """Makes the first stop signal ask the run to stop, a second end it at once.

    A second SIGHUP changes nothing.

    Call it after `connect`, as it replaces the handler of JAX's preemption service, which
    ignores a second SIGTERM and does not exist in a run of one process.
    """
    # A Python handler would wait until the main thread returns from XLA, which can take
    # minutes; a wakeup file descriptor tells another thread at once.
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        # Shells let background jobs ignore Ctrl-C, `nohup` lets a command ignore SIGHUP.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_handle_signals, args=[read_fd], daemon=True).start()


def _handle_signals(read_fd: int) -> None:
    while number := os.read(read_fd, 1):
        again = _stop_requested.is_set()
        # A terminal that closes can send more than one SIGHUP.
        if number[0] not in STOP_SIGNALS or (again and number[0] == signal.SIGHUP):
            continue
        _stop_status[0] = STOP_SIGNALS[signal.Signals(number[0])]
        if again:
            os._exit(_stop_status[0])
        _stop_requested.set()
        print(file=sys.stderr)  # after the progress bar
        tell("stops after this step and saves; a second signal ends it at once.")
        if jax.distributed.is_initialized():
            # In a thread of its own, as it waits if process 0 is dead.
            announce = private_jax.announce_preemption
            threading.Thread(target=announce, daemon=True).start()


def stopping() -> bool:
    """Whether to save and stop now; every process must call it at the same places.

    It returns True at the same call in all processes.
    """
    if not jax.distributed.is_initialized():
        return _stop_requested.is_set()
    # Calls are counted, because the steps of each stage begin at 0.
    return multihost_utils.reached_preemption_sync_point(next(_stopping_calls))


def stop_if_asked() -> None:
    """`stopping` for loops that can resume from the files they have written.

    Raises:
      Stopped: the run was asked to stop.
      StorageError: they are kept in a store that does not answer.
    """
    if stopping():
        raise Stopped
    stores.push(every=stores.PUSH_SECONDS)


def from_first(make: Callable[[], T]) -> T:
    """Calls `make` in process 0 only; returns its JSON value in every process.

    The others wait until it returns, so they can read the files that it writes.

    Raises:
      UserError, StorageError: in every process, if `make` raised it.
    """
    if not jax.distributed.is_initialized():
        return make()
    key = f"rlt_jax/{next(_keys)}"
    if is_first():
        try:
            answer = {"value": make()}
        except (UserError, StorageError) as error:
            answer = {type(error).__name__: str(error)}
        private_jax.send(key, json.dumps(answer))
    answer = json.loads(private_jax.receive(key))
    for kind in (UserError, StorageError):
        if kind.__name__ in answer:
            raise kind(answer[kind.__name__])
    return answer["value"]


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Checks that the values, as JSON, are the same in all processes.

    Raises:
      UserError: in every process; it names the first value that differs.
    """
    if not jax.distributed.is_initialized():
        return
    key, count = f"rlt_jax/{next(_keys)}", private_jax.num_processes()
    own = json.dumps(values, default=str)
    private_jax.send(f"{key}/{private_jax.process_id()}", own)

    def compare() -> None:
        every = [json.loads(private_jax.receive(f"{key}/{i}")) for i in range(count)]
        for name in sorted(set().union(*every)):
            found = [one.get(name) for one in every]
            if differ := [i for i in range(count) if found[i] != found[0]]:
                others = ", ".join(f"{found[i]!r} in process {i}" for i in differ[:8])
                raise UserError(
                    f"{what} must be the same in all {count} processes: {name} is "
                    f"{found[0]!r} in process 0, but {others} "
                    f"({len(differ)} of {count} processes differ)."
                )

    from_first(compare)


def agree_on_items(what: str, items: Iterable[Any]) -> None:
    """`agree` on the number and a fingerprint of items that every process has read."""
    if not jax.distributed.is_initialized():
        return
    digest, number = hashlib.sha256(), 0
    for number, item in enumerate(items, 1):
        digest.update(repr(item).encode())
    agree(what, {"their number": number, "their fingerprint": digest.hexdigest()[:16]})


def guard(work: Callable[[], None]) -> None:
    """Calls `work`; if it fails in one process, all processes exit with the reason.

    A UserError exits with its message and status 1, a failure of the storage with status
    75, Stopped with that of the signal, see `STOP_SIGNALS`.
    """
    try:
        work()
    except (UserError, StorageError) as error:
        _fail(str(error), TRY_AGAIN if isinstance(error, StorageError) else USER_ERROR)
    except Stopped:
        tell("stopped by a signal, all is saved; the same command resumes the run.")
        sys.exit(_stop_status[0])
    except (Exception, KeyboardInterrupt) as error:
        reason = " ".join(str(error).split())[:500]
        if storage_errno(error):
            _fail(f"the storage failed: {reason}. {GO_ON}", TRY_AGAIN)
        if not jax.distributed.is_initialized():
            raise
        if any(text in str(error) for text in LOST):
            time.sleep(3 * POLL_SECONDS)  # it may tell why
            message = f"another process, or the network to it, has failed ({reason})"
            _fail(f"{message}. {GO_ON}", TRY_AGAIN)
        traceback.print_exc()
        _fail("failed, see the traceback above; another process may have failed first.")
    finally:
        _exiting.set()


def _fail(message: str, status: int = USER_ERROR) -> NoReturn:
    """Exits with a message, which the other processes print too."""
    # Writes of a checkpoint that failed beside the first one are not worth a word.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if not jax.distributed.is_initialized():
        tell(message)
        sys.exit(status)
    index = private_jax.process_id()
    message = f"process {index} of {private_jax.num_processes()}: {message}"
    _exiting.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is dead
        private_jax.send(f"{FAILURES}/{index}", json.dumps([message, status]))
    _exit_together(message, status)


def _watch_others(heartbeat_timeout: float) -> None:
    """Ends this process when another one has failed, or does not answer any more.

    JAX does the latter, too, a little later and with a stack trace of its C++ code.
    """
    silence, index = 0.5 * heartbeat_timeout, private_jax.process_id()
    answered = dict.fromkeys(range(private_jax.num_processes()), time.monotonic())
    beats: dict[int, str] = {}
    while not _exiting.wait(POLL_SECONDS):
        failures, now = {}, time.monotonic()
        stamp = str(now)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is silent
            private_jax.send(f"{BEATS}/{index}", stamp, overwrite=True)
            failures = private_jax.received(FAILURES)
            new = dict.fromkeys(answered, stamp)
            if is_first():
                new = private_jax.received(BEATS)
            answered |= {i: now for i in new if new[i] != beats.get(i)}
            beats = new
        silent = [i for i in answered if now - answered[i] > silence]
        if failures and not _exiting.is_set():
            _exiting.set()
            message, status = json.loads(next(iter(failures.values())))
            _exit_together(f"ends, as another process failed: {message}", status)
        elif silent and not _exiting.is_set():
            _fail(
                f"process {silent[0]} has not answered for {silence:.0f} s: it was killed, "
                f"or its host or its network failed. {GO_ON}",
                TRY_AGAIN,
            )


def _exit_together(message: str, status: int) -> NoReturn:
    """Exits when all processes have heard of the failure, or after EXIT_SECONDS."""
    tell(message)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # a process is dead
        private_jax.wait_at_barrier("rlt_jax_exit", EXIT_SECONDS)
    if is_first():
        time.sleep(POLL_SECONDS)  # JAX aborts processes that outlive process 0
    sys.stdout.flush()
    os._exit(status)  # sys.exit would wait for the main thread and for dead processes
