"""KL divergences over the whole vocabulary, without ever holding [B, T, V]."""

import jax
import jax.numpy as jnp

from rlt_jax.inference.log_probs import LOGITS_PER_CHUNK
from rlt_jax.models.transformer import Transformer, hidden_states, logits
from rlt_jax.types import PackedRows, Params, TokenSpans


def vocabulary_kl(
    teacher: Transformer,
    teacher_params: Params,
    teacher_rows: PackedRows,
    teacher_spans: TokenSpans,
    teacher_temperature: float,
    student: Transformer,
    student_params: Params,
    student_rows: PackedRows,
    student_spans: TokenSpans,
    student_temperature: float,
    top_k: int | None,
) -> jax.Array:
    """KL(teacher || student) of the distributions that each span token is drawn from.

    Both spans must hold the same tokens in the same order, so teacher and student share
    a vocabulary. Hidden states of the spans are kept, logits only of a chunk at a time.

    Args:
      teacher: its transformer, then its parameters, packed rows [M, B, T], span of each
        of N completions, and the temperature that divides its logits.
      student: likewise.
      top_k: tell apart only the teacher's k likeliest tokens and count all others as
        one outcome, a lower bound; None for all.

    Returns:
      [N, T] float32, 0 outside the spans.
    """
    in_teacher = _span_states(teacher, teacher_params, teacher_rows, teacher_spans)
    in_student = _span_states(student, student_params, student_rows, student_spans)
    N, T = teacher_spans.mask.shape
    C = max(1, min(N * T, LOGITS_PER_CHUNK // teacher.config.vocab_size))

    def chunks(x: jax.Array) -> jax.Array:
        flat = x.reshape(N * T, -1)
        padded = jnp.pad(flat, ((0, -(N * T) % C), (0, 0)))
        return padded.reshape(-1, C, flat.shape[-1])

    def one_chunk(states: tuple[jax.Array, jax.Array]) -> jax.Array:
        p = _log_softmax(teacher, teacher_params, states[0], teacher_temperature)
        q = _log_softmax(student, student_params, states[1], student_temperature)
        if top_k is not None:
            p, chosen = jax.lax.top_k(p, top_k)
            q = jnp.take_along_axis(q, chosen, axis=-1)
            p, q = _with_rest(p), _with_rest(q)
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    result = jax.lax.map(one_chunk, (chunks(in_teacher), chunks(in_student)))
    return jnp.where(teacher_spans.mask, result.reshape(-1)[: N * T].reshape(N, T), 0.0)


def _span_states(
    model: Transformer, params: Params, rows: PackedRows, spans: TokenSpans
) -> jax.Array:
    """Hidden states that predict the span tokens, [N, T, D]."""
    B, T = rows.tokens.shape[1:]
    N, S = spans.index.shape
    before = spans.index - 1  # the state before a token is the one that predicts it

    def one(m: jax.Array, states: jax.Array) -> jax.Array:
        hidden, _ = hidden_states(
            model, params, rows.tokens[m], rows.positions[m], rows.segment_ids[m]
        )
        here = (before // (B * T) == m) & spans.mask
        found = hidden.reshape(B * T, -1)[before % (B * T)]
        return jnp.where(here[..., None], found, states)

    zeros = jnp.zeros((N, S, model.config.embed_dim), model.config.activation_dtype)
    return jax.lax.fori_loop(0, rows.num_micro_batches, one, zeros)


def _log_softmax(
    model: Transformer, params: Params, states: jax.Array, temperature: float
) -> jax.Array:
    return jax.nn.log_softmax(logits(model, params, states) / temperature, axis=-1)


def _with_rest(log_probs: jax.Array) -> jax.Array:
    """Appends the log-probability of everything else, at least 1e-30."""
    rest = jnp.maximum(1 - jnp.exp(log_probs).sum(-1, keepdims=True), 1e-30)
    return jnp.concatenate([log_probs, jnp.log(rest)], axis=-1)
