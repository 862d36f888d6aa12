"""Log-probabilities from hidden states, without ever holding [B, T, V].

Every per-token array is [B, T] and entry t is about `tokens[:, t]`: entry t comes from
the hidden state at t - 1, and the first token of a segment, which nothing predicts, has
log-probability 0. The shift is written here and nowhere else.

    tokens     a    b         c
    hidden     h0   h1        h2
    log_probs  0    p(b|h0)   p(c|h1)
"""

import jax
import jax.numpy as jnp

from rlt_jax.models.attention import block_of
from rlt_jax.models.attention_kernels import pad
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, head_logits, hidden_states
from rlt_jax.types import Array, Batch, Params

LOGITS_PER_CHUNK = 2**24  # 64 MiB of float32 at a time on each device


def log_probs_and_entropy(
    model: Transformer,
    params: Params,
    batch: Batch,
    temperature: float = 1.0,
    wanted: Array | bool = True,
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
    tokens, positions, segment_ids = batch.tokens, batch.positions, batch.segment_ids
    hidden, _ = hidden_states(model, params, tokens, positions, segment_ids)
    B, T = tokens.shape
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    C = chunk_length(B, T, model.config.vocab_size, devices)
    predicted = (positions > 0) & (segment_ids > 0) & wanted
    # State t predicts token t + 1.
    needed = jnp.roll(predicted, -1, axis=1)
    order = jnp.argsort(~needed, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    last = -(-needed.sum(axis=1).max() // C)

    targets = jnp.take_along_axis(jnp.roll(tokens, -1, axis=1), order, axis=1)
    settings = (model.config, temperature or 1.0, C)
    kernel = params["embedding" if model.config.tie_embeddings else "output"]
    states = pad(_permuted(hidden, order, back), C)

    def about_token(x: Array) -> Array:
        x = jnp.take_along_axis(x[:, :T], back, axis=1)
        return jnp.where(predicted, jnp.roll(x, 1, axis=1), 0.0)

    log_probs, entropy = _chunked(settings, kernel, states, pad(targets, C), last)
    return about_token(log_probs), about_token(entropy)


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

_Settings = tuple[ModelConfig, float, int]  # model, temperature, states in a chunk


def _forward(
    settings: _Settings, kernel: Array, hidden: Array, targets: Array, last: Array
) -> tuple[tuple[Array, Array], tuple]:
    """Log-probs and entropy [B, S] of targets [B, S] after states [B, S, D].

    Chunks from `last` on are not computed, and 0. Also what the backward pass needs.
    """
    config, temperature, C = settings

    def one_chunk(i: Array, found: tuple) -> tuple:
        scores = head_logits(config, kernel, block_of(hidden, i, C)) / temperature
        normaliser = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.where(_hits(scores, block_of(targets, i, C)), scores, 0.0).sum(-1)
        weights = jnp.exp(scores - normaliser[..., None])
        entropy = normaliser - jnp.sum(weights * scores, axis=-1)
        new = chosen - normaliser, entropy, normaliser
        store = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda all, x: store(all, x, i * C, 1), found, new)

    zeros = (jnp.zeros(targets.shape, jnp.float32),) * 3
    log_probs, entropy, normaliser = jax.lax.fori_loop(0, last, one_chunk, zeros)
    return (log_probs, entropy), (kernel, hidden, targets, last, normaliser)


def _backward(settings: _Settings, saved: tuple, gradients: tuple) -> tuple:
    config, temperature, C = settings
    kernel, hidden, targets, last, normaliser = saved
    d_log_probs, _ = gradients

    def one_chunk(i: Array, found: tuple) -> tuple:
        d_kernel, d_hidden = found
        h = block_of(hidden, i, C)
        logits = head_logits(config, kernel, h)
        weights = jnp.exp(logits / temperature - block_of(normaliser, i, C)[..., None])
        slope = block_of(d_log_probs, i, C)[..., None] / temperature
        if config.final_softcap is not None:
            slope *= 1 - (logits / config.final_softcap) ** 2
        hit = _hits(logits, block_of(targets, i, C))
        d_logits = (slope * (hit - weights)).astype(hidden.dtype)
        axes = "VD" if config.tie_embeddings else "DV"
        dk = jnp.einsum(f"BCV,BCD->{axes}", d_logits, h)
        dh = jnp.einsum(f"BCV,{axes}->BCD", d_logits, kernel.astype(h.dtype))
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, dh, i * C, 1)
        return d_kernel + dk.astype(kernel.dtype), d_hidden

    zeros = jnp.zeros_like(kernel), jnp.zeros_like(hidden)
    return *jax.lax.fori_loop(0, last, one_chunk, zeros), None, None


_chunked = jax.custom_vjp(lambda *inputs: _forward(*inputs)[0], nondiff_argnums=(0,))
_chunked.defvjp(_forward, _backward)


def _hits(scores: Array, targets: Array) -> Array:
    """[B, C, V] bool, True at the target: read without gather, so V may be split."""
    return jnp.arange(scores.shape[-1]) == targets[..., None]


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
