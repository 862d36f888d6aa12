"""Sizes of the engine: slots, pages, chunks, and whether they fit."""

import dataclasses
import os
from typing import Annotated, NamedTuple

from jax.sharding import Mesh

from rlt_jax.errors import UserError
from rlt_jax.inference.decode import CPU_TILES
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.paged_cache import page_bytes
from rlt_jax.models.transformer import Transformer
from rlt_jax.ranges import Checked, Count, OneOf, Range, Size
from rlt_jax.training.sharding import num_groups
from rlt_jax.types import Requests


@dataclasses.dataclass(frozen=True)
class EngineConfig(Checked):
    """Sizes of the engine.

    Attributes:
      slots: completions decoded at once, over all devices.
      page_size: C, tokens in a page of the cache.
      cache_tokens: tokens the cache holds, over all devices; None is room for the longest
        sequence in every slot.
      steps: decode steps per dispatch; a slot that ends waits for up to twice as many.
      prefill_chunk: tokens of a prompt computed at once.
      weights: "model" decodes with the parameters unchanged, "bfloat16" rounds them,
        "int8" rounds the kernels of layers, with a scale for each of their outputs.
    """

    slots: Count = 16
    page_size: Size = 64
    cache_tokens: Annotated[int, Range(1)] | None = None
    steps: Size = 8
    prefill_chunk: Size = 512
    weights: Annotated[str, OneOf(("model", "bfloat16", "int8"))] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefill_chunk % self.page_size:
            sizes = f"{self.prefill_chunk} is no multiple of page_size={self.page_size}"
            raise UserError(f"engine.prefill_chunk={sizes}.")

    @property
    def prefill_sizes(self) -> tuple[int, ...]:
        """Sizes of the parts of a prompt: page size times powers of two."""
        sizes = [self.page_size]
        while sizes[-1] < self.prefill_chunk:
            sizes.append(min(2 * sizes[-1], self.prefill_chunk))
        return tuple(sizes)


class Layout(NamedTuple):
    """Sizes of a scheduler's arrays.

    Attributes:
      shards: independent parts of slots and pages.
      slots: slots of each shard.
      pages: pages of each shard, page 0 included.
      page_size: C, tokens a page.
      columns: pages of the longest sequence.
      steps: decode steps of a dispatch.
      seen_size: V with a repetition penalty, else 0.
      tile: slots computed at once, a divisor of `slots`.
    """

    shards: int
    slots: int
    pages: int
    page_size: int
    columns: int
    steps: int
    seen_size: int = 0
    tile: int = 1


def make_layout(
    model: Transformer,
    sampling: SamplingConfig,
    config: EngineConfig,
    mesh: Mesh,
    max_length: int,
) -> Layout:
    """Sizes on this mesh; see `make_engine`."""
    if max_length > model.config.max_length:
        raise UserError(
            f"prompt and completion may have {max_length} tokens, the model's context is "
            f"{model.config.max_length}: shorten sampling.max_new_tokens or the prompts."
        )
    shards, C, slots = num_groups(mesh), config.page_size, config.slots
    if slots % shards:
        raise UserError(f"slots={slots} is no multiple of data * fsdp = {shards}.")
    tile = slots = slots // shards
    if on_cpu(mesh):  # see CPU_TILES
        tile = CPU_TILES[0] if slots <= CPU_TILES[0] else CPU_TILES[1]
        slots = -(-slots // tile) * tile
    columns = -(-max_length // C)
    pages = slots * (columns + 1)
    if config.cache_tokens is not None:
        pages = config.cache_tokens // (C * shards)
    seen = model.config.vocab_size if sampling.repetition_penalty != 1 else 0
    return Layout(shards, slots, 1 + pages, C, columns, config.steps, seen, tile)


def on_cpu(mesh: Mesh) -> bool:
    """Whether the mesh is made of CPU devices."""
    return mesh.devices.flat[0].platform == "cpu"


def check_memory(model: Transformer, layout: Layout, mesh: Mesh) -> None:
    """Refuses a cache that the devices have no room for, before it is made."""
    a_page = page_bytes(model.config, layout.page_size) // mesh.shape["tensor"]
    if on_cpu(mesh):  # all devices share the memory of the machine
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        a_page *= len(mesh.local_devices)
    else:
        stats = mesh.local_devices[0].memory_stats()
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    if layout.pages * a_page > free:
        tokens = layout.shards * layout.page_size
        raise UserError(
            f"the cache of {layout.pages * tokens} tokens needs "
            f"{layout.pages * a_page / 1e9:.2f} GB a device, {free / 1e9:.2f} GB are free: "
            f"at most engine.cache_tokens={free // a_page * tokens} or fewer engine.slots."
        )


def check_requests(layout: Layout, requests: Requests) -> None:
    """Refuses requests that can never be served.

    Raises:
      UserError: an empty prompt, or one longer than the rows or the cache with its
        completion.
    """
    C = layout.page_size
    for n, request in enumerate(requests):
        T, new = len(request.prompt), request.max_new_tokens
        if not T:
            raise UserError(f"prompt {n} is empty.")
        if new < 1:
            raise UserError(f"prompt {n}: max_new_tokens={new}: at least 1.")
        what = f"prompt {n} has {T} tokens, with its completion up to {T + new}"
        if T + new > (limit := layout.columns * C):
            raise UserError(f"{what}; the engine was made for rows of {limit}.")
        stored, limit = T - 1, layout.pages - 1
        need = -(-stored // C) - stored // C + -(-(stored + new) // C)
        if need > limit:
            raise UserError(
                f"{what}; the cache of a device group holds {limit * C}. "
                f"Raise engine.cache_tokens to {need * C * layout.shards}."
            )
