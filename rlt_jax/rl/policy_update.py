"""One policy step: gradients added up over micro-batches, then the optimizer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlt_jax import masked
from rlt_jax.inference.log_probs import token_stats
from rlt_jax.inference.scoring import gather, scatter
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl.losses import grpo_token_loss
from rlt_jax.training.state import apply_gradients
from rlt_jax.types import PackedRows, Params, TokenSpans, TrainState


class PolicyBatch(NamedTuple):
    """What the policy learns from.

    Attributes:
      rows: packed teacher rows.
      completion: the sampled tokens of each of N completions.
      advantages: [N] float32.
      old_log_probs: [M, B, T] float32 under the policy that sampled.
      ref_log_probs: [M, B, T] float32 under the reference.
    """

    rows: PackedRows
    completion: TokenSpans
    advantages: jax.Array
    old_log_probs: jax.Array
    ref_log_probs: jax.Array


def update(
    model: Transformer,
    tx: optax.GradientTransformation,
    temperature: float,
    beta: float,
    state: TrainState,
    batch: PolicyBatch,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step of GRPO.

    The loss is the mean over the tokens of each completion, then over completions. Every
    token carries its share of that mean as a weight, so micro-batches simply add up and
    packing changes nothing.

    Args:
      model: the policy's transformer.
      tx: optimizer.
      temperature: the policy's logits are divided by it, as in sampling.
      beta: weight of the KL to the reference.
      state: donated by the caller.
      batch: N completions.

    Returns:
      The new state and metrics.
    """
    rows, spans = batch.rows, batch.completion
    shape = rows.tokens.shape
    advantages = scatter(batch.advantages, spans, shape)
    lengths = jnp.maximum(spans.mask.sum(-1), 1).astype(jnp.float32)
    weights = scatter(1 / (lengths * len(lengths)), spans, shape)

    def loss_fn(params: Params, m: jax.Array) -> tuple[jax.Array, tuple]:
        stats = token_stats(
            model,
            params,
            rows.tokens[m],
            rows.segment_ids[m],
            rows.positions[m],
            temperature,
        )
        losses = grpo_token_loss(
            stats.log_probs,
            batch.old_log_probs[m],
            batch.ref_log_probs[m],
            advantages[m],
            beta,
        )
        entropy = jax.lax.stop_gradient(stats.entropy * weights[m]).sum()
        return (losses * weights[m]).sum(), (entropy,)

    def add_micro_batch(m: jax.Array, total: tuple) -> tuple:
        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, m)
        return jax.tree.map(jnp.add, total, (grads, loss, aux))

    zeros = (jax.tree.map(jnp.zeros_like, state.params), 0.0, (0.0,))
    grads, loss, (entropy,) = jax.lax.fori_loop(
        0, rows.num_micro_batches, add_micro_batch, zeros
    )
    state, metrics = apply_gradients(state, grads, tx)
    drift = gather(batch.old_log_probs - batch.ref_log_probs, spans)
    metrics |= {
        "policy/loss": loss,
        "policy/entropy": entropy,
        "policy/kl_to_reference": masked.mean(drift, spans.mask).mean(),
    }
    return state, metrics
