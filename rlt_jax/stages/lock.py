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
from rlt_jax.errors import LOG, UserError
from rlt_jax.records import Record
from rlt_jax.stages.folder import now

BEAT_SECONDS = 5.0  # between two counts
STALE_SECONDS = 60.0  # without a count, after which another host's run is dead


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
    with _wait(file, name, root / name) as opened:
        ended = threading.Event()
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": now()}
        _write(opened, owner)
        beat = threading.Thread(target=_beat, args=[opened, owner, ended], daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            with contextlib.suppress(OSError):
                file.unlink()


def _wait(file: Path, name: str, folder: Path) -> IO[str]:
    """Opens the lock when nobody holds it; raises UserError when another run does."""
    start, first = time.monotonic(), None
    while True:
        with files.storing(file):
            opened = file.open("a+", encoding="utf-8")
        free, owner = _try_lock(opened), _owner(opened)
        here = owner.get("host") == socket.gethostname()
        if free is None and here:
            free = not Path(f"/proc/{owner.get('pid')}").exists()
        # The run that held it may have removed the file that was opened.
        is_new = file.exists() and os.path.samestat(
            file.stat(), os.fstat(opened.fileno())
        )
        if free and is_new and (here or not owner):
            return opened
        first = first or owner
        if (here and not free) or owner.get("count") != first.get("count"):
            who = "process {pid} on {host}, since {since}".format(**owner)
            opened.close()
            raise UserError(
                f"stage {name}: {folder} is in use by another run ({who}). Wait until it "
                "ends or stop it, or use another --workdir."
            )
        if time.monotonic() - start > STALE_SECONDS:
            LOG.warning(f"stage {name}: the run that was in {folder} is dead: {owner}")
            return opened
        opened.close()
        if owner:
            LOG.info(f"stage {name}: looks whether {owner} is alive")
        time.sleep(BEAT_SECONDS if owner else 0.1)


def _try_lock(opened: IO[str]) -> bool | None:
    """Whether this process has the operating system's lock; None where there is none."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _owner(opened: IO[str]) -> Record:
    """Who holds the lock; {} for nobody, or while it is being written."""
    opened.seek(0)
    with contextlib.suppress(ValueError):
        return dict(json.loads(opened.read() or "{}"))
    return {}


def _beat(opened: IO[str], owner: Record, ended: threading.Event) -> None:
    """Writes the owner with a count that rises, until the stage ends."""
    for count in itertools.count(1):
        if ended.wait(BEAT_SECONDS):
            return
        _write(opened, owner | {"count": count})


def _write(opened: IO[str], owner: Record) -> None:
    with contextlib.suppress(OSError):  # such as a full disk, which ends the stage
        opened.truncate(0)
        opened.write(json.dumps(owner))
        opened.flush()
