"""Sources of problems and traces, and the Grain iterators over them."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
    problems = files.read_problems(path, template, limit)
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

MIX = "mix"

# No threads that read ahead: they would only compete for the interpreter.
_IN_MEMORY = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def load_problems(
    config: Mapping[str, Any], template: Template, seed: int
) -> list[Problem]:
    """Problems of a `data` section: `task` picks the source, the rest is passed on.

    Sources that parse tags are given the template, those that generate the run's seed.
    """
    return _load(PROBLEMS, config, {"template": template, "seed": seed}, "data")


def load_traces(
    config: Mapping[str, Any], template: Template, seed: int, where: str = "data"
) -> list[Trace]:
    """Traces of a section, named `where` in messages; see `load_problems`."""
    return _load(TRACES, config, {"template": template, "seed": seed}, where)


class Source(NamedTuple):
    """Traces of one origin.

    Attributes:
      where: its section.
      share: rows of it that are seen in training, relative to other sources.
      traces: all that it has.
    """

    where: str
    share: float
    traces: list[Trace]


def load_sources(
    config: Mapping[str, Any], template: Template, seed: int
) -> list[Source]:
    """The traces of a `data` section: one source, or those of a mix, by name.

    A mix has `sources`, from names to sections as `load_traces` reads them, each with a
    `share` (1 where it has none, 0 leaves it out):

        {"task": "mix", "sources": {"ours": {"task": "file", "path": p, "share": 2.0},
                                    "theirs": {"task": "file", "path": q}}}
    """
    if config.get("task") != MIX:
        return [Source("data", 1.0, load_traces(config, template, seed))]
    found = []
    for where, section in settings.build(_sections, config, "data"):
        keys = dict(section)
        share = keys.pop("share", 1.0)
        if not isinstance(share, int | float) or not 0 <= share < float("inf"):
            raise UserError(f"{where}.share={share!r}: a number from 0.")
        if share:
            traces = load_traces(keys, template, seed, where)
            found.append(Source(where, share, traces))
    if not found:
        raise UserError("data.sources: none has a share above 0.")
    return found


def _sections(task: str, sources: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Those of a mix, by name, and where they stand; `task` is known."""
    found = {"data.sources": sources}
    if isinstance(sources, Mapping):
        found = {f"data.sources.{name}": sources[name] for name in sorted(sources)}
    for where, section in found.items():
        if not isinstance(section, Mapping):
            raise UserError(f"{where} is {section!r}; give it as keys and values.")
    return list(found.items())


def _load(
    sources: dict[str, Callable[..., list]],
    config: Mapping[str, Any],
    given: Mapping[str, Any],
    where: str,
) -> list:
    keys = dict(config)
    task = keys.pop("task", None)
    if task not in sources:
        raise UserError(f"{where}.task={task!r}: choose one of {', '.join(sources)}.")
    wanted = inspect.signature(settings.owner_of_keys(sources[task])).parameters
    where = f"{where} of task {task!r}"
    if taken := sorted(keys.keys() & given.keys()):
        raise UserError(f"{where}: {taken[0]!r} is the run's own, set it there.")
    keys |= {name: value for name, value in given.items() if name in wanted}
    return settings.build(sources[task], keys, where)


def packed_batches(
    sources: Sequence[Sequence[Row]],
    shares: Sequence[float],
    batch_size: int,
    row_length: int,
    seed: int,
) -> grain.DatasetIterator:
    """Endless shuffled batches of packed rows; the iterator's state can be saved.

    Every pass over the rows of a source has its own order, and of any number of rows in
    sequence each source has its share. Each batch is a dict of arrays
    [batch_size, row_length]: tokens, segment_ids, positions (int32), loss_mask (bool).
    """
    datasets = [
        _features(rows).seed(seed + n).shuffle().repeat()
        for n, rows in enumerate(sources)
    ]
    mixed = datasets[0]
    if len(datasets) > 1:
        mixed = grain.MapDataset.mix(datasets, weights=shares)
    return iter(_packed(mixed, batch_size, row_length, seed))


def all_batches(
    rows: Sequence[Row], batch_size: int, row_length: int
) -> list[dict[str, np.ndarray]]:
    """Batches as of `packed_batches` that hold every row once, the last one padded."""

    def padded(x: np.ndarray) -> np.ndarray:
        return np.pad(x, ((0, batch_size - len(x)), (0, 0)))

    batches = _packed(_features(rows), batch_size, row_length, seed=0)
    return [{name: padded(x) for name, x in batch.items()} for batch in batches]


def _features(rows: Sequence[Row]) -> grain.MapDataset:
    return grain.MapDataset.source(
        [{"tokens": row.tokens, "loss_mask": row.loss_mask} for row in rows]
    )


def _packed(
    rows: grain.MapDataset, batch_size: int, row_length: int, seed: int
) -> grain.IterDataset:
    packed = grain.experimental.FirstFitPackIterDataset(
        rows.to_iter_dataset(_IN_MEMORY),
        length_struct={"tokens": row_length, "loss_mask": row_length},
        num_packing_bins=2 * batch_size,
        seed=seed,
    )
    return packed.map(_name_fields).batch(batch_size)


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
