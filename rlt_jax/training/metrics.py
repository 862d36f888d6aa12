"""Metrics in JSON Lines and TensorBoard files, and progress bars.

With several processes, only process 0 writes files and shows progress.
"""

import contextlib
import itertools
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import tqdm

from rlt_jax import files, watchdog
from rlt_jax.errors import LOG, UserError
from rlt_jax.files import NO_KINDS, stream_jsonl
from rlt_jax.ranges import NonNegativeInt, Steps
from rlt_jax.records import Record
from rlt_jax.training import hosts

RESET = Path("/proc/self/clear_refs")


class MetricWriter:
    """Writes the metrics of a stage one step late, so that the device never waits.

    `metrics.jsonl` has one record per step; TensorBoard event files with the same numbers
    are in `tensorboard/`. Records from `first_step` on, which an interrupted run wrote
    after its last checkpoint, are removed.
    """

    def __init__(self, workdir: Path, first_step: int) -> None:
        self._file = workdir / "metrics.jsonl"
        # Resuming writes the later steps again.
        kinds = {"step": NonNegativeInt}
        kept = keep_records(self._file, lambda row: row["step"] < first_step, kinds)
        if hosts.is_first() and len(kept) < first_step:
            LOG.warning(
                f"{self._file} has {len(kept)} of the {first_step} steps before the "
                "checkpoint; the numbers of the others are lost, the training is not"
            )
        self._events = _Events(workdir / "tensorboard", first_step)
        self._pending: tuple[int, Mapping[str, Any]] | None = None

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Takes the metrics of this step; writes and returns those of the previous one.

        Args:
          step: the step.
          metrics: name -> scalar, which may still be on the device.
        """
        last = self.flush()
        self._pending = (step, dict(metrics))
        return last

    def flush(self) -> dict[str, float]:
        """Writes and returns the pending metrics."""
        if self._pending is None:
            return {}
        (step, metrics), self._pending = self._pending, None
        numbers = {k: float(v) for k, v in jax.device_get(metrics).items()}
        append_jsonl(self._file, [{"step": step, **numbers}])
        self._events.write(step, numbers)
        return numbers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # After an error, metrics from the devices of other processes may never arrive.
        if error is None or jax.process_count() == 1:
            self.flush()
        self._events.close()


class _Events:
    """TensorBoard's event file, written by this thread; a failure ends it, not the run.

    tensorboardX's own writer has a thread, and waits for ever where that has died.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder, self._writer = folder, None
        if hosts.is_first():
            # It imports PyTorch where that is installed, which takes seconds.
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

            self._event = Event
            with self._given_up_on_failure():
                folder.mkdir(parents=True, exist_ok=True)
                suffix = f".{os.getpid()}.{first_step}"
                self._writer = EventsWriter(str(folder / "events"), suffix)
                start = SessionLog(status=SessionLog.START)
                self._write(step=first_step, session_log=start)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes numbers of a step."""
        if self._writer is not None:
            values = [{"tag": name, "simple_value": x} for name, x in numbers.items()]
            with self._given_up_on_failure():
                self._write(step=step, wall_time=time.time(), summary={"value": values})

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            with self._given_up_on_failure():
                self._writer.close()

    def _write(self, **event: Any) -> None:
        self._writer.write_event(self._event(**event))
        self._writer.flush()

    @contextlib.contextmanager
    def _given_up_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            LOG.warning(
                f"TensorBoard files in {self._folder} cannot be written "
                f"({error.strerror}); training goes on without them, and metrics.jsonl "
                "has the same numbers"
            )
            writer, self._writer = self._writer, None
            with contextlib.suppress(OSError):
                if writer is not None:
                    writer.close()


def reset_peak() -> None:
    """Lets the peak memory of the process begin anew, where it runs on Linux."""
    if RESET.exists():
        RESET.write_text("5")


def peak_gib() -> float:
    """Peak memory in GiB of the first device; on CPU, of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return stats["peak_bytes_in_use"] / 2**30


def phase_metrics(phase: str, tokens: int, seconds: float) -> dict[str, float]:
    """Duration, tokens and throughput of a phase of a step."""
    return {
        f"time/{phase}_seconds": seconds,
        f"time/{phase}_tokens": tokens,
        f"time/{phase}_tokens_per_second": tokens / seconds,
    }


def append_jsonl(file: Path, records: list[Record]) -> None:
    """`files.append_jsonl` in process 0."""
    if hosts.is_first():
        files.append_jsonl(file, records)


def read_jsonl(file: Path, kinds: Mapping[str, Any] = NO_KINDS) -> list[Record]:
    """Reads the records of a JSON Lines file, without an incomplete last line."""
    return list(stream_jsonl(file, kinds))


def keep_records(
    file: Path, keep: Callable[[Record], bool], kinds: Mapping[str, Any] = NO_KINDS
) -> list[Record]:
    """Drops the records of a JSONL file that are not to be kept; process 0 gets the rest."""
    if not hosts.is_first() or not files.check_regular(file):
        return []
    kept = [record for record in stream_jsonl(file, kinds) if keep(record)]
    _rewrite(file, kept)
    return kept


def keep_whole_batches(file: Path, batch_size: int, questions: Iterable[str]) -> int:
    """Drops the records of an incomplete batch, which a resumed run writes again.

    Results depend, in their last bits, on the other sequences of the batch, so a resumed
    run equals an uninterrupted one only from the start of a batch.

    Args:
      file: of the records.
      batch_size: records of a batch.
      questions: what the records of a complete file are about, in this order.

    Returns:
      The number of remaining records; 0 if there is no file.

    Raises:
      UserError: a line is damaged, missing, or there twice.
    """

    def keep() -> int:
        if not files.check_regular(file):
            return 0
        records = read_jsonl(file, {"question": str})
        asked = itertools.chain(questions, itertools.repeat(None))
        for number, (record, question) in enumerate(zip(records, asked), 1):
            if record["question"] != question:
                raise UserError(
                    f"{file}:{number} is about another question than expected: a line "
                    "before it is missing or there twice. Restore the file, or run the "
                    f"stage afresh with --only={file.parent.name}."
                )
        count = len(records) // batch_size * batch_size
        _rewrite(file, records[:count])
        return count

    return hosts.from_first(keep)


def _rewrite(file: Path, records: list[Record]) -> None:
    """Replaces the records of a file, whole."""
    partial = file.with_name(f"{file.name}.kept")
    with files.storing(partial):
        partial.unlink(missing_ok=True)
    append_jsonl(partial, records)
    with files.storing(file):
        partial.replace(file)
    files.sync_folder(file.parent)


def steps(first: int, total: int, workdir: Path, profile: Steps = ()) -> Iterator[int]:
    """Yields the steps of a stage's loop, with a progress bar.

    Args:
      first: first step to run.
      total: total number of steps.
      workdir: folder of the stage.
      profile: (start, end) of the steps to profile, end exclusive; the trace is written
        to `profile/` for TensorBoard or xprof. () profiles none.

    Raises:
      UserError: there are more steps already.
    """
    if first > total:
        raise UserError(
            f"{workdir} has a checkpoint of step {first}, the config has steps={total}: "
            f"a training cannot be made shorter. Set steps={first}, or use another workdir."
        )
    begin, end = profile or (-1, -1)
    with progress(first, total, workdir.name) as bar, contextlib.ExitStack() as tracing:
        for step in range(first, total):
            if step == begin:
                tracing.enter_context(jax.profiler.trace(str(workdir / "profile")))
            elif step == end:
                tracing.close()
            watchdog.progress(f"{workdir.name}, step {step}")
            yield step
            bar.update()


def progress(first: int, total: int | None, what: str, unit: str = "step") -> tqdm.tqdm:
    """A progress bar with rate and remaining time."""
    shown = {"desc": what, "unit": unit, "disable": not hosts.is_first()}
    return _Bar(initial=first, total=total, smoothing=0.1, **shown)


class _Bar(tqdm.tqdm):
    """Tells the watchdog, too."""

    desc = ""  # a bar that is not shown has none

    def update(self, n: float = 1) -> bool | None:
        """Moves the bar on."""
        watchdog.progress(f"{self.desc}, {n} more")
        return super().update(n)
