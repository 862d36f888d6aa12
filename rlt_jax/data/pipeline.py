"""Sources of problems and traces, and the Grain iterators over them."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from rlt_jax import settings
from rlt_jax.data import traces as files
from rlt_jax.data.examples import Row
from rlt_jax.data.tasks import arithmetic, benchmarks, countdown, gpqa, gsm8k
from rlt_jax.data.templates import Problem, Template, Trace
from rlt_jax.errors import UserError


def file_problems(
    path: str, template: Template, limit: int | None = None, grader: str = "math"
) -> list[Problem]:
    """Problems of the user's files, the first `limit`; see `files.read_problems`."""
    problems = files.read_problems(path, template)[:limit]
    return [problem._replace(grader=grader) for problem in problems]


PROBLEMS: dict[str, Callable[..., list[Problem]]] = {
    "arithmetic": arithmetic.problems,
    "countdown": countdown.problems,
    "gsm8k": gsm8k.problems,
    **{
        name: functools.partial(benchmarks.problems, name)
        for name in benchmarks.SOURCES
    },
    "gpqa": gpqa.problems,
    "file": file_problems,
}
TRACES: dict[str, Callable[..., list[Trace]]] = {
    "arithmetic": arithmetic.traces,
    "countdown": countdown.traces,
    "gsm8k": gsm8k.traces,
    "file": files.read_traces,
}

# No threads that read ahead: they would only compete for the interpreter.
_IN_MEMORY = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def load_problems(
    config: Mapping[str, Any], template: Template, seed: int
) -> list[Problem]:
    """Problems of a `data` section: `task` picks the source, the rest is passed on.

    Sources that parse tags are given the template, those that generate the run's seed.
    """
    return _load(PROBLEMS, config, {"template": template, "seed": seed})


def load_traces(
    config: Mapping[str, Any], template: Template, seed: int
) -> list[Trace]:
    """Traces of a `data` section; see `load_problems`."""
    return _load(TRACES, config, {"template": template, "seed": seed})


def _load(
    sources: dict[str, Callable[..., list]],
    config: Mapping[str, Any],
    given: Mapping[str, Any],
) -> list:
    keys = dict(config)
    task = keys.pop("task", None)
    if task not in sources:
        raise UserError(f"data.task={task!r}: choose one of {', '.join(sources)}.")
    wanted = inspect.signature(sources[task]).parameters
    where = f"data of task {task!r}"
    if taken := sorted(keys.keys() & given.keys()):
        raise UserError(f"{where}: {taken[0]!r} is the run's own, set it there.")
    keys |= {name: value for name, value in given.items() if name in wanted}
    return settings.build(sources[task], keys, where)


def packed_batches(
    rows: Sequence[Row], batch_size: int, row_length: int, seed: int
) -> grain.DatasetIterator:
    """Endless shuffled batches of packed rows; the iterator's state can be saved.

    Every pass over the rows has its own order. Each batch is a dict of arrays
    [batch_size, row_length]: tokens, segment_ids, positions (int32), loss_mask (bool).
    """
    features = [{"tokens": row.tokens, "loss_mask": row.loss_mask} for row in rows]
    dataset = grain.MapDataset.source(features).seed(seed).shuffle().repeat()
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset.to_iter_dataset(_IN_MEMORY),
        length_struct={"tokens": row_length, "loss_mask": row_length},
        num_packing_bins=2 * batch_size,
        seed=seed,
    )
    return iter(packed.map(_name_fields).batch(batch_size))


def problem_batches(
    problems: Sequence[Problem], batch_size: int, seed: int
) -> grain.DatasetIterator:
    """Endless shuffled lists of `batch_size` indices of problems, int64 arrays."""
    if len(problems) < batch_size:
        raise UserError(
            f"batch_size={batch_size} prompts, but only {len(problems)} problems."
        )
    dataset = grain.MapDataset.range(len(problems)).seed(seed).shuffle().repeat()
    # The remainder of an endless data set is computed in floats, which overflow.
    batches = dataset.batch(batch_size, drop_remainder=True)
    return iter(batches.to_iter_dataset(_IN_MEMORY))


def _name_fields(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "tokens": packed["tokens"].astype(np.int32),
        "segment_ids": packed["tokens_segment_ids"],
        "positions": packed["tokens_positions"],
        "loss_mask": packed["loss_mask"],
    }
