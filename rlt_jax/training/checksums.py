"""Checksums of checkpoints: a damaged one is known before it is used.

Orbax stores arrays without any; a flipped bit in one would only be another weight.
"""

import concurrent.futures
import contextlib
import logging
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from rlt_jax import files, stores
from rlt_jax.errors import LOG, StorageError, UserError
from rlt_jax.records import Record
from rlt_jax.training import hosts

NAME = "checksums.json"  # beside the folder of checkpoints
THREADS = 8
POLL_SECONDS = 0.2


class Manager(ocp.CheckpointManager):
    """Keeps checksums, and leaves preemption to `hosts.stopping`.

    Orbax would report its steps to JAX's preemption service, between the counts of calls
    that `hosts.stopping` reports.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._is_open = True
        self._pushed = self._thread.submit(lambda: None)

    def reached_preemption(self, step: int) -> bool:
        """No: a stage saves by itself when it is asked to stop."""
        return False

    def add_checksums(self, step: int) -> None:
        """Keeps the checksums of a checkpoint when it is complete, and pushes it.

        Raises:
          UserError, StorageError: the checkpoint before it could not be pushed.
        """
        if hosts.is_first():
            folder = Path(self.directory)
            self._pushed.result()
            self._thread.submit(add, folder, step, lambda: self._is_open)
            self._pushed = self._thread.submit(stores.push)

    def close(self) -> None:
        """Waits for what is being saved, and for its checksums."""
        super().close()
        self._is_open = False
        self._thread.shutdown()


@contextlib.contextmanager
def without_traces() -> Iterator[None]:
    """Leaves out stack traces that threads print when a file cannot be written.

    The exception says the same: Orbax logs one for each file besides, and TensorStore calls
    event loops that are closed by then.
    """
    print_ignored, logger = sys.unraisablehook, logging.getLogger("absl")

    def is_wanted(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    def print_others(ignored: Any) -> None:
        if str(ignored.exc_value) != "Event loop is closed":
            print_ignored(ignored)

    logger.addFilter(is_wanted)
    sys.unraisablehook = print_others  # also after a failure, which ends the run
    yield
    sys.unraisablehook = print_ignored
    logger.removeFilter(is_wanted)


def add(folder: Path, step: int, is_open: Callable[[], bool]) -> None:
    """Keeps the checksums of a checkpoint, as soon as it is complete.

    A checkpoint that a failing disk leaves without them can be used nevertheless.

    Args:
      folder: of the checkpoints.
      step: of the checkpoint.
      is_open: whether more may be written.
    """
    checkpoint = folder / str(step)
    while not checkpoint.is_dir():  # Orbax renames it to this when it is complete
        if not is_open():
            return
        time.sleep(POLL_SECONDS)
    try:
        found = _checksums(checkpoint, checkpoint.rglob("*"))
        kept = {n: x for n, x in _read(folder).items() if (folder / n).is_dir()}
        files.write_json(folder.with_name(NAME), kept | {str(step): found})
    except FileNotFoundError:  # a newer checkpoint has replaced it
        return
    except (OSError, StorageError, UserError) as error:
        LOG.warning(f"checkpoint {checkpoint} has no checksums: {error}")


def damage(folder: Path, step: int, item: str = "") -> str | None:
    """What is wrong with a checkpoint, or with one item; None for nothing known."""
    inside = f"{item}/" if item else ""
    every = _read(folder).get(str(step), {})
    expected = {name: x for name, x in every.items() if name.startswith(inside)}
    checkpoint = folder / str(step)
    for name in expected:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    found = _checksums(checkpoint, [checkpoint / name for name in expected])
    wrong = [name for name, one in expected.items() if found[name] != one]
    return f"{wrong[0]} has changed since it was written" if wrong else None


def _checksums(checkpoint: Path, paths: Iterable[Path]) -> Record:
    """Path in the checkpoint -> size in bytes and CRC-32 of every file."""
    paths = sorted(path for path in paths if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        sums = list(threads.map(_checksum, paths))
    return {str(path.relative_to(checkpoint)): s for path, s in zip(paths, sums)}


def _checksum(file: Path) -> list[int]:
    size = value = 0
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            size, value = size + len(part), zlib.crc32(part, value)
    return [size, value]


def _read(folder: Path) -> Record:
    try:
        return files.read_json(folder.with_name(NAME))
    except FileNotFoundError:
        return {}
    except UserError as error:
        LOG.warning(f"{error} Checkpoints are used without checksums.")
        return {}
