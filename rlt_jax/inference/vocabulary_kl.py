"""KL divergences over the whole vocabulary, without ever holding [B, T, V]."""

import jax
import jax.numpy as jnp

from rlt_jax.inference import spans
from rlt_jax.inference.head import LOGITS_PER_CHUNK
from rlt_jax.models.transformer import Transformer, hidden_states, logits
from rlt_jax.types import Array, Batch, Params, Spans


def vocabulary_kl(
    policy: tuple[Transformer, float],
    student: tuple[Transformer, float],
    top_k: int | None,
    policy_params: Params,
    student_params: Params,
    policy_batch: Batch,
    student_batch: Batch,
) -> Array:
    """KL(policy || student) of the distributions that explanation tokens come from.

    The explanations must have the same tokens in both batches, so policy and student
    share a vocabulary. Hidden states of the spans are kept, logits only of a chunk at a
    time.

    Args:
      policy: transformer, and the temperature that divides its logits.
      student: likewise.
      top_k: tell apart only the policy's k likeliest tokens and count all others as one
        outcome, a lower bound; None for all.
      policy_params: parameters of the policy.
      student_params: parameters of the student.
      policy_batch: the policy's sequences of E examples.
      student_batch: the student's sequences of the same examples.

    Returns:
      [E, S] float32, 0 outside the explanations.
    """
    span = student_batch.explanation
    in_policy = _span_states(
        policy[0], policy_params, policy_batch, student_batch.policy_explanation
    )
    in_student = _span_states(student[0], student_params, student_batch, span)
    E, S = span.segment.shape
    C = max(1, min(E * S, LOGITS_PER_CHUNK // policy[0].config.vocab_size))

    def chunks(x: Array) -> Array:
        flat = x.reshape(E * S, -1)
        padded = jnp.pad(flat, ((0, -(E * S) % C), (0, 0)))
        return padded.reshape(-1, C, flat.shape[-1])

    def one_chunk(states: tuple[Array, Array]) -> Array:
        p = _log_softmax(policy, policy_params, states[0])
        q = _log_softmax(student, student_params, states[1])
        if top_k is not None:
            p, chosen = jax.lax.top_k(p, top_k)
            q = jnp.take_along_axis(q, chosen, axis=-1)
            p, q = _with_rest(p), _with_rest(q)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    result = jax.lax.map(one_chunk, (chunks(in_policy), chunks(in_student)))
    return jnp.where(spans.mask(span), result.reshape(-1)[: E * S].reshape(E, S), 0.0)


def _span_states(
    model: Transformer, params: Params, batch: Batch, span: Spans
) -> Array:
    """Hidden states that predict the span's tokens, [E, S, D]."""
    B, T = batch.tokens.shape[1:]
    E, S = span.segment.shape
    # The state before a token is the one that predicts it.
    before = span.start[:, None] + jnp.arange(S) - 1

    def one(m: Array, states: Array) -> Array:
        part = batch.micro_batch(m)
        hidden, _ = hidden_states(
            model, params, part.tokens, part.positions, part.segment_ids
        )
        here = (before // (B * T) == m) & spans.mask(span)
        gathered = hidden.reshape(B * T, -1)[before % (B * T)]
        return jnp.where(here[..., None], gathered, states)

    zeros = jnp.zeros((E, S, model.config.embed_dim), model.config.activation_dtype)
    return jax.lax.fori_loop(0, batch.num_micro_batches, one, zeros)


def _log_softmax(
    model: tuple[Transformer, float], params: Params, states: Array
) -> Array:
    transformer, temperature = model
    scores = logits(transformer, params, states)
    return jax.nn.log_softmax(scores / (temperature or 1.0))


def _with_rest(log_probs: Array) -> Array:
    """Appends the log-probability of everything else, at least 1e-30."""
    rest = jnp.maximum(1 - jnp.exp(log_probs).sum(-1, keepdims=True), 1e-30)
    return jnp.concatenate([log_probs, jnp.log(rest)], axis=-1)
