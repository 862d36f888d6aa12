"""Generation by continuous batching: a fixed number of slots, requests in and out.

The device runs many steps a dispatch. While it does, the host takes the results of the
dispatch before, frees the slots of what has ended and gives them to the next requests.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from rlt_jax.data.stop_texts import StopFinder
from rlt_jax.errors import UserError
from rlt_jax.inference.decode import CPU_TILES, Slots, decode, prefill
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.scheduler import Layout, Prefill, Request, Scheduler
from rlt_jax.models.paged_cache import empty_pages, page_bytes
from rlt_jax.models.transformer import Transformer
from rlt_jax.training.sharding import decoding_shardings
from rlt_jax.types import Completion, PagedCache, Params

SHARD_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine.

    Attributes:
      slots: completions decoded at once, over all devices.
      page_size: C, tokens in a page of the cache.
      cache_tokens: tokens the cache holds, over all devices; None is room for the longest
        row in every slot.
      steps: decode steps a dispatch; a slot that ends waits up to twice as many.
      prefill_chunk: tokens of a prompt computed at once.
      weights: "model" decodes with the parameters as they are, "bfloat16" rounds them.
    """

    slots: int = 16
    page_size: int = 64
    cache_tokens: int | None = None
    steps: int = 8
    prefill_chunk: int = 512
    weights: str = "model"

    def __post_init__(self) -> None:
        for name in ("slots", "page_size", "steps", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"engine.{name}={getattr(self, name)}: at least 1.")
        if self.prefill_chunk % self.page_size:
            raise UserError(
                f"engine.prefill_chunk={self.prefill_chunk} is no multiple of "
                f"page_size={self.page_size}."
            )
        if self.weights not in ("model", "bfloat16"):
            raise UserError(f"engine.weights={self.weights!r}: model or bfloat16.")


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

    Args:
      model: the transformer.
      sampling: how tokens are drawn.
      stop_ids: tokens that end a completion.
      config: sizes.
      mesh: slots and pages are split over data and fsdp, heads over tensor.
      longest_row: tokens of the longest prompt with its completion.
      find_stop: finds the texts of `sampling.stop`; see `stop_finder`.

    Raises:
      UserError: the cache does not fit on the devices, or a row not in the model.
    """
    if longest_row > model.config.max_length:
        raise UserError(
            f"a prompt with its completion may have {longest_row} tokens, the model's "
            f"context is {model.config.max_length}: shorten sampling.max_new_tokens or "
            "the prompts."
        )
    layout = _layout(model, sampling, config, mesh, longest_row)
    _check_memory(model, layout, config, mesh)
    tile = CPU_TILES[1] if _on_cpu(mesh) else layout.slots
    pages = layout.shards * layout.pages
    pool = NamedSharding(mesh, Spec("tensor", None, SHARD_AXES))
    row = NamedSharding(mesh, Spec(SHARD_AXES))

    def new_cache() -> tuple[PagedCache, Slots]:
        B = layout.shards * layout.slots
        numbers = jnp.zeros((5, B), jnp.int32)
        seen = jnp.zeros((B, layout.seen_size), bool)
        slots = Slots(*numbers, jnp.zeros(B, bool), seen)
        return empty_pages(model.config, pages, layout.page_size), slots

    weights = decoding_shardings(model, mesh)

    def cast(params: Params) -> Params:
        if config.weights == "model":
            return params
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    no_table = NamedSharding(mesh, Spec())
    cache = PagedCache(pool, pool, no_table)
    split = functools.partial(_split, mesh)
    chunk = functools.partial(prefill, model)
    steps = functools.partial(
        decode, model, sampling, tuple(stop_ids), config.steps, tile
    )
    on_rows, on_pool = Spec(SHARD_AXES), Spec(None, None, SHARD_AXES)
    pools = PagedCache(on_pool, on_pool, Spec())
    return Engine(
        layout,
        sampling,
        tuple(stop_ids),
        find_stop,
        _chunks(config),
        jax.jit(new_cache, out_shardings=(cache, row)),
        jax.jit(cast, out_shardings=weights),
        jax.jit(
            split(chunk, (Spec(), pools, on_rows, on_rows, on_rows), pools),
            donate_argnums=1,
            out_shardings=cache,
        ),
        jax.jit(
            split(
                steps,
                (Spec(), pools, on_rows, on_rows, Spec()),
                (pools, on_rows, Spec(None, SHARD_AXES)),
            ),
            donate_argnums=(1, 2),
            out_shardings=(cache, row, NamedSharding(mesh, Spec(None, SHARD_AXES))),
        ),
    )


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


def check_requests(layout: Layout, requests: Sequence[Request]) -> None:
    """Refuses requests that can never be served.

    Raises:
      UserError: an empty prompt, or one longer than the rows or the cache with its
        completion.
    """
    C = layout.page_size
    for n, request in enumerate(requests):
        T = len(request.prompt)
        if not T:
            raise UserError(f"prompt {n} is empty.")
        if request.longest < 1:
            raise UserError(
                f"prompt {n}: max_new_tokens={request.longest}: at least 1."
            )
        rows = f"prompt {n} has {T} tokens, with its completion up to "
        rows += f"{T + request.longest}"
        if T + request.longest > layout.columns * C:
            raise UserError(
                f"{rows}; the engine was made for rows of {layout.columns * C}."
            )
        stored = T - 1
        need = -(-stored // C) - stored // C + -(-(stored + request.longest) // C)
        if need > layout.pages - 1:
            raise UserError(
                f"{rows}; the cache of a device group holds {(layout.pages - 1) * C}. "
                f"Raise engine.cache_tokens to {need * C * layout.shards}."
            )


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


def _chunks(config: EngineConfig) -> tuple[int, ...]:
    """Sizes of the parts of a prompt: page size times powers of two."""
    sizes = [config.page_size]
    while sizes[-1] < config.prefill_chunk:
        sizes.append(min(2 * sizes[-1], config.prefill_chunk))
    return tuple(sizes)


def _split(mesh: Mesh, program: Callable, in_specs: tuple, out_specs: Any) -> Callable:
    """A program for each part of slots and pages; tensor is left to the compiler."""
    if mesh.shape["data"] * mesh.shape["fsdp"] == 1:
        return program
    return jax.shard_map(
        program,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(SHARD_AXES),
        check_vma=False,
    )


def _layout(
    model: Transformer,
    sampling: SamplingConfig,
    config: EngineConfig,
    mesh: Mesh,
    longest_row: int,
) -> Layout:
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.slots % shards:
        raise UserError(
            f"engine.slots={config.slots} is no multiple of data * fsdp = {shards}."
        )
    C, slots = config.page_size, config.slots // shards
    if _on_cpu(mesh):  # see CPU_TILES
        tile = CPU_TILES[0] if slots <= CPU_TILES[0] else CPU_TILES[1]
        slots = -(-slots // tile) * tile
    columns = -(-longest_row // C)
    if config.cache_tokens is None:
        pages = 1 + slots * (columns + 1)
    else:
        pages = 1 + config.cache_tokens // (C * shards)
    penalised = sampling.repetition_penalty != 1
    seen = model.config.vocab_size if penalised else 0
    return Layout(shards, slots, pages, C, columns, config.steps, seen)


def _on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _check_memory(
    model: Transformer, layout: Layout, config: EngineConfig, mesh: Mesh
) -> None:
    device = mesh.local_devices[0]
    a_page = page_bytes(model.config, layout.page_size) // mesh.shape["tensor"]
    if _on_cpu(mesh):  # all devices share the memory of the machine
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        a_page *= len(mesh.local_devices)
    else:
        stats = device.memory_stats()
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    if layout.pages * a_page > free:
        fit = free // a_page * layout.page_size * layout.shards
        raise UserError(
            f"the cache of {layout.shards * layout.pages * layout.page_size} tokens needs "
            f"{layout.pages * a_page / 1e9:.2f} GB a device, {free / 1e9:.2f} GB are "
            f"free: at most engine.cache_tokens={fit} fit (engine.slots={config.slots})."
        )
