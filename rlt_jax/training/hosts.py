"""Several processes of one run: they meet, agree, and end together; process 0 writes.

They talk through the coordination service that jax.distributed starts in process 0. It
needs no devices, and ends every process when one of them has died.
"""

import hashlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import jax

# The service has no public name.
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state

from rlt_jax.errors import UserError

T = TypeVar("T")

POLL_SECONDS = 1.0  # between two looks at what other processes have announced
FAILED, STOP = "rlt_jax_news/failed/", "rlt_jax_news/stop/"  # and the process's number
ENDING_SECONDS = 10  # processes that end wait so long for each other
STOPPING_SECONDS = 60  # and those that agree on where to stop
_K8S_INDEX = "JOB_COMPLETION_INDEX"
PREEMPTED = 128 + signal.SIGTERM  # exit status


class Stopped(Exception):
    """The run was asked to end, and has saved all that it needs to go on."""


class _Stop:
    """When to stop: at the same call of `stopping` in every process."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.lock = threading.Lock()
        self.calls = 0
        self.last_call: int | None = None


_stop = _Stop()
_keys = itertools.count()
_ending = threading.Event()


def is_first() -> bool:
    """Whether this is process 0, the one that writes."""
    return global_state.process_id == 0


def connect(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Meets the other processes, if there are any; call it before any other use of JAX.

    Args:
      coordinator_address: host and port of process 0. With the next two: all or none;
        without, what JAX finds in a TPU pod, GKE or Slurm.
      num_processes: of the run.
      process_id: from 0.
      timeout: seconds to wait for the others.
      heartbeat_timeout: a process that is silent for so many seconds has died.

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
            "of them where a TPU pod, GKE or Slurm tells the processes about each other."
        )
    if missing and not _in_cluster():
        return
    if not missing and not (
        0 <= process_id < num_processes and ":" in coordinator_address
    ):
        raise UserError(
            f"--coordinator_address={coordinator_address} --num_processes="
            f"{num_processes} --process_id={process_id}: give HOST:PORT, and an id from 0 "
            "to one below the number of processes."
        )
    # SIGTERM is ours, see `listen`.
    jax.config.update("jax_enable_preemption_service", False)
    where = coordinator_address or "the coordinator that the cluster names"
    waiting = threading.Timer(timeout, _give_up, [flags, where, timeout])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            cluster_detection_method=None if missing else "deactivate",
            # Its own end is an abort, so the timer comes first.
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the processes could not meet at {where}: {reason}") from error
    finally:
        waiting.cancel()
    threading.Thread(target=_watch, daemon=True).start()


def _in_cluster() -> bool:
    """Whether the environment has several processes, as far as JAX can tell."""
    try:
        for kind in ClusterEnv._cluster_types:
            # Of Kubernetes only the pods of an indexed job are several for sure.
            alone = kind.__name__ == "K8sCluster" and _K8S_INDEX not in os.environ
            if not (kind.opt_in_only_method or alone) and kind.is_env_present():
                return kind.get_process_count() > 1
    except (OSError, RuntimeError, LookupError, ValueError) as error:
        raise UserError(
            f"the environment looks like a cluster, but cannot be read: {error}. Give "
            "--coordinator_address, --num_processes and --process_id; on a single TPU "
            "VM without a metadata server set TPU_SKIP_MDS_QUERY=1."
        ) from error
    return False


def _give_up(flags: Mapping[str, Any], where: str, timeout: int) -> None:
    count, index = flags["--num_processes"], flags["--process_id"]
    who = f"process {index} of {count}" if count else "a process of several"
    others = f"{count - 1} more" if count else "the others"
    waited = f"at {where}" if index == 0 else f"and for process 0 at {where}"
    message = (
        f"rlt_jax: {who} waited {timeout} s for {others}, {waited}, in vain. Check that "
        "all of them were started, with the same address and number; that process 0 runs "
        "at that address, and that no firewall closes the port. (--init_timeout=SECONDS "
        "waits longer.)"
    )
    _exit(1, message)


def listen() -> None:
    """From now on SIGTERM asks the run to stop; a second one ends it at once."""
    # Python runs handlers when the main thread comes back from a library, which may be
    # long; the number of the signal comes through the socket at once.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def receive(sender: socket.socket) -> None:
        while number := ours.recv(1):
            if number[0] == signal.SIGTERM:
                if _stop.asked.is_set():
                    os._exit(PREEMPTED)
                _stop.asked.set()
        sender.close()  # never comes, but keeps the other end open

    threading.Thread(target=receive, args=[theirs], daemon=True).start()


def stopping() -> bool:
    """Whether to save and stop now; every process calls it at the same places.

    All processes hear it at the same call, as each one's count of calls is compared
    when the first is asked.
    """
    if global_state.client is None:
        return _stop.asked.is_set()
    with _stop.lock:
        _stop.calls += 1
        return _stop.last_call is not None and _stop.calls >= _stop.last_call


def stop_if_asked() -> None:
    """For loops whose files are all that they need to go on.

    Raises:
      Stopped: the run was asked to stop.
    """
    if stopping():
        raise Stopped


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in process 0, as JSON has it, in every process.

    The others wait for it, whatever it takes; so they read what it has written.

    Raises:
      UserError: process 0 raised it.
    """
    if global_state.client is None:
        return make()
    key = f"rlt_jax/{next(_keys)}"
    if not is_first():
        answer = json.loads(_wait_for(key))
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]
    try:
        value = make()
    except UserError as error:
        global_state.client.key_value_set(key, json.dumps({"error": str(error)}))
        raise
    text = json.dumps({"value": value})
    global_state.client.key_value_set(key, text)
    return json.loads(text)["value"]


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Makes sure that the values, as JSON has them, are the same in all processes.

    Raises:
      UserError: in every process; it names those that differ from process 0.
    """
    if global_state.client is None:
        return
    key, count = f"rlt_jax/{next(_keys)}", global_state.num_processes
    text = json.dumps(values, default=str)
    if not is_first():
        global_state.client.key_value_set(f"{key}/{global_state.process_id}", text)

    def compare() -> None:
        ours, found = json.loads(text), {}
        for index in range(1, count):
            theirs = json.loads(_wait_for(f"{key}/{index}"))
            for name in sorted(ours.keys() | theirs.keys()):
                if ours.get(name) != theirs.get(name):
                    found.setdefault(name, []).append((index, theirs.get(name)))
        if found:
            name, differing = next(iter(found.items()))
            raise UserError(
                f"{what} must be the same in all {count} processes: {name} is "
                f"{ours.get(name)!r} in process 0, but "
                + ", ".join(f"{value!r} in process {i}" for i, value in differing[:8])
                + (f" ({len(differing)} differ)." if differing[8:] else ".")
            )

    from_first(compare)


def agree_on_items(what: str, items: Iterable[Any]) -> None:
    """`agree` on the number and a fingerprint of things that were read or made."""
    if global_state.client is None:
        return
    digest, number = hashlib.sha256(), 0
    for item in items:
        digest.update(repr(item).encode())
        number += 1
    agree(what, {"their number": number, "their fingerprint": digest.hexdigest()[:16]})


def guard(work: Callable[[], None]) -> None:
    """Does the work; where it fails in one process, all processes end.

    Bad input ends in one message and status 1, a stop in status 143.
    """
    try:
        work()
    except UserError as error:
        _leave(1, str(error))
    except Stopped:
        again = "stopped by SIGTERM, all is saved; the same command goes on from here."
        _leave(PREEMPTED, again)
    except (Exception, KeyboardInterrupt):
        if global_state.client is None:
            raise
        traceback.print_exc()
        _leave(
            1,
            "failed, see the traceback above; if it is about a connection, "
            "another process may have failed first.",
        )
    _ending.set()


def _leave(status: int, message: str) -> NoReturn:
    client, index = global_state.client, global_state.process_id
    if client is not None:
        message = f"process {index} of {global_state.num_processes}: {message}"
    if client is None or status == PREEMPTED:  # as all processes do
        _ending.set()
        print(f"rlt_jax: {message}", file=sys.stderr)
        sys.exit(status)
    try:
        client.key_value_set(f"{FAILED}{index}", message)
    except jax.errors.JaxRuntimeError:
        pass  # process 0 is gone
    _exit_together(f"rlt_jax: {message}")


def _exit_together(message: str) -> NoReturn:
    """Fails without the waits of libraries for processes that will not come."""
    _ending.set()
    print(message, file=sys.stderr, flush=True)
    try:
        # Process 0 must not go before the others have heard of it,
        global_state.client.wait_at_barrier("rlt_jax_end", ENDING_SECONDS * 1000)
    except jax.errors.JaxRuntimeError:
        pass
    if is_first():
        time.sleep(POLL_SECONDS)  # nor before they have gone: its end aborts them
    _exit(1)


def _exit(status: int, message: str = "") -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait_for(key: str) -> str:
    """The value of a key; whoever does not set it ends the run when it dies."""
    while True:
        try:
            return global_state.client.blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _watch() -> None:
    """Ends this process when another has failed; agrees on where to stop."""
    client = global_state.client
    while not _ending.wait(POLL_SECONDS):
        try:
            news = dict(client.key_value_dir_get("rlt_jax_news/"))
            failed = [text for name, text in news.items() if name.startswith(FAILED)]
            if failed and not _ending.is_set():
                reason = f"rlt_jax: ends, as another process failed: {failed[0]}"
                _exit_together(reason)
            if _stop.last_call is None and (news or _stop.asked.is_set()):
                name = f"{STOP}{global_state.process_id}"
                client.key_value_set(name, "", allow_overwrite=True)
                _agree_on_stop()
        except jax.errors.JaxRuntimeError:
            # Process 0 has died, and the service's own thread will say so.
            time.sleep(POLL_SECONDS)


def _agree_on_stop() -> None:
    """The call after the highest that any process has reached."""
    client = global_state.client
    with _stop.lock:  # no calls meanwhile
        name = f"rlt_jax_calls/{global_state.process_id}"
        client.key_value_set(name, str(_stop.calls))
        client.wait_at_barrier("rlt_jax_stop", STOPPING_SECONDS * 1000)
        calls = [int(value) for _, value in client.key_value_dir_get("rlt_jax_calls/")]
        _stop.last_call = max(calls) + 1
