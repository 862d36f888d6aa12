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

    Policy and student have the same tokenizer. Where the sampled tokens of the
    explanation are not the canonical ones of the student's sequence, distributions are
    compared at the first token of every segment, where both have read the same text:

        policy  |ab|c|d|    compared at ab and d
        student |a|bc|d|    compared at a and d

    Embeddings may be padded to different sizes; ids that only one model has are left out.
    Hidden states of the spans are kept, logits only of a chunk at a time.

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
      [E, S] float32, indexed by segment number; 0 where there is no segment.
    """
    span, policy_span = student_batch.explanation, student_batch.policy_explanation
    in_policy = _states_before(policy[0], policy_params, policy_batch, policy_span)
    in_student = _states_before(student[0], student_params, student_batch, span)
    E, S = span.segment.shape
    V = min(policy[0].config.vocab_size, student[0].config.vocab_size)
    C = max(1, min(E * S, LOGITS_PER_CHUNK // V))

    def chunks(x: Array) -> Array:
        flat = x.reshape(E * S, -1)
        padded = jnp.pad(flat, ((0, -(E * S) % C), (0, 0)))
        return padded.reshape(-1, C, flat.shape[-1])

    def one_chunk(states: tuple[Array, Array]) -> Array:
        p = _log_softmax(policy, policy_params, states[0], V)
        q = _log_softmax(student, student_params, states[1], V)
        if top_k is not None:
            p, chosen = jax.lax.top_k(p, top_k)
            q = jnp.take_along_axis(q, chosen, axis=-1)
            p, q = _with_rest(p), _with_rest(q)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    result = jax.lax.map(one_chunk, (chunks(in_policy), chunks(in_student)))
    by_segment = result.reshape(-1)[: E * S].reshape(E, S)
    return jnp.where(spans.segment_mask(span), by_segment, 0.0)


def _states_before(
    model: Transformer, params: Params, batch: Batch, span: Spans
) -> Array:
    """Hidden states that predict the first token of each segment, [E, S, D]."""
    B, T = batch.tokens.shape[1:]
    E, S = span.segment.shape
    # The state before a token is the one that predicts it.
    before = spans.segment_starts(span) - 1

    def one(m: Array, states: Array) -> Array:
        part = batch.micro_batch(m)
        inputs = part.tokens, part.positions, part.segment_ids
        hidden, _ = hidden_states(model, params, *inputs)
        here = (before // (B * T) == m) & (before >= 0)
        gathered = hidden.reshape(B * T, -1)[before % (B * T)]
        return jnp.where(here[..., None], gathered, states)

    zeros = jnp.zeros((E, S, model.config.embed_dim), model.config.activation_dtype)
    return jax.lax.fori_loop(0, batch.num_micro_batches, one, zeros)


def _log_softmax(
    model: tuple[Transformer, float], params: Params, states: Array, V: int
) -> Array:
    transformer, temperature = model
    scores = logits(transformer, params, states)[:, :V]
    return jax.nn.log_softmax(scores / (temperature or 1.0))


def _with_rest(log_probs: Array) -> Array:
    """Appends the log-probability of everything else, at least 1e-30."""
    rest = jnp.maximum(1 - jnp.exp(log_probs).sum(-1, keepdims=True), 1e-30)
    return jnp.concatenate([log_probs, jnp.log(rest)], axis=-1)
