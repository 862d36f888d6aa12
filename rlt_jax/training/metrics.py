"""Metrics in JSON Lines and TensorBoard files, and progress bars.

With several processes, only process 0 writes files and shows progress.
"""

import contextlib
import json
import math
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import tensorboardX
import tqdm

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
        keep_records(self._file, lambda record: record["step"] < first_step)
        folder, is_first = str(workdir / "tensorboard"), hosts.is_first()
        self._events = tensorboardX.SummaryWriter(
            folder, purge_step=first_step, write_to_disk=is_first
        )
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
        step, metrics = self._pending
        self._pending = None
        numbers = {k: float(v) for k, v in jax.device_get(metrics).items()}
        append_jsonl(self._file, [{"step": step, **numbers}])
        for name, number in numbers.items():
            self._events.add_scalar(name, number, step)
        return numbers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        # After an error, metrics from the devices of other processes may never arrive.
        if error is None or jax.process_count() == 1:
            self.flush()
        self._events.close()


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


def append_jsonl(file: Path, records: list[dict[str, Any]]) -> None:
    """Appends records to a JSON Lines file, after dropping an incomplete last line.

    Numbers that are not finite are written as null, as JSON has none of them.
    """
    if not hosts.is_first():
        return
    with file.open("ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            if lines.read() != b"\n":
                lines.seek(0)
                lines.truncate(lines.read().rfind(b"\n") + 1)
        for record in records:
            text = json.dumps(finite(record), ensure_ascii=False, allow_nan=False)
            # Lone surrogates are written as JSON escapes.
            lines.write(text.encode("utf-8", "backslashreplace") + b"\n")


def finite(value: Any) -> Any:
    """A JSON value with None in the place of infinities and NaNs."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Reads the records of a JSON Lines file, without an incomplete last line."""
    return list(stream_jsonl(file))


def stream_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a JSON Lines file, without an incomplete last line."""
    with file.open("rb") as lines:  # bytes: texts may contain other line separators
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)


def keep_records(file: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the records of a JSONL file that are not to be kept."""
    if hosts.is_first() and file.is_file():
        _rewrite(file, [record for record in read_jsonl(file) if keep(record)])


def keep_whole_batches(file: Path, batch_size: int) -> int:
    """Drops the records of an incomplete batch, which a resumed run writes again.

    Results depend, in their last bits, on the other sequences of the batch, so a resumed
    run equals an uninterrupted one only from the start of a batch.

    Returns:
      The number of remaining records; 0 if there is no file.
    """

    def keep() -> int:
        if not file.is_file():
            return 0
        records = read_jsonl(file)
        count = len(records) // batch_size * batch_size
        _rewrite(file, records[:count])
        return count

    return hosts.from_first(keep)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Writes all of the file or, cut off in between, nothing under its name."""
    unfinished = file.with_name(file.name + ".partial")
    unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


def _rewrite(file: Path, records: list[dict[str, Any]]) -> None:
    """Replaces the records of a file atomically."""
    partial = file.with_name(file.name + ".partial")
    partial.unlink(missing_ok=True)
    append_jsonl(partial, records)
    partial.replace(file)


def steps(
    first: int, total: int, workdir: Path, profile: Sequence[int] = ()
) -> Iterator[int]:
    """Yields the steps of a stage's loop, with a progress bar.

    Args:
      first: first step to run.
      total: total number of steps.
      workdir: folder of the stage.
      profile: (start, end) of the steps to profile, end exclusive; the trace is written
        to `profile/` for TensorBoard or xprof. () profiles none.
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
    """A progress bar with rate and remaining time."""
    shown = {"desc": what, "unit": unit, "disable": not hosts.is_first()}
    return tqdm.tqdm(initial=first, total=total, smoothing=0.1, **shown)
