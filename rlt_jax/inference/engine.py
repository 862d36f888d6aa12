"""Rollouts: one prefill of the prompts, then one jitted decode loop."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlt_jax.errors import UserError
from rlt_jax.inference.sampling import SamplingConfig, sample
from rlt_jax.models.transformer import (
    Transformer,
    empty_cache,
    hidden_states,
    logits,
)
from rlt_jax.training.sharding import batch_sharding
from rlt_jax.types import Params, Rollout


class PromptBatch(NamedTuple):
    """Prompts, padded on the right.

    Attributes:
      tokens: [B, T] int32.
      lengths: [B] int32, at least 1.
      request_ids: [B] int32; with the key they decide what is drawn for a row.
    """

    tokens: jax.Array
    lengths: jax.Array
    request_ids: jax.Array


def pad_prompts(prompts: Sequence[np.ndarray], request_ids: np.ndarray) -> PromptBatch:
    """Pads prompts to the next multiple of 32, so that few shapes are compiled.

    Raises:
      UserError: an empty prompt.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if lengths.min() < 1:
        raise UserError(f"prompt {int(lengths.argmin())} is empty.")
    tokens = np.zeros((len(prompts), -(-int(lengths.max()) // 32) * 32), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return PromptBatch(tokens, lengths, np.asarray(request_ids, np.int32))


def rollout(
    model: Transformer,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
) -> Rollout:
    """Completes every prompt.

    A row stops at a stop token or at `max_new_tokens`; the loop stops with the last row.
    Slot s of the cache holds position s, so prompts of different length need no shift: a
    completion overwrites the padding of its prompt before it could be seen.

    Args:
      model: the transformer.
      sampling: temperature and longest completion.
      stop_ids: tokens that end a completion.
      params: parameters of the model.
      prompts: B prompts.
      key: PRNG key; row b at step t draws with key folded with its request id, then t.

    Returns:
      Completions [B, max_new_tokens].
    """
    B, prompt_length = prompts.tokens.shape
    T = sampling.max_new_tokens
    keys = jax.vmap(lambda request: jax.random.fold_in(key, request))(
        prompts.request_ids
    )
    stops = jnp.array(stop_ids, jnp.int32)

    def draw(hidden: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        step_keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, t))(keys)
        return sample(logits(model, params, hidden), step_keys, sampling.temperature)

    positions = jnp.broadcast_to(jnp.arange(prompt_length), (B, prompt_length))
    cache = empty_cache(model.config, B, prompt_length + T)
    hidden, cache = hidden_states(
        model, params, prompts.tokens, positions, kv_cache=cache
    )
    last = hidden[jnp.arange(B), prompts.lengths - 1]
    empty = Rollout(
        jnp.zeros((B, T), jnp.int32),
        jnp.zeros((B, T), bool),
        jnp.zeros((B, T), jnp.float32),
        jnp.zeros(B, bool),
    )

    def step(carry: tuple) -> tuple:
        t, token, log_prob, cache, result = carry
        going = ~result.finished
        result = Rollout(
            result.tokens.at[:, t].set(jnp.where(going, token, 0)),
            result.completion_mask.at[:, t].set(going),
            result.log_probs.at[:, t].set(jnp.where(going, log_prob, 0.0)),
            result.finished | (going & jnp.isin(token, stops)),
        )
        place = (prompts.lengths + t)[:, None]
        hidden, cache = hidden_states(
            model, params, token[:, None], place, kv_cache=cache
        )
        token, log_prob = draw(hidden[:, 0], t + 1)
        return t + 1, token, log_prob, cache, result

    def going(carry: tuple) -> jax.Array:
        return (carry[0] < T) & ~carry[-1].finished.all()

    first = (jnp.int32(0), *draw(last, jnp.int32(0)), cache, empty)
    return jax.lax.while_loop(going, step, first)[-1]


def jit_rollout(
    model: Transformer,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    mesh: Mesh,
) -> Callable[[Params, PromptBatch, jax.Array], Rollout]:
    """Compiles `rollout` for the mesh, rows split over data and fsdp."""
    rows = batch_sharding(mesh)
    return jax.jit(
        functools.partial(rollout, model, sampling, stop_ids),
        in_shardings=(None, rows, None),
        out_shardings=rows,
    )


def complete_all(
    generate: Callable[[Params, PromptBatch, jax.Array], Rollout],
    params: Params,
    prompts: Sequence[np.ndarray],
    batch_size: int,
    key: jax.Array,
    first_request: int = 0,
) -> list[np.ndarray]:
    """Completes any number of prompts, `batch_size` at a time.

    Args:
      generate: a compiled `rollout`.
      params: parameters.
      prompts: token ids, [t] each.
      batch_size: rows per batch; the last batch repeats its last prompt.
      key: PRNG key.
      first_request: request id of the first prompt.

    Returns:
      For each prompt the ids of its completion, stop token included.
    """
    completions: list[np.ndarray] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        part += part[-1:] * (batch_size - len(part))
        ids = first_request + start + np.arange(batch_size)
        result = generate(params, pad_prompts(part, ids), key)
        completions += completions_of(result)
    return completions[: len(prompts)]


def completions_of(result: Rollout) -> list[np.ndarray]:
    """The ids of every completion, [t] each, without what follows its end."""
    tokens, mask = jax.device_get((result.tokens, result.completion_mask))
    return [row[keep] for row, keep in zip(tokens, mask, strict=True)]
