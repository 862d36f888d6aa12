"""The device programs of generation: prefill of prompts, steps of decode slots.

A slot is a row of the decode batch. It holds a request until that ends, then the host
gives it the next one. Nothing here depends on which slot a request has, on its neighbours
or on how many steps a dispatch takes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlt_jax.inference.sampling import SamplingConfig, sample
from rlt_jax.models.paged_cache import copy_pages
from rlt_jax.models.transformer import Transformer, hidden_states, logits
from rlt_jax.types import PagedCache, Params

# XLA's products on CPU give a row the same bits among so many rows.
CPU_TILES = (16, 32)


class Slots(NamedTuple):
    """What is decoded in B slots.

    Attributes:
      token: [B] int32, the next token to feed.
      position: [B] int32, where it stands in prompt and completion.
      drawn: [B] int32, tokens of the completion so far.
      longest: [B] int32, when to stop.
      request: [B] int32; with the key and `drawn` it decides what is drawn.
      active: [B] bool.
      seen: [B, V] bool, tokens that were used; [B, 0] without repetition penalty.
    """

    token: jax.Array
    position: jax.Array
    drawn: jax.Array
    longest: jax.Array
    request: jax.Array
    active: jax.Array
    seen: jax.Array


class Refill(NamedTuple):
    """What the host changes before the next steps.

    Attributes:
      replaced: [B] bool, slots that take what `slots` says.
      slots: new contents; inactive ones only stop.
      table: [B, S / C] int32, pages of every slot.
      source: [B] int32, pages to copy, that of a prompt's last tokens to each request.
      target: [B] int32, where to.
      copies: [1] int32, how many of them.
    """

    replaced: jax.Array
    slots: Slots
    table: jax.Array
    source: jax.Array
    target: jax.Array
    copies: jax.Array


class Drawn(NamedTuple):
    """What a dispatch of n steps has drawn.

    Attributes:
      tokens: [n, B] int32.
      log_probs: [n, B] float32.
      mask: [n, B] bool, False where a slot had nothing to do.
    """

    tokens: jax.Array
    log_probs: jax.Array
    mask: jax.Array


def prefill(
    model: Transformer,
    params: Params,
    cache: PagedCache,
    table: jax.Array,
    tokens: jax.Array,
    start: jax.Array,
) -> PagedCache:
    """Stores the keys and values of part of a prompt; no logits are computed.

    Args:
      model: the transformer.
      params: its parameters.
      cache: the pool.
      table: [B, S / C] int32, pages of the prompts.
      tokens: [B, T] int32, T a multiple of the page size; what follows the prompt's end
        is never seen.
      start: [B] int32, position of the first token, a multiple of the page size.
    """
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    cache = cache._replace(table=table)
    _, cache = hidden_states(model, params, tokens, positions, kv_cache=cache)
    return cache._replace(table=jnp.zeros((0, 0), jnp.int32))


def decode(
    model: Transformer,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    steps: int,
    tile: int,
    params: Params,
    cache: PagedCache,
    slots: Slots,
    refill: Refill,
    key: jax.Array,
) -> tuple[PagedCache, Slots, Drawn]:
    """Refills slots, then draws up to `steps` tokens in every active one.

    Args:
      model: the transformer.
      sampling: how tokens are drawn.
      stop_ids: tokens that end a completion.
      steps: n; fewer when all slots are done.
      tile: slots computed at once; B is at most that or a multiple of it.
      params: its parameters.
      cache: the pool, donated.
      slots: of the last dispatch, donated.
      refill: what the host changes.
      key: PRNG key of the run.
    """
    cache = copy_pages(cache, refill.source, refill.target, refill.copies[0])
    slots = jax.tree.map(
        lambda new, old: jnp.where(
            refill.replaced.reshape(-1, *[1] * (old.ndim - 1)), new, old
        ),
        refill.slots,
        slots,
    )
    B = slots.token.shape[0]
    tile = min(tile, B)

    def tiles(x: jax.Array) -> jax.Array:
        return x.reshape(B // tile, tile, *x.shape[1:])

    one_tile = functools.partial(_step, model, sampling, stop_ids, params, key)

    def step(carry: tuple) -> tuple:
        i, cache, slots, drawn = carry
        parts = jax.tree.map(tiles, (slots, refill.table))
        cache, done = jax.lax.scan(one_tile, cache, parts)
        slots, out = jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]), done)
        drawn = jax.tree.map(
            lambda xs, x: jax.lax.dynamic_update_index_in_dim(xs, x, i, 0), drawn, out
        )
        return i + 1, cache, slots, drawn

    def unfinished(carry: tuple) -> jax.Array:
        busy = carry[2].active.sum()
        # Shards take equally many steps, as collectives in a step may wait for all.
        if shards := jax.sharding.get_abstract_mesh().manual_axes:
            busy = jax.lax.psum(busy, shards)
        return (carry[0] < steps) & (busy > 0)

    nothing = Drawn(
        jnp.zeros((steps, B), jnp.int32),
        jnp.zeros((steps, B), jnp.float32),
        jnp.zeros((steps, B), bool),
    )
    carry = (jnp.int32(0), cache, slots, nothing)
    _, cache, slots, drawn = jax.lax.while_loop(unfinished, step, carry)
    return cache, slots, drawn


def _step(
    model: Transformer,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    params: Params,
    key: jax.Array,
    cache: PagedCache,
    part: tuple[Slots, jax.Array],
) -> tuple[PagedCache, tuple[Slots, Drawn]]:
    """Draws a token in every active slot of a tile."""
    slots, table = part
    # What an inactive slot stores lands in page 0.
    table = jnp.where(slots.active[:, None], table, 0)
    position = jnp.where(slots.active, slots.position, 0)
    hidden, cache = hidden_states(
        model,
        params,
        slots.token[:, None],
        position[:, None],
        kv_cache=cache._replace(table=table),
    )
    keys = jax.vmap(lambda r, t: jax.random.fold_in(jax.random.fold_in(key, r), t))(
        slots.request, slots.drawn
    )
    scores = logits(model, params, hidden[:, 0])
    token, log_prob = sample(scores, keys, sampling, slots.seen)
    drawn = slots.drawn + 1
    going = ~jnp.isin(token, jnp.array(stop_ids, jnp.int32)) & (drawn < slots.longest)
    new = slots._replace(
        token=token,
        position=slots.position + 1,
        drawn=drawn,
        active=slots.active & going,
        seen=_mark(slots.seen, token),
    )
    out = Drawn(token, jnp.where(slots.active, log_prob, 0.0), slots.active)
    return cache._replace(table=jnp.zeros((0, 0), jnp.int32)), (new, out)


def _mark(seen: jax.Array, token: jax.Array) -> jax.Array:
    V = seen.shape[1]
    return seen | (jnp.arange(V) == token[:, None]) if V else seen
