"""A lock of a stage's folder: two runs must not work in one.

The file names host, process and start of the run that holds it, and a count that it raises
every few seconds. On one host, or where the file system has locks for several, the
operating system's lock ends with its process, however that ends. Elsewhere a run whose
count stands still is taken for dead.
"""

import contextlib
import fcntl
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rlt_jax import files
from rlt_jax.errors import LOG, UserError, tell
from rlt_jax.records import Record
from rlt_jax.stages.folder import now
from rlt_jax.training import hosts

BEAT_SECONDS = 5.0  # between two counts
STALE_SECONDS = 60.0  # without a count, after which another host's run is dead
SIZE = 512  # bytes of the file


@contextlib.contextmanager
def held(root: Path, name: str) -> Iterator[None]:
    """Holds the lock of a stage.

    Args:
      root: the workdir.
      name: of the stage.

    Raises:
      UserError: another run holds it.
    """
    file = root / f".{name}.lock"
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": now()}
    with _wait(file, name, root / name) as opened:
        ended = threading.Event()
        _write(opened, owner | {"count": 0})
        arguments = [file, opened, owner, ended]
        beat = threading.Thread(target=_beat, args=arguments, daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            with contextlib.suppress(OSError):
                if not _successor(opened, owner):
                    file.unlink()


def _wait(file: Path, name: str, folder: Path) -> IO[bytes]:
    """Opens the lock when nobody holds it; raises UserError when another run does."""
    start, first = time.monotonic(), None
    while True:
        files.check_regular(file)
        with files.storing(file):
            opened = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b", 0)
        free, owner = _try_lock(opened), _owner(opened)
        here = owner.get("host") == socket.gethostname()
        if free is None and here:
            free = not Path(f"/proc/{owner.get('pid')}").exists()
        if free and (here or not owner) and _is_at(file, opened):
            return opened
        waited = time.monotonic() - start > STALE_SECONDS
        first = first or owner
        counts = owner.get("count") != first.get("count")
        if (here and not free) or counts or (waited and free is False):
            who = {key: owner.get(key, "unknown") for key in ("pid", "host", "since")}
            opened.close()
            raise UserError(
                f"stage {name}: {folder} is in use by another run (process {who['pid']} on "
                f"{who['host']}, since {who['since']}). Wait until it ends or stop it, or "
                "use another --workdir."
            )
        if waited and _is_at(file, opened):
            LOG.warning(f"stage {name}: the run that was in {folder} is dead: {owner}")
            return opened
        opened.close()
        if owner:
            LOG.info(f"stage {name}: looks whether {owner} is alive")
        time.sleep(BEAT_SECONDS if owner else 0.1)


def _try_lock(opened: IO[bytes]) -> bool | None:
    """Whether this process has the operating system's lock; None where there is none."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _is_at(file: Path, opened: IO[bytes]) -> bool:
    """Whether a file that was opened is there; the run that held it may have removed it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(file.stat(), os.fstat(opened.fileno()))
    return False


def _owner(opened: IO[bytes]) -> Record:
    """Who holds the lock; {} for nobody, or while it is being written."""
    with contextlib.suppress(ValueError):
        owner = json.loads(os.pread(opened.fileno(), SIZE, 0))
        return owner if isinstance(owner, dict) else {}
    return {}


def _successor(opened: IO[bytes], owner: Record) -> Record:
    """The run that has taken the lock over from its owner; {} for none."""
    found = _owner(opened)
    return found if found | owner != found else {}


def _beat(file: Path, opened: IO[bytes], owner: Record, ended: threading.Event) -> None:
    """Writes the owner with a count that rises, until the stage ends.

    Ends the process when another run has taken over: it was taken for dead, as when its
    machine was suspended, and must not write any more.
    """
    for count in itertools.count(1):
        if ended.wait(BEAT_SECONDS):
            return
        with contextlib.suppress(OSError):
            if other := _successor(opened, owner):
                tell(f"ends, as another run has taken over {file}: {other}")
                os._exit(hosts.TRY_AGAIN)
        _write(opened, owner | {"count": count})


def _write(opened: IO[bytes], owner: Record) -> None:
    """Replaces the owner in place: others never see the file empty."""
    with contextlib.suppress(OSError):  # such as a full disk, which ends the stage
        os.pwrite(opened.fileno(), json.dumps(owner).encode().ljust(SIZE), 0)
        os.fsync(opened.fileno())
