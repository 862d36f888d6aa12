"""Sources of problems and traces, and the Grain iterators over them."""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import grain

from rlt_jax.data import traces as files
from rlt_jax.data.examples import Example
from rlt_jax.data.rows import PackedBatches, RowShape
from rlt_jax.data.tasks import arithmetic, benchmarks, gpqa, gsm8k, reasoning_gym
from rlt_jax.data.templates import Template, load_template
from rlt_jax.errors import UserError, as_user_error
from rlt_jax.ranges import NonNegativeFloat, OneOf, check_value, hints_of
from rlt_jax.records import Problem, Trace
from rlt_jax.settings import Section, bind, build, load_function, owner_of_keys
from rlt_jax.types import Batch

PROBLEMS: dict[str, Callable[..., list[Problem]]] = {
    "arithmetic": arithmetic.problems,
    "gsm8k": gsm8k.problems,
    **{key: functools.partial(benchmarks.problems, key) for key in benchmarks.SOURCES},
    "gpqa": gpqa.problems,
    "reasoning_gym": reasoning_gym.problems,
    "file": files.read_problems,
}
TRACES: dict[str, Callable[..., list[Trace]]] = {
    "arithmetic": arithmetic.traces,
    "gsm8k": gsm8k.traces,
    "file": files.read_traces,
}

MIX = "mix"
PART = Annotated[str, OneOf(("all", "train", "held_out"))]

# No threads that read ahead: they would only compete for the interpreter.
_IN_MEMORY = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def load_problems(
    config: Section, template: Template, seed: int, where: str = "data"
) -> list[Problem]:
    """Problems of a section, named `where` in messages; one at least.

    `task` picks the source, the other keys are passed on.

    A task of the user's is a function, "module:function", with keyword arguments or one
    dataclass for the other keys; see experiments/countdown.py. `part` chooses a part of
    what any source gives, see `split`.
    Sources that parse tags get the template, sources that generate get the run's seed.
    The keys of a source are the arguments of its function: of "file" they are those of
    `traces.read_problems`, path, limit, grader and on_bad_row.

    Raises:
      UserError: the section is wrong, or what it names is, or has no problems.
    """
    return _bind(PROBLEMS, config, {"template": template, "seed": seed}, where)()


def load_traces(
    config: Section, template: Template, seed: int, where: str = "data"
) -> list[Trace]:
    """Traces of a section, named `where` in messages; see `load_problems`.

    The keys of "file" are those of `traces.read_traces`: path, limit, keep_cut_off,
    missing_trace and on_bad_row.
    """
    return _bind(TRACES, config, {"template": template, "seed": seed}, where)()


def check_problems(config: Any, where: str) -> None:
    """Raises UserError for a `data` section of problems that cannot be; reads no file."""
    _bind(PROBLEMS, config, {"template": load_template("tiny"), "seed": 0}, where)


def check_traces(config: Any, where: str) -> None:
    """The same for traces."""
    _bind(TRACES, config, {"template": load_template("tiny"), "seed": 0}, where)


def check_sources(config: Any, where: str) -> None:
    """The same for traces or a mix of them."""
    is_mix = isinstance(config, Mapping) and config.get("task") == MIX
    for name, keys, _ in _parts(config, where) if is_mix else [(where, config, 1.0)]:
        check_traces(keys, name)


class Source(NamedTuple):
    """Traces of one origin.

    Attributes:
      where: name of its config section.
      weight: its part of the training sequences, relative to other sources.
      traces: all its traces.
    """

    where: str
    weight: float
    traces: list[Trace]


def load_sources(config: Section, template: Template, seed: int) -> list[Source]:
    """The traces of a `data` section: one source, or those of a mix, by name.

    A mix has `sources`, from names to sections as `load_traces` reads them, each with a
    `share` (1 where it has none, 0 leaves it out):

        {"task": "mix", "sources": {"ours": {"task": "file", "path": p, "share": 2.0},
                                    "theirs": {"task": "file", "path": q}}}
    """
    if config.get("task") != MIX:
        return [Source("data", 1.0, load_traces(config, template, seed))]
    parts = [part for part in _parts(config, "data") if part[-1]]
    if not parts:
        raise UserError("data.sources: none has a share above 0.")
    return [
        Source(where, share, load_traces(keys, template, seed, where))
        for where, keys, share in parts
    ]


def _parts(config: Section, where: str) -> list[tuple[str, Section, float]]:
    """Name, section without `share`, and share of each source of a mix, sorted by name."""
    sources, parts = build(lambda task, sources: sources, config, where), []
    check_value(f"{where}.sources", Section, sources)
    for name in sorted(sources, key=str):
        of_part = f"{where}.sources.{name}"
        check_value(of_part, Section, sources[name])
        keys = {"share": 1.0, **sources[name]}
        check_value(f"{of_part}.share", NonNegativeFloat, share := keys.pop("share"))
        parts.append((of_part, keys, share))
    return parts


def _bind(
    sources: dict[str, Callable[..., list]], config: Section, given: Section, where: str
) -> Callable[[], list]:
    """A call that loads a section, all of whose keys are checked before."""
    check_value(where, Section, config)
    keys = dict(config)
    part, task = keys.pop("part", "all"), keys.pop("task", None)
    check_value(f"{where}.task", str | None, task)
    check_value(f"{where}.part", PART, part)
    if task not in sources and ":" not in str(task):
        raise UserError(
            f"{where}.task={task!r}: choose one of {', '.join(sources)}; or name a "
            'function of your own, "module:function"'
            + " (now experiments.countdown:problems or :traces)" * (task == "countdown")
            + "."
        )
    source = sources.get(task) or load_function(task)
    with as_user_error(f"{where}.task={task!r}", TypeError, ValueError):
        wanted = hints_of(owner_of_keys(source))
    where = f"{where} of task {task!r}"
    if taken := sorted(keys.keys() & given.keys()):
        raise UserError(f"{where}: {taken[0]!r} is the run's own, set it there.")
    keys |= {name: value for name, value in given.items() if name in wanted}
    load, kind = bind(source, keys, where), Trace if sources is TRACES else Problem

    def load_part() -> list:
        loaded = load()
        if not isinstance(loaded, list) or any(type(x) is not kind for x in loaded):
            raise UserError(f"{where}: it must give a list, each a {kind.__name__}.")
        return split(loaded, part, where)

    return load_part


def split(loaded: list[Problem] | list[Trace], part: str, where: str) -> list:
    """The part of problems or traces that is for training, or held out.

    A tenth of the questions is held out, two at least. A question is wholly in one part,
    which depends on the set of questions alone: problems and traces of the same files, and
    other seeds, agree.

    Args:
      loaded: problems or traces.
      part: "train", "held_out", or "all".
      where: names the data in messages.

    Raises:
      UserError: no problems, or fewer than four questions to hold some out.
    """
    if not loaded:
        raise UserError(f"{where}: it has no problems; change its settings or data.")
    if part == "all":
        return loaded
    questions = [getattr(one, "problem", one).question for one in loaded]
    ordered = sorted(set(questions), key=lambda q: hashlib.sha256(q.encode()).digest())
    if len(ordered) < 4:
        raise UserError(
            f"{where} has {len(ordered)} different questions; to hold some out it needs "
            "four or more. Give held-out questions of their own instead."
        )
    held_out = set(ordered[: max(2, math.ceil(len(ordered) / 10))])
    pairs = zip(loaded, questions, strict=True)
    return [one for one, q in pairs if (q in held_out) == (part == "held_out")]


def packed_batches(
    sources: Sequence[Sequence[Example]],
    weights: Sequence[float],
    shape: RowShape,
    num_rows: int,
    seed: int,
) -> PackedBatches:
    """Endless shuffled batches of packed rows; the iterator's state can be saved.

    Every pass over the examples of a source has its own order, and among the sequences
    each source has a part in proportion to its weight.

    Args:
      sources: examples of each source.
      weights: weight of each source in the mix.
      shape: of the packed rows.
      num_rows: rows of a batch.
      seed: seed of the shuffles.
    """
    streams = [_stream(s).seed(seed + n).shuffle() for n, s in enumerate(sources)]
    mixed, *others = [stream.repeat() for stream in streams]
    if others:
        mixed = grain.MapDataset.mix([mixed, *others], weights=weights)
    return PackedBatches(mixed, shape, num_rows)


def all_batches(made: Sequence[Example], shape: RowShape, num_rows: int) -> list[Batch]:
    """Batches as from `packed_batches` that hold every example once."""
    return list(PackedBatches(_stream(made), shape, num_rows))


def _stream(made: Sequence[Example]) -> grain.MapDataset:
    records = [{"tokens": one.tokens, "loss_mask": one.loss_mask} for one in made]
    return grain.MapDataset.source(records)


def problem_batches(
    problems: Sequence[Problem], batch_size: int, seed: int
) -> grain.DatasetIterator:
    """Endless shuffled lists of `batch_size` indices of problems, int64 arrays."""
    count = len(problems)
    if count < batch_size:
        raise UserError(f"batch_size={batch_size} prompts, but only {count} problems.")
    dataset = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    # The remainder of an endless data set is computed in floats, which overflow.
    batches = dataset.batch(batch_size, drop_remainder=True)
    return iter(batches.to_iter_dataset(_IN_MEMORY))
