"""Log-probabilities from hidden states, without ever holding [B, T, V].

Every per-token array is [B, T] and entry t is about `tokens[:, t]`: entry t comes from
the hidden state at t - 1, and the first token of a segment, which nothing predicts, has
log-probability 0. The shift is written here and nowhere else.

    tokens     a    b         c
    hidden     h0   h1        h2
    log_probs  0    p(b|h0)   p(c|h1)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rlt_jax.models.attention import block_of, soft_cap
from rlt_jax.models.attention_kernels import pad
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, hidden_states, kernel_of, raw_logits
from rlt_jax.types import Array, Batch, Params

LOGITS_PER_CHUNK = 2**24  # 64 MiB of float32 at a time on each device


def log_probs_and_entropy(
    model: Transformer,
    params: Params,
    batch: Batch,
    temperature: float = 1.0,
    wanted: ArrayLike = True,
) -> tuple[Array, Array]:
    """Log-probability of every token given those before it, and the entropy there.

    The head runs over chunks of the length, and again in the backward pass, so memory
    grows with tokens times width and not with tokens times vocabulary. Hidden states that
    predict wanted tokens come first in their row, and only their chunks are computed.

    Args:
      model: the transformer.
      params: its parameters.
      batch: one micro-batch, tokens, positions and segment_ids [B, T].
      temperature: logits are divided by it; 0 counts as 1, as it does in `sample`.
      wanted: [B, T] bool, the tokens whose log-probs are needed.

    Returns:
      log_probs [B, T] float32, and the entropy [B, T] float32 in nats of the distribution
      that each token was sampled from, which has no gradient. Both are 0 for padding, for
      the first token of each sequence, and where not wanted.
    """

    def values(raw: Array, about: tuple, shared: None) -> tuple[Array, Array]:
        """Log-probs of a chunk's targets, and the entropy."""
        scores = soft_cap(raw, model.config.final_softcap) / (temperature or 1.0)
        normaliser = jax.nn.logsumexp(scores, axis=-1)
        return chosen(scores, *about) - normaliser, entropy(scores, normaliser)

    return per_token(values, (model, params), batch, wanted, (batch.tokens,))


def chosen(scores: Array, targets: Array) -> Array:
    """Entries [B, C] of scores [B, C, V]: read without gather, so V may be split."""
    hits = jnp.arange(scores.shape[-1]) == targets[..., None]
    return jnp.where(hits, scores, 0.0).sum(-1)


def entropy(scores: Array, normaliser: Array | float = 0.0) -> Array:
    """Entropy [B, C] in nats of log-probs [B, C, V] + normaliser, without a gradient."""
    scores, normaliser = jax.lax.stop_gradient((scores, normaliser))
    weights = jnp.exp(scores - jnp.expand_dims(normaliser, -1))
    return normaliser - jnp.sum(weights * scores, axis=-1)


def per_token(
    values: Callable[..., tuple[Array, ...]],
    model: tuple[Transformer, Params],
    batch: Batch,
    wanted: ArrayLike,
    about: tuple[Array, ...],
    shared: Any = None,
    live: int = 1,
) -> tuple[Array, ...]:
    """Runs the head over the chunks, and again in the backward pass.

    Args:
      values: (logits [B, C, V] before their cap, `about` [B, C, ...], `shared`) -> arrays
        [B, C] float32.
      model: the transformer, and its parameters; these have a gradient, the rest has none.
      batch: one micro-batch.
      wanted: [B, T] bool, the tokens whose values are needed.
      about: arrays about the tokens, [B, T, ...].
      shared: arrays for all chunks.
      live: how many arrays like the logits of a chunk are held at a time.

    Returns:
      The values [B, T] of every token; 0 where they are not wanted.
    """
    transformer, params = model
    tokens, positions, segment_ids = batch.tokens, batch.positions, batch.segment_ids
    hidden, _ = hidden_states(transformer, params, tokens, positions, segment_ids)
    B, T = tokens.shape
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    C = chunk_length(B, T, live * transformer.config.vocab_size, devices)
    predicted = (positions > 0) & (segment_ids > 0) & wanted
    # State t predicts token t + 1. Needed states come first, in their order.
    needed = jnp.roll(predicted, -1, axis=1)
    order = jnp.argsort(~needed, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    last = -(-needed.sum(axis=1).max() // C)
    states = pad(_permuted(hidden, order, back), C)

    def beside_states(x: Array) -> Array:
        places = order.reshape(order.shape + (1,) * (x.ndim - 2))
        return pad(jnp.take_along_axis(jnp.roll(x, -1, axis=1), places, axis=1), C)

    def about_tokens(x: Array) -> Array:
        x = jnp.take_along_axis(x[:, :T], back, axis=1)
        return jnp.where(predicted, jnp.roll(x, 1, axis=1), 0.0)

    settings = values, transformer.config, C
    kernel = kernel_of(transformer.config, params)
    given = tuple(map(beside_states, about)), shared, last
    return tuple(map(about_tokens, _chunked(settings, kernel, states, given)))


def chunk_length(B: int, T: int, V: int, devices: int) -> int:
    """C, tokens of each of B rows whose logits are held at a time."""
    C = max(1, LOGITS_PER_CHUNK * devices // (B * V))
    # A part of a row is made of whole tiles of a matrix unit.
    return T if C >= T else C - C % 128 if C > 128 else C


@jax.custom_vjp
def _permuted(x: Array, order: Array, back: Array) -> Array:
    """Rows [B, T, D] in another order; the gradient is put back, not scattered."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


_permuted.defvjp(
    lambda x, order, back: (_permuted(x, order, back), (order, back)),
    lambda saved, dy: (_permuted(dy, *saved[::-1]), None, None),
)

_Settings = tuple[Callable[..., tuple[Array, ...]], ModelConfig, int]


def _forward(
    settings: _Settings, kernel: Array, hidden: Array, given: tuple
) -> tuple[tuple[Array, ...], tuple]:
    """Values [B, S] of all chunks, and what the backward pass needs.

    `given` has no gradient: what is about the states, what is shared by all chunks, and the
    number of chunks with a state that is needed.
    """
    values, config, C = settings
    about, shared, last = given

    def one_chunk(i: Array | int) -> tuple[Array, ...]:
        raw = raw_logits(config, kernel, block_of(hidden, i, C))
        return values(raw, tuple(block_of(x, i, C) for x in about), shared)

    def add(i: Array, found: tuple) -> tuple:
        store = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda all, x: store(all, x, i * C, 1), found, one_chunk(i))

    shapes = jax.eval_shape(one_chunk, 0)
    zeros = tuple(jnp.zeros(hidden.shape[:2], x.dtype) for x in shapes)
    found = jax.lax.fori_loop(0, last, add, zeros)
    return found, (kernel, hidden, given)


def _backward(settings: _Settings, saved: tuple, gradients: tuple) -> tuple:
    values, config, C = settings
    kernel, hidden, (about, shared, last) = saved

    def add(i: Array, found: tuple) -> tuple:
        d_kernel, d_hidden = found
        h = block_of(hidden, i, C)
        at_i = tuple(block_of(x, i, C) for x in about)
        raw = raw_logits(config, kernel, h)
        _, pull = jax.vjp(lambda raw: values(raw, at_i, shared), raw)
        (d_raw,) = pull(tuple(block_of(x, i, C) for x in gradients))
        d_raw = d_raw.astype(hidden.dtype)
        axes = "VD" if config.tie_embeddings else "DV"
        dk = jnp.einsum(f"BCV,BCD->{axes}", d_raw, h)
        dh = jnp.einsum(f"BCV,{axes}->BCD", d_raw, kernel.astype(h.dtype))
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, dh, i * C, 1)
        return d_kernel + dk.astype(kernel.dtype), d_hidden

    zeros = jnp.zeros_like(kernel), jnp.zeros_like(hidden)
    return *jax.lax.fori_loop(0, last, add, zeros), None


_chunked = jax.custom_vjp(lambda *inputs: _forward(*inputs)[0], nondiff_argnums=(0,))
_chunked.defvjp(_forward, _backward)


def token_log_probs(
    model: Transformer, params: Params, tokens: Array, temperature: float = 1.0
) -> Array:
    """Log-probabilities of unpacked rows, one sequence each.

    Args:
      model: the transformer.
      params: its parameters.
      tokens: [B, T] int32.
      temperature: logits are divided by it.

    Returns:
      [B, T] float32; entry t is about tokens[:, t], entry 0 is 0.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rows = Batch(tokens, positions, jnp.ones_like(tokens), None)
    return log_probs_and_entropy(model, params, rows, temperature)[0]
