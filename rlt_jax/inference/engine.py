"""Generation by continuous batching: a fixed number of slots, requests in and out.

The device runs many steps a dispatch. While it does, the host takes the results of the
dispatch before, frees the slots of what has ended and gives them to the next requests.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from rlt_jax.data.stop_texts import StopFinder
from rlt_jax.inference.decode import CPU_TILES, DecodeConfig, Slots, decode, prefill
from rlt_jax.inference.layout import (
    EngineConfig,
    Layout,
    Request,
    check_requests,
    make_layout,
    on_cpu,
    prefill_sizes,
)
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.scheduler import Prefill, Scheduler
from rlt_jax.inference.weights import decode_weights
from rlt_jax.models.paged_cache import empty_pages
from rlt_jax.models.transformer import Transformer
from rlt_jax.training.sharding import (
    DECODING_RULES,
    batch_sharding,
    decoding_shardings,
    jit,
    replicated,
)
from rlt_jax.types import Completion, PagedCache, Params

SHARD_AXES = ("data", "fsdp")


class Engine(NamedTuple):
    """Compiled programs and sizes; see `make_engine`."""

    layout: Layout
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    find_stop: StopFinder | None
    chunks: tuple[int, ...]
    new_cache: Callable[[], tuple[PagedCache, Slots]]
    to_decode: Callable[[Params], Params]
    prefill: Callable[..., PagedCache]
    decode: Callable[..., Any]


@dataclasses.dataclass
class Occupancy:
    """How well the slots were used.

    Attributes:
      used: slot-steps that drew a token of a completion.
      run: slot-steps that were computed.
    """

    used: int = 0
    run: int = 0


def make_engine(
    model: Transformer,
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    config: EngineConfig,
    mesh: Mesh,
    longest_row: int,
    find_stop: StopFinder | None = None,
) -> Engine:
    """Builds the programs; they compile at their first use.

    Whether the cache fits on the devices is for `check_memory` to say.

    Args:
      model: the transformer.
      sampling: how tokens are drawn.
      stop_ids: tokens that end a completion.
      config: sizes.
      mesh: slots and pages are split over data and fsdp, heads over tensor.
      longest_row: tokens of the longest prompt with its completion.
      find_stop: finds the texts of `sampling.stop`; see `stop_finder`.

    Raises:
      UserError: a row does not fit in the model.
    """
    layout = make_layout(model, sampling, config, mesh, longest_row)
    reader, to_decode, axes = decode_weights(model, config.weights)
    tile = CPU_TILES[1] if on_cpu(mesh) else layout.slots
    static = DecodeConfig(reader, sampling, tuple(stop_ids), config.steps, tile)
    steps = functools.partial(decode, static)

    whole, rows, drawn = Spec(), Spec(SHARD_AXES), Spec(None, SHARD_AXES)
    pools = PagedCache(*[Spec(None, None, SHARD_AXES)] * 2, whole)
    cache = cache_shardings(mesh)
    fill = functools.partial(prefill, reader)
    fill = _split(mesh, fill, (whole, pools, *[rows] * 3), pools)
    draw = _split(mesh, steps, (whole, pools, rows, rows, whole), (pools, rows, drawn))
    on_shards = functools.partial(jit, mesh=mesh, rules=DECODING_RULES)
    return Engine(
        layout,
        sampling,
        tuple(stop_ids),
        find_stop,
        prefill_sizes(config),
        jax.jit(
            functools.partial(_empty, model, layout),
            out_shardings=(cache, batch_sharding(mesh)),
        ),
        jax.jit(to_decode, out_shardings=decoding_shardings(axes, mesh)),
        on_shards(fill, donate_argnums=1, out_shardings=cache),
        on_shards(
            draw,
            donate_argnums=(1, 2),
            # Every host reads all that is drawn.
            out_shardings=(cache, batch_sharding(mesh), replicated(mesh)),
        ),
    )


def cache_shardings(mesh: Mesh) -> PagedCache:
    """Pages are split over data and fsdp, heads over tensor."""
    pool = NamedSharding(mesh, Spec("tensor", None, SHARD_AXES))
    return PagedCache(pool, pool, replicated(mesh))


def complete(
    engine: Engine,
    params: Params,
    requests: Sequence[Request],
    key: jax.Array,
    occupancy: Occupancy | None = None,
) -> Iterator[tuple[int, Completion]]:
    """Completes requests, in the order in which they end.

    Args:
      engine: of this model.
      params: in the layout of training or of decoding.
      requests: see `check_requests`.
      key: PRNG key; a completion depends on it, its request and the parameters alone.
      occupancy: is counted up.

    Yields:
      Index of the request and its completion.

    Raises:
      UserError: a request is empty or too long.
    """
    check_requests(engine.layout, requests)
    params = engine.to_decode(params)
    cache, slots = engine.new_cache()
    scheduler = Scheduler(requests, engine.layout, engine.stop_ids, engine.find_stop)
    under_way = None
    while scheduler.unfinished:
        prefills, refill, owners = scheduler.plan()
        for part in _chunked(prefills, engine.chunks, engine.layout):
            cache = engine.prefill(params, cache, *part)
        cache, slots, drawn = engine.decode(params, cache, slots, refill, key)
        if under_way is not None:
            yield from _take(scheduler, *under_way, occupancy)
        under_way = drawn, owners


def _take(
    scheduler: Scheduler, drawn: Any, owners: list, occupancy: Occupancy | None
) -> list[tuple[int, Completion]]:
    drawn = jax.device_get(drawn)
    if occupancy is not None:
        occupancy.used += int(drawn.mask.sum())
        occupancy.run += int(drawn.mask.any(axis=1).sum()) * drawn.mask.shape[1]
    return scheduler.absorb(drawn, owners)


def _chunked(
    prefills: list[Prefill], chunks: tuple[int, ...], layout: Layout
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Parts of prompts, one of every shard at a time: table, tokens, start."""
    waiting: list[dict[int, list]] = [{} for _ in range(layout.shards)]
    for one in prefills:
        start = 0
        while start < len(one.tokens):
            rest = len(one.tokens) - start
            size = next((c for c in chunks if c >= rest), chunks[-1])
            waiting[one.shard].setdefault(size, []).append((one, start))
            start += size
    for size in reversed(chunks):  # a prompt's last part is its smallest
        queues = [parts.get(size, []) for parts in waiting]
        for now in itertools.zip_longest(*queues):
            # A shard without such a part writes to page 0.
            table = np.zeros((layout.shards, layout.columns), np.int32)
            tokens = np.zeros((layout.shards, size), np.int32)
            starts = np.zeros(layout.shards, np.int32)
            for shard, part in enumerate(now):
                if part:
                    one, starts[shard] = part
                    piece = one.tokens[starts[shard] :][:size]
                    table[shard], tokens[shard, : len(piece)] = one.pages, piece
            yield table, tokens, starts


def _empty(model: Transformer, layout: Layout) -> tuple[PagedCache, Slots]:
    B = layout.shards * layout.slots
    pages = empty_pages(model.config, layout.shards * layout.pages, layout.page_size)
    seen = jnp.zeros((B, layout.seen_size), bool)
    return pages, Slots(*jnp.zeros((5, B), jnp.int32), jnp.zeros(B, bool), seen)


def _split(mesh: Mesh, program: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """The program on each part of slots and pages; tensor is left to the compiler."""
    if mesh.size == 1:
        return program
    return jax.shard_map(
        program,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(SHARD_AXES),
        check_vma=False,
    )
