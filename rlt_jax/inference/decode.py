"""The device programs of generation: prefill of prompts and decode steps of slots.

A slot is a row of the decode batch. It holds one request until the request finishes, then
the host assigns the next one. A completion does not depend on the slot of its request, on
the other slots, or on the number of steps per dispatch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlt_jax.inference.sampling import SamplingConfig, sample
from rlt_jax.models.paged_cache import copy_pages
from rlt_jax.models.transformer import Transformer, hidden_states, logits
from rlt_jax.types import Array, PagedCache, Params

# Batch sizes for which XLA's matrix products on CPU are bitwise equal for every slot.
CPU_TILES = (16, 32)


class DecodeConfig(NamedTuple):
    """What is static in the compiled decode program.

    Attributes:
      model: the transformer.
      sampling: how tokens are sampled.
      stop_ids: tokens that end a completion.
      num_steps: n, the maximum number of decode steps per dispatch.
      tile: number of slots computed at once, a divisor of B.
    """

    model: Transformer
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    num_steps: int
    tile: int


class Slots(NamedTuple):
    """State of the B decode slots.

    Attributes:
      token: [B] int32, the next input token.
      position: [B] int32, position of `token` in the sequence of prompt and completion.
      num_sampled: [B] int32, number of tokens sampled for the completion so far.
      max_new_tokens: [B] int32, maximum number of tokens in the completion.
      request: [B] int32, request id; with the run's key and `num_sampled` it determines
        the key of the next token.
      active: [B] bool, whether the slot decodes a request.
      seen: [B, V] bool, tokens of the prompt and completion; [B, 0] without repetition
        penalty.
    """

    token: Array
    position: Array
    num_sampled: Array
    max_new_tokens: Array
    request: Array
    active: Array
    seen: Array


class Refill(NamedTuple):
    """Changes that the host makes to the slots before the next steps.

    Attributes:
      replaced: [B] bool, slots that are overwritten with `slots`.
      slots: new slot states; an inactive one stops its slot.
      table: [B, S / C] int32, page table of all slots.
      source: [B] int32, pages to copy: the partly filled last page of a shared prompt.
      target: [B] int32, destination pages of the copies.
      copies: [1] int32, number of pages to copy.
    """

    replaced: Array
    slots: Slots
    table: Array
    source: Array
    target: Array
    copies: Array


class Sampled(NamedTuple):
    """Tokens sampled in one dispatch of n steps.

    Attributes:
      tokens: [n, B] int32.
      log_probs: [n, B] float32, log-probabilities of the tokens.
      mask: [n, B] bool, False where a slot was inactive.
    """

    tokens: Array
    log_probs: Array
    mask: Array


def prefill(
    model: Transformer,
    params: Params,
    cache: PagedCache,
    table: Array,
    tokens: Array,
    start: Array,
) -> PagedCache:
    """Writes the keys and values of a chunk of each prompt; no logits are computed.

    Args:
      model: the transformer.
      params: its parameters.
      cache: the page pool.
      table: [B, S / C] int32, page table of the prompts.
      tokens: [B, T] int32, T a multiple of the page size; tokens after the end of the
        prompt are never attended to.
      start: [B] int32, position of the first token, a multiple of the page size.
    """
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    cache = cache._replace(table=table)
    _, cache = hidden_states(model, params, tokens, positions, kv_cache=cache)
    return cache._replace(table=jnp.zeros((0, 0), jnp.int32))


def decode(
    config: DecodeConfig,
    params: Params,
    cache: PagedCache,
    slots: Slots,
    refill: Refill,
    key: Array,
) -> tuple[PagedCache, Slots, Sampled]:
    """Refills slots, then samples up to `num_steps` tokens in every active slot.

    Stops early when no slot is active any more.

    Args:
      config: static settings.
      params: parameters of the model.
      cache: the page pool, donated.
      slots: slot states after the last dispatch, donated.
      refill: changes by the host.
      key: PRNG key of the run.

    Returns:
      The updated cache and slots, and the sampled tokens.
    """
    cache = copy_pages(cache, refill.source, refill.target, refill.copies[0])
    choose = functools.partial(jax.vmap(jnp.where), refill.replaced)
    slots = jax.tree.map(choose, refill.slots, slots)
    step_tile = functools.partial(_step, config, params, key)
    B, tile = len(slots.token), config.tile

    def step(carry: tuple) -> tuple:
        i, cache, slots, sampled = carry
        tiled = jax.tree.map(
            lambda x: x.reshape(B // tile, tile, *x.shape[1:]), (slots, refill.table)
        )
        cache, outputs = jax.lax.scan(step_tile, cache, tiled)
        slots, new = jax.tree.map(lambda x: jax.lax.collapse(x, 0, 2), outputs)
        sampled = jax.tree.map(
            lambda xs, x: jax.lax.dynamic_update_index_in_dim(xs, x, i, 0), sampled, new
        )
        return i + 1, cache, slots, sampled

    def keep_decoding(carry: tuple) -> Array:
        num_active = carry[2].active.sum()
        # All shards take the same number of steps: a step may contain collectives.
        if shards := jax.sharding.get_abstract_mesh().manual_axes:
            num_active = jax.lax.psum(num_active, shards)
        return (carry[0] < config.num_steps) & (num_active > 0)

    shape, dtypes = (config.num_steps, B), (jnp.int32, jnp.float32, bool)
    empty = Sampled(*(jnp.zeros(shape, dtype) for dtype in dtypes))
    carry = (jnp.int32(0), cache, slots, empty)
    return jax.lax.while_loop(keep_decoding, step, carry)[1:]


def _step(
    config: DecodeConfig,
    params: Params,
    key: Array,
    cache: PagedCache,
    tile: tuple[Slots, Array],
) -> tuple[PagedCache, tuple[Slots, Sampled]]:
    """Samples one token in every active slot of a tile of slots."""
    slots, table = tile
    # Inactive slots write to page 0.
    cache = cache._replace(table=jnp.where(slots.active[:, None], table, 0))
    position = jnp.where(slots.active, slots.position, 0)[:, None]
    token = slots.token[:, None]
    hidden, cache = hidden_states(config.model, params, token, position, kv_cache=cache)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, slots.request)
    keys = jax.vmap(jax.random.fold_in)(keys, slots.num_sampled)
    next_logits = logits(config.model, params, hidden[:, 0])
    token, log_prob = sample(next_logits, keys, config.sampling, slots.seen)
    num_sampled = slots.num_sampled + 1
    stopped = jnp.isin(token, jnp.array(config.stop_ids, jnp.int32))
    stopped |= num_sampled >= slots.max_new_tokens
    new_slots = slots._replace(
        token=token,
        position=slots.position + 1,
        num_sampled=num_sampled,
        active=slots.active & ~stopped,
        seen=slots.seen | (jnp.arange(slots.seen.shape[1]) == token[:, None]),
    )
    sampled = Sampled(token, jnp.where(slots.active, log_prob, 0.0), slots.active)
    return cache._replace(table=jnp.zeros((0, 0), jnp.int32)), (new_slots, sampled)
