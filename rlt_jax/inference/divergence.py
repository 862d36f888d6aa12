"""Divergence of a student from its teacher over the vocabulary, token by token.

Teacher and student have the same tokenizer and stand before the same token, the teacher in
a sequence of its own. Only hidden states of the two are kept; logits are there for one
chunk of tokens at a time, forward and backward, as in `head.py`.
"""

import dataclasses
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from rlt_jax.inference import head, spans
from rlt_jax.models.attention import soft_cap
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, head_logits, hidden_states
from rlt_jax.ranges import Checked, OneOf, PositiveFloat, PositiveInt, Range
from rlt_jax.types import Array, Batch, Params, Spans

KINDS = ("reverse", "forward", "jensen_shannon")
LIVE = 4  # arrays like the logits of a chunk that a divergence holds at a time


@dataclasses.dataclass(frozen=True)
class DivergenceConfig(Checked):
    """A divergence of the student's distribution s from the teacher's t.

    Attributes:
      kind: "reverse", KL(s || t), which makes the student choose one of the teacher's
        ways; "forward", KL(t || s), which makes it cover them all; "jensen_shannon",
        a KL(t || m) + (1 - a) KL(s || m) with m = a t + (1 - a) s and a = `mixture`
        (arXiv 2306.13649, section 2).
      mixture: between 0 and 1.
      top_k: tell apart only the teacher's k likeliest tokens, and count all others as one
        outcome, a lower bound; None for all.
      clip: the contribution of a vocabulary entry counts no more than this (arXiv
        2601.18734); None for no bound. Contributions are written so that none is negative
        (see `contributions`), so a clipped divergence is not negative either.
    """

    kind: Annotated[str, OneOf(KINDS)] = "reverse"
    mixture: Annotated[float, Range(1e-6, 1 - 1e-6)] = 0.5
    top_k: PositiveInt | None = None
    clip: PositiveFloat | None = None


class Models(NamedTuple):
    """What is fixed of student and teacher: config, and what divides the logits."""

    student: tuple[ModelConfig, float]
    teacher: tuple[ModelConfig, float]


def contributions(config: DivergenceConfig, teacher: Array, student: Array) -> Array:
    """What each outcome adds to the divergence: log-probs [..., V] -> [..., V], from 0.

    KL(p || q) is summed as p log(p / q) - p + q: the last two add up to 0 over the
    vocabulary, and with them no outcome adds less than 0.

        p = (0.5, 0.5), q = (0.9, 0.1): -0.294 + 0.4, 0.805 - 0.4 sum to 0.511 = KL
    """

    def kl(p: Array, q: Array) -> Array:
        return jnp.exp(p) * (p - q) - jnp.exp(p) + jnp.exp(q)

    if config.kind == "reverse":
        return kl(student, teacher)
    if config.kind == "forward":
        return kl(teacher, student)
    a = config.mixture
    mean = jnp.logaddexp(math.log(a) + teacher, math.log1p(-a) + student)
    return a * kl(teacher, mean) + (1 - a) * kl(student, mean)


def divergence(config: DivergenceConfig, teacher: Array, student: Array) -> Array:
    """Divergence [...] in nats of log-probs [..., V] float32, both normalised."""
    if config.top_k is not None and config.top_k < teacher.shape[-1]:
        teacher, student = likeliest(config.top_k, teacher, student)
    return contributions(config, teacher, student).clip(max=config.clip).sum(-1)


def likeliest(k: int, teacher: Array, student: Array) -> tuple[Array, Array]:
    """Log-probs [..., k + 1] of the teacher's k likeliest outcomes and of all the rest."""
    _, chosen = jax.lax.top_k(teacher, k)

    def parts(log_probs: Array) -> Array:
        others = jnp.put_along_axis(log_probs, chosen, -jnp.inf, -1, inplace=False)
        rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
        top = jnp.take_along_axis(log_probs, chosen, axis=-1)
        return jnp.concatenate([top, rest], axis=-1)

    return parts(teacher), parts(student)


def states_beside(
    model: tuple[Transformer, Params],
    batch: Batch,
    span: Spans,
    others: Spans,
    shape: tuple[int, ...],
) -> tuple[Array, Array]:
    """Hidden states of a model beside the tokens of another sequence of the same text.

    Where the two tokenise the text differently, they have read the same only before the
    first token of every segment:

        batch |ab|c|d|, other |a|bc|d|: the states before ab and d are beside a and d

    Args:
      model: the transformer, and its parameters.
      batch: its sequences.
      span: the text in them.
      others: the same text in the other sequences, segment by segment.
      shape: [M, B, T] of these.

    Returns:
      States [M, B, T, D] that predict the tokens, and [M, B, T] bool, where there are any.
    """
    transformer, params = model
    size = math.prod(shape)
    # The state before a token is the one that predicts it.
    source, target = spans.segment_starts(span) - 1, spans.segment_starts(others)
    known = (source >= 0) & (target >= 0)
    target = jnp.where(known, target, size)  # there, nothing is kept
    places = jnp.full(batch.tokens.size, size, jnp.int32)
    source = jnp.where(known, source, batch.tokens.size)
    places = places.at[source].set(target, mode="drop").reshape(batch.tokens.shape)

    def one(m: Array, states: Array) -> Array:
        part = batch.micro_batch(m)
        inputs = part.tokens, part.positions, part.segment_ids
        hidden, _ = hidden_states(transformer, params, *inputs)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return states.at[places[m].reshape(-1)].set(flat, mode="drop")

    width, dtype = transformer.config.embed_dim, transformer.config.activation_dtype
    states = jnp.zeros((size, width), dtype)
    states = jax.lax.fori_loop(0, batch.num_micro_batches, one, states)
    found = jnp.zeros(size, bool).at[target].set(True, mode="drop")
    return states.reshape(*shape, width), found.reshape(shape)


def segment_divergence(
    config: DivergenceConfig,
    student: tuple[Transformer, float],
    teacher: tuple[Transformer, float],
    params: tuple[Params, Params],
    batches: tuple[Batch, Batch],
) -> Array:
    """The divergence of two models before each segment of an explanation, [E, S] float32.

    Args:
      config: the divergence.
      student: transformer and temperature.
      teacher: likewise.
      params: of the student and of the teacher.
      batches: sequences of E examples of the student, with both spans of the explanation,
        and of the teacher.
    """
    (own, told), (batch, others) = params, batches
    span, shape = batch.explanation, batch.tokens.shape
    args = others, batch.policy_explanation, span, shape
    states, wanted = states_beside((teacher[0], told), *args)
    kernel = head.kernel_of(teacher[0].config, told)
    batch = batch._replace(teacher_states=states, teacher_kernel=kernel)
    models = Models(*[(one.config, t or 1.0) for one, t in (student, teacher)])

    def one(m: Array, found: Array) -> Array:
        args = config, models, student[0], own, batch.micro_batch(m), wanted[m]
        return found.at[m].set(log_probs_and_divergence(*args)[2])

    zeros = jnp.zeros(shape, jnp.float32)
    found = jax.lax.fori_loop(0, batch.num_micro_batches, one, zeros)
    return spans.segment_sums(spans.gather(found, span), span)


def log_probs_and_divergence(
    config: DivergenceConfig,
    models: Models,
    model: Transformer,
    params: Params,
    batch: Batch,
    wanted: Array,
) -> tuple[Array, Array, Array]:
    """`head.log_probs_and_entropy` with the divergence from the teacher.

    Args:
      config: the divergence.
      models: configs and temperatures.
      model: the student.
      params: its parameters.
      batch: one micro-batch, with `teacher_states` [B, T, D] and `teacher_kernel`.
      wanted: [B, T] bool, the tokens that are needed.

    Returns:
      Log-probs and entropy [B, T] float32 as there, and the divergence [B, T] float32 in
      nats between the distributions that each token comes from. Log-probs and divergence
      have a gradient with respect to the student's parameters.
    """
    (student, temperature), (teacher, of_teacher) = models

    def values(raw: Array, about: tuple, kernel: Array) -> tuple[Array, Array, Array]:
        """Log-probs, entropy and divergence [B, C]."""
        targets, states = about
        scores = soft_cap(raw, student.final_softcap) / temperature
        log_probs = jax.nn.log_softmax(scores)
        told = head_logits(teacher, kernel, states) / of_teacher
        V = min(told.shape[-1], raw.shape[-1])
        shared = log_probs[..., :V]
        if V < raw.shape[-1]:
            shared = jax.nn.log_softmax(shared)
        distance = divergence(config, jax.nn.log_softmax(told[..., :V]), shared)
        return head.chosen(log_probs, targets), head.entropy(log_probs), distance

    about, kernel = (batch.tokens, batch.teacher_states), batch.teacher_kernel
    return head.per_token(values, (model, params), batch, wanted, about, kernel, LIVE)
