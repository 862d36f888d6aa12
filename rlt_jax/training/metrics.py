"""Metrics to JSONL and TensorBoard, samples for people, progress bars.

Of several processes only process 0 writes and shows anything.
"""

import contextlib
import json
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import tensorboardX
import tqdm

from rlt_jax.training import hosts


class MetricWriter:
    """Writes the metrics of a stage one step late, so that the device never waits.

    `metrics.jsonl` holds one object per step; the same numbers go to TensorBoard event
    files under `tensorboard/`. Rows of steps after `first_step`, left by a run that was
    cut off later than its last checkpoint, are removed.
    """

    def __init__(self, workdir: Path, first_step: int) -> None:
        self._file = workdir / "metrics.jsonl"
        # Resuming writes the later steps again.
        keep_records(self._file, lambda record: record["step"] < first_step)
        self._events = None
        if hosts.is_first():
            self._events = tensorboardX.SummaryWriter(
                str(workdir / "tensorboard"), purge_step=first_step
            )
        self._pending: tuple[int, Mapping[str, Any]] | None = None

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Takes the (device) scalars of this step; writes and returns the last's."""
        last = self.flush()
        self._pending = (step, dict(metrics))
        return last

    def flush(self) -> dict[str, float]:
        """Writes what is pending, and returns it."""
        if self._pending is None:
            return {}
        step, metrics = self._pending
        self._pending = None
        numbers = {k: float(v) for k, v in jax.device_get(metrics).items()}
        append_jsonl(self._file, [{"step": step, **numbers}])
        if self._events:
            for name, number in numbers.items():
                self._events.add_scalar(name, number, step)
        return numbers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Numbers of a failed step may never come from devices of other processes.
        if error is None or jax.process_count() == 1:
            self.flush()
        if self._events:
            self._events.close()


def memory_metrics() -> dict[str, float]:
    """Peak memory so far in GiB: of the first device, or of the process on CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        peak = stats["peak_bytes_in_use"]
    return {"memory/peak_gib": peak / 2**30}


def phase_metrics(phase: str, tokens: int, seconds: float) -> dict[str, float]:
    """How long part of a step took, its tokens, and how fast they went through."""
    return {
        f"time/{phase}_seconds": seconds,
        f"time/{phase}_tokens": tokens,
        f"time/{phase}_tokens_per_second": tokens / seconds,
    }


def append_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    """Appends one JSON object a line, after dropping a last line cut off in writing."""
    if not hosts.is_first():
        return
    with file.open("ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            if lines.read() != b"\n":
                lines.seek(0)
                lines.truncate(lines.read().rfind(b"\n") + 1)
        for row in rows:
            text = json.dumps(row, ensure_ascii=False)
            # Half a surrogate pair becomes the escape that JSON has for it.
            lines.write(text.encode("utf-8", "backslashreplace") + b"\n")


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file of ours; a last line cut off in writing is left out."""
    return list(stream_jsonl(file))


def stream_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """The same, a row at a time."""
    with file.open("rb") as lines:  # bytes: texts may hold other line ends
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)


def keep_records(file: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the records of a JSONL file that are not to be kept."""
    if hosts.is_first() and file.is_file():
        _rewrite(file, [record for record in read_jsonl(file) if keep(record)])


def keep_whole_batches(file: Path, batch_size: int) -> int:
    """Drops the rows of a batch cut off in writing, as resuming will write it again.

    Rows depend, in their last bits, on the others of their batch: only from the start
    of a batch does a resumed run write what an uninterrupted one would have written.

    Returns:
      Number of rows that are left; 0 when there is no file.
    """

    def keep() -> int:
        if not file.is_file():
            return 0
        rows = read_jsonl(file)
        whole = len(rows) // batch_size * batch_size
        _rewrite(file, rows[:whole])
        return whole

    return hosts.from_first(keep)


def _rewrite(file: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the rows of a file; cut off in between, the old ones stay."""
    rewritten = file.with_name(file.name + ".partial")
    rewritten.unlink(missing_ok=True)
    append_jsonl(rewritten, rows)
    rewritten.replace(file)


def steps(
    first: int, total: int, workdir: Path, profile: Sequence[int] = ()
) -> Iterator[int]:
    """The steps of a stage's loop, with a progress bar.

    Args:
      first: step that is next.
      total: how many there are in all.
      workdir: of the stage.
      profile: a step and the one after the last of those whose trace goes to `profile/`,
        for TensorBoard or xprof; () traces none.
    """
    begin, end = profile or (-1, -1)
    with progress(first, total, workdir.name) as bar, contextlib.ExitStack() as tracing:
        for step in range(first, total):
            if step == begin:
                tracing.enter_context(jax.profiler.trace(str(workdir / "profile")))
            elif step == end:
                tracing.close()
            yield step
            bar.update()


def progress(first: int, total: int | None, what: str, unit: str = "step") -> tqdm.tqdm:
    """A progress bar with rate and time left."""
    return tqdm.tqdm(
        initial=first,
        total=total,
        desc=what,
        unit=unit,
        smoothing=0.1,
        disable=not hosts.is_first(),
    )
