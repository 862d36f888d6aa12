"""One policy step: gradients added up over micro-batches, then the optimizer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlt_jax.inference.log_probs import TokenStats, token_stats
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.scoring import scatter
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl.losses import LossTokens, ObjectiveConfig, token_loss, token_weights
from rlt_jax.rl.metrics import policy_metrics
from rlt_jax.training.lora import combine
from rlt_jax.training.state import apply_gradients
from rlt_jax.types import PackedRows, Params, TokenSpans, TrainState


class PolicyBatch(NamedTuple):
    """What the policy learns from, in one update or several.

    Attributes:
      rows: packed teacher rows, one completion a segment.
      completion: the sampled tokens of each of N completions.
      advantages: [N] float32.
      old_log_probs: [M, B, T] float32 under the policy at the time of the rollout; None
        where that is the policy itself, as in an only update.
      ref_log_probs: [M, B, T] float32 under the reference; None if beta is 0.
      counted: [N] bool, which completions have a gradient; True for all.
      sampler_log_probs: [M, B, T] float32 as the sampler gave them on the tokens of the
        completions; None if unknown.
    """

    rows: PackedRows
    completion: TokenSpans
    advantages: jax.Array
    old_log_probs: jax.Array | None
    ref_log_probs: jax.Array | None
    counted: jax.Array | bool = True
    sampler_log_probs: jax.Array | None = None


def update(
    model: Transformer,
    tx: optax.GradientTransformation,
    sampling: SamplingConfig,
    objective: ObjectiveConfig,
    state: TrainState,
    batch: PolicyBatch,
    frozen: Params | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; a later one on the same rollout takes the same batch.

    Every token carries its share of the batch's loss as a weight, so micro-batches
    simply add up and packing changes nothing.

    Args:
      model: the policy's transformer.
      tx: optimizer.
      sampling: its temperature divides the policy's logits here too, and its
        max_new_tokens is the longest completion.
      objective: what is minimised.
      state: donated by the caller.
      batch: N completions.
      frozen: parameters under the adapters in the state, see `Tuning`.

    Returns:
      The new state and metrics; "optimizer/skipped" is 1 where nothing changed.
    """
    rows, spans = batch.rows, batch.completion
    shape = rows.tokens.shape
    lengths = jnp.maximum(spans.mask.sum(-1), 1).astype(jnp.float32)
    weights = token_weights(
        objective, spans, batch.counted, sampling.max_new_tokens, shape
    )
    tokens = LossTokens(
        scatter(batch.advantages, spans, shape),
        scatter(1 / lengths, spans, shape),
        rows.segment_ids,
        batch.old_log_probs,
        batch.ref_log_probs,
        batch.sampler_log_probs,
    )

    def loss_fn(params: Params, m: jax.Array) -> tuple[jax.Array, TokenStats]:
        stats = token_stats(
            model,
            combine(model, frozen, params),
            rows.tokens[m],
            rows.segment_ids[m],
            rows.positions[m],
            sampling.temperature,
            tokens.shares[m] > 0,
        )
        here = jax.tree.map(lambda x: x[m], tokens)
        if here.old_log_probs is None:
            here = here._replace(old_log_probs=jax.lax.stop_gradient(stats.log_probs))
        losses = token_loss(objective, stats.log_probs, here)
        return (losses * weights[m]).sum(), stats

    def add_micro_batch(m: jax.Array, total: tuple) -> tuple:
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, m
        )
        added = jax.tree.map(jnp.add, total[:2], (grads, loss))
        return *added, jax.tree.map(lambda x, y: x.at[m].set(y), total[2], stats)

    unseen = jnp.zeros(shape, jnp.float32)
    zeros = jax.tree.map(jnp.zeros_like, state.params), 0.0, TokenStats(unseen, unseen)
    grads, loss, stats = jax.lax.fori_loop(
        0, rows.num_micro_batches, add_micro_batch, zeros
    )
    limit = objective.skip_gradient_norm
    state, metrics = apply_gradients(state, grads, tx, loss, limit)
    if tokens.old_log_probs is None:
        tokens = tokens._replace(old_log_probs=stats.log_probs)
    metrics |= policy_metrics(objective, stats.log_probs, stats.entropy, tokens, spans)
    return state, metrics | {"policy/loss": loss}


def mix_reference(reference: Params, policy: Params, alpha: float) -> Params:
    """(1 - alpha) * reference + alpha * policy (TR-DPO, arXiv 2404.09656, soft)."""
    return optax.incremental_update(policy, reference, alpha)
