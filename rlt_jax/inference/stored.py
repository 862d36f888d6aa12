"""Completions on disk: written as they end, read again by whoever goes on or replays."""

import itertools
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from rlt_jax.errors import UserError
from rlt_jax.inference.engine import Engine, Occupancy, complete
from rlt_jax.inference.scheduler import Request
from rlt_jax.training import hosts
from rlt_jax.training.metrics import append_jsonl, stream_jsonl
from rlt_jax.types import Completion, Params


def complete_stored(
    file: Path,
    engine: Engine,
    params: Params,
    requests: Sequence[Request],
    key: jax.Array,
    occupancy: Occupancy | None = None,
    bar: tqdm.tqdm | None = None,
) -> Iterator[tuple[int, Completion]]:
    """`complete`, but every completion is kept in a JSONL file, and none made twice.

    A progress bar shows the tokens drawn per second.

    Yields:
      First what the file holds, then the others as they end.

    Raises:
      UserError: the file holds a completion of another prompt under a request's id.
    """
    numbers = {request.request_id: n for n, request in enumerate(requests)}
    missing = set(range(len(requests)))
    for row in _rows(file):
        n = numbers.get(row["request"])
        if n not in missing:
            continue
        if row["prompt"] != _fingerprint(requests[n]):
            raise UserError(
                f"{file}: request {row['request']} has another prompt than this run; "
                "it was written with other settings. Remove it or name another."
            )
        missing.remove(n)
        tokens = np.array(row["tokens"], np.int32)
        log_probs = np.array(row["log_probs"], np.float32)
        yield n, Completion(tokens, log_probs, row["finished"])
    left = sorted(missing)
    part = [requests[n] for n in left]
    began, drawn = time.monotonic(), 0
    for i, completion in complete(engine, params, part, key, occupancy):
        append_jsonl(file, [_row(part[i], completion)])
        drawn += len(completion.tokens)
        if bar is not None:
            rate = drawn / (time.monotonic() - began)
            bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        yield left[i], completion


def roll_out(
    engine: Engine,
    params: Params,
    requests: Sequence[Request],
    key: jax.Array,
    occupancy: Occupancy | None = None,
    file: Path | None = None,
) -> list[Completion]:
    """All completions in the order of the requests, kept in a file if there is one."""
    if file:
        if hosts.is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
        made = complete_stored(file, engine, params, requests, key, occupancy)
    else:
        made = complete(engine, params, requests, key, occupancy)
    done = dict(made)
    return [done[n] for n in range(len(requests))]


def in_order(
    done: Iterable[tuple[int, Completion]], batch_size: int
) -> Iterator[list[Completion]]:
    """Batches of consecutive completions, each as soon as it is whole."""
    waiting: dict[int, Completion] = {}
    first = 0
    for n, completion in done:
        waiting[n] = completion
        while all(first + i in waiting for i in range(batch_size)):
            yield [waiting.pop(first + i) for i in range(batch_size)]
            first += batch_size
    if waiting:
        yield [waiting[n] for n in sorted(waiting)]


def _rows(file: Path) -> list[dict[str, Any]]:
    """What the file holds now, in every process; process 0 is about to add to it."""

    def count() -> int:
        if not file.is_file():
            return 0
        with file.open("rb") as lines:
            return sum(line.endswith(b"\n") for line in lines)

    number = hosts.from_first(count)
    rows = list(itertools.islice(stream_jsonl(file), number)) if number else []
    hosts.agree_on_items(f"the rows of {file}", rows)
    return rows


def _row(request: Request, completion: Completion) -> dict[str, Any]:
    return {
        "request": request.request_id,
        "prompt": _fingerprint(request),
        "tokens": completion.tokens.tolist(),
        "log_probs": completion.log_probs.tolist(),
        "finished": completion.finished,
    }


def _fingerprint(request: Request) -> int:
    prompt = np.asarray(request.prompt, np.int32)
    return zlib.crc32(prompt.tobytes() + bytes(str(request.longest), "ascii"))
