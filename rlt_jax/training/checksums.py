"""Checksums of checkpoints: a damaged one is known before it is used.

Orbax stores arrays without any; a flipped bit in one would only be another weight.
"""

import concurrent.futures
import contextlib
import logging
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import orbax.checkpoint as ocp

from rlt_jax import files, stores
from rlt_jax.errors import LOG, StorageError, UserError
from rlt_jax.ranges import Condition, check_value
from rlt_jax.records import Record
from rlt_jax.training import hosts

NAME = "checksums.json"  # beside the folder of checkpoints
# Path in a checkpoint -> size in bytes and CRC-32 of the file.
_INSIDE = Condition("a path in the checkpoint", lambda x: ".." not in Path(x).parts)
SUMS = dict[Annotated[str, _INSIDE], tuple[int, int]]
THREADS = 8
POLL_SECONDS = 0.2


class Manager(ocp.CheckpointManager):
    """Keeps checksums, removes old checkpoints, and leaves preemption to `hosts.stopping`.

    Orbax would remove an old one before the new one is synced, and would report its steps
    to JAX's preemption service, between the counts of calls that `hosts.stopping` reports.

    Args:
      folder: of the checkpoints.
      keep: number of checkpoints to keep.
      is_async: whether `save` returns before the checkpoint is complete.
    """

    def __init__(self, folder: Path, keep: int, is_async: bool) -> None:
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=is_async, cleanup_tmp_directories=True
        )
        super().__init__(folder, options=options)
        self._folder, self._keep, self._is_open = folder, keep, True
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._completed = self._thread.submit(lambda: None)

    def reached_preemption(self, step: int) -> bool:
        """No: a stage saves by itself when it is asked to stop."""
        return False

    def save(self, step: int, **kwargs: Any) -> bool:
        """Saves a checkpoint; when it is complete, it is pushed and old ones are removed.

        Raises:
          UserError, StorageError: the checkpoint before it could not be pushed.
        """
        self.wait_until_finished()
        self._completed.result()
        if hosts.is_first():
            prune(self._folder)
        if not super().save(step, **kwargs):
            raise RuntimeError(f"Orbax has not saved {self._folder / str(step)}.")
        if hosts.is_first():
            self._completed = self._thread.submit(self._complete, step)
        return True

    def _complete(self, step: int) -> None:
        while not (self._folder / str(step)).is_dir():  # Orbax renames it to this
            if not self._is_open:
                return
            time.sleep(POLL_SECONDS)
        if add(self._folder, step):
            for old in sorted(ocp.utils.checkpoint_steps(self._folder))[: -self._keep]:
                shutil.rmtree(self._folder / str(old), ignore_errors=True)
            prune(self._folder)
        stores.push()

    def close(self) -> None:
        """Waits for what is being saved, and for its checksums."""
        try:
            super().close()
        finally:
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


def add(folder: Path, step: int) -> bool:
    """Syncs a checkpoint and keeps its checksums.

    One that a failing disk leaves without them can be used nevertheless.

    Args:
      folder: of the checkpoints.
      step: of the checkpoint.

    Returns:
      Whether it is safe on the disk now.
    """
    checkpoint = folder / str(step)
    try:
        inside = list(checkpoint.rglob("*"))
        for file in filter(Path.is_file, inside):
            files.sync(file)
        for one in (*filter(Path.is_dir, inside), checkpoint, folder):
            files.sync_folder(one)
        sums = _read(folder) | {str(step): _checksums(checkpoint, inside)}
        files.write_json(folder.with_name(NAME), sums)
    except (OSError, StorageError, UserError) as error:
        LOG.warning(f"checkpoint {checkpoint} has no checksums: {error}")
        return False
    return True


def prune(folder: Path) -> None:
    """Drops the checksums of checkpoints that are not there any more."""
    sums = _read(folder)
    kept = {name: x for name, x in sums.items() if (folder / name).is_dir()}
    if kept != sums:
        files.write_json(folder.with_name(NAME), kept)


def known(folder: Path, step: int) -> bool:
    """Whether there are checksums of a checkpoint."""
    return bool(_read(folder).get(str(step)))


def damage(folder: Path, step: int, item: str = "") -> str | None:
    """What is wrong with a checkpoint, or with one item; None for nothing known."""
    inside = f"{item}/" if item else ""
    every = _read(folder).get(str(step), {})
    expected = {name: x for name, x in every.items() if name.startswith(inside)}
    checkpoint = folder / str(step)
    if missing := [name for name in expected if not (checkpoint / name).is_file()]:
        return f"{missing[0]} is missing"
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
        file = folder.with_name(NAME)
        sums = files.read_json(file, {})
        for step, of_files in sums.items():
            check_value(f"{file} is damaged: {step}", SUMS, of_files)
        return sums
    except UserError as error:
        LOG.warning(f"{error} Checkpoints are used without checksums.")
        return {}
