"""Generation by continuous batching: a fixed number of slots, requests in and out.

The device runs many steps a dispatch. While it does, the host takes the results of the
dispatch before, frees the slots of what has ended and gives them to the next requests.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rlt_jax import watchdog
from rlt_jax.data.stop_texts import StopFinder, stop_finder
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.inference.decode import DecodeConfig, Sampled, Slots, decode, prefill
from rlt_jax.inference.layout import EngineConfig, Layout, check_requests, make_layout
from rlt_jax.inference.sampler import Part, Sampler
from rlt_jax.inference.sampler import decode as decode_texts
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.scheduler import Prefill, Scheduler
from rlt_jax.inference.weights import decode_weights
from rlt_jax.models.attention_kernels import ROW_AXES, split_by_hand
from rlt_jax.models.paged_cache import empty_pages
from rlt_jax.models.transformer import Transformer
from rlt_jax.training import sharding
from rlt_jax.types import Array, PagedCache, Params, Request, Requests, Rollout


@dataclasses.dataclass(frozen=True)
class Engine(Sampler):
    """The sampler that runs on the trainer's own devices; see `make_engine`.

    Attributes:
      layout: sizes of slots and pages.
      stop_ids: tokens that end a completion.
      find_stop: finds texts that end a completion; None for none.
      tokenizer: decodes completions; None leaves texts out.
      chunks: sizes of the parts of a prompt.
      new_cache: makes an empty cache and empty slots.
      to_decode: parameters in training layout -> parameters for decoding.
      prefill: (params, cache, table, tokens, start) -> cache.
      decode: (params, cache, slots, refill, key) -> cache, slots, sampled tokens.
    """

    layout: Layout
    stop_ids: tuple[int, ...]
    find_stop: StopFinder | None
    tokenizer: Tokenizer | None
    chunks: tuple[int, ...]
    new_cache: Callable[[], tuple[PagedCache, Slots]]
    to_decode: Callable[[Params], Params]
    prefill: Callable[..., PagedCache]
    decode: Callable[..., tuple[PagedCache, Slots, Sampled]]

    def stream(self, params: Params, requests: Requests, key: Array) -> Iterator[Part]:
        """The completions that each dispatch has ended.

        Raises:
          UserError: a request is empty or too long.
        """
        return (part for part, _ in self._dispatches(params, requests, key))

    def follow(self, params: Params, request: Request, key: Array) -> Iterator[Rollout]:
        """A completion as it grows: what there is of it after each dispatch.

        The last is the whole completion, the one that `generate` returns.
        """
        for (ended, whole), scheduler in self._dispatches(params, [request], key):
            growing = scheduler.under_way()
            yield whole if ended else decode_texts(growing, self.tokenizer)

    def _dispatches(
        self, params: Params, requests: Requests, key: Array
    ) -> Iterator[tuple[Part, Scheduler]]:
        check_requests(self.layout, requests)
        params = self.to_decode(params)
        cache, slots = self.new_cache()
        scheduler = Scheduler(requests, self.layout, self.stop_ids, self.find_stop)
        under_way = None
        while scheduler.unfinished:
            prefills, refill, owners = scheduler.plan()
            for part in _chunked(prefills, self.chunks, self.layout):
                cache = self.prefill(params, cache, *part)
            cache, slots, sampled = self.decode(params, cache, slots, refill, key)
            if under_way is not None:
                before, owned = under_way
                indices, rollout = scheduler.absorb(jax.device_get(before), owned)
                watchdog.progress("the sampler has decoded")
                yield (indices, decode_texts(rollout, self.tokenizer)), scheduler
            under_way = sampled, owners


def make_engine(
    model: Transformer,
    tokenizer: Tokenizer | None,
    sampling: SamplingConfig,
    config: EngineConfig,
    mesh: Mesh,
    max_length: int,
) -> Engine:
    """Builds the programs; they compile at their first use.

    `check_memory` checks whether the cache fits on the devices.

    Args:
      model: the transformer.
      tokenizer: its stop ids and the texts of `sampling.stop` end a completion, and texts
        are decoded with it; None leaves both out.
      sampling: how tokens are sampled.
      config: sizes.
      mesh: slots and pages are split over data and fsdp, heads over tensor.
      max_length: tokens of the longest prompt with its completion.

    Raises:
      UserError: a sequence does not fit in the model, or the tokenizer can never produce
        a stop text.
    """
    layout = make_layout(model, sampling, config, mesh, max_length)
    stop_ids = (*sampling.stop_ids, *(tokenizer.stop_ids if tokenizer else ()))
    reader, to_decode, axes = decode_weights(model, config.weights)
    static = DecodeConfig(reader, sampling, stop_ids, config.steps, layout.tile)

    whole, rows, tokens = jax.P(), jax.P(ROW_AXES), jax.P(None, ROW_AXES)
    pools = PagedCache(*[jax.P(None, None, ROW_AXES)] * 2, whole)
    cache = cache_shardings(mesh)
    # Each part of slots and pages by itself; tensor is left to the compiler.
    axes_by_hand = set(ROW_AXES) if mesh.size > 1 else set()
    split = functools.partial(split_by_hand, axes=axes_by_hand)
    fill = split(functools.partial(prefill, reader), (whole, pools, *[rows] * 3), pools)
    draw = functools.partial(decode, static)
    draw = split(draw, (whole, pools, rows, rows, whole), (pools, rows, tokens))
    jit = functools.partial(sharding.jit, mesh=mesh, rules=sharding.DECODING_RULES)
    by_slot = sharding.batch_sharding(mesh)
    empty = functools.partial(_empty, model, layout)
    # Every host reads all tokens.
    outputs = (cache, by_slot, sharding.replicated(mesh))
    return Engine(
        layout,
        stop_ids,
        stop_finder(tokenizer, sampling.stop) if tokenizer else None,
        tokenizer,
        config.prefill_sizes,
        jax.jit(empty, out_shardings=(cache, by_slot)),
        jax.jit(to_decode, out_shardings=sharding.decoding_shardings(axes, mesh)),
        jit(fill, donate_argnums=1, out_shardings=cache),
        jit(draw, donate_argnums=(1, 2), out_shardings=outputs),
    )


def cache_shardings(mesh: Mesh) -> PagedCache:
    """Pages are split over data and fsdp, heads over tensor."""
    pool = NamedSharding(mesh, jax.P("tensor", None, ROW_AXES))
    return PagedCache(pool, pool, sharding.replicated(mesh))


def _chunked(
    prefills: list[Prefill], chunks: tuple[int, ...], layout: Layout
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Parts of prompts, one of every shard at a time: table, tokens, start."""
    # Size -> for each shard its parts: a prompt, and where the part starts.
    waiting = {size: [[] for _ in range(layout.shards)] for size in chunks}
    for one in prefills:
        for start in range(0, len(one.tokens), chunks[-1]):
            size = next((c for c in chunks if c >= len(one.tokens) - start), chunks[-1])
            waiting[size][one.shard].append((one, start))
    for size in reversed(chunks):  # a prompt's last part is its smallest
        for parts in itertools.zip_longest(*waiting[size]):
            # A shard without such a part writes to page 0.
            table = np.zeros((layout.shards, layout.columns), np.int32)
            tokens = np.zeros((layout.shards, size), np.int32)
            starts = np.zeros(layout.shards, np.int32)
            for shard, part in enumerate(parts):
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
