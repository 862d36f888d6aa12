"""Log-probabilities of packed sequences, and which of them are computed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from rlt_jax.data.rows import RowShape, make_spans, pack_sequences
from rlt_jax.inference import spans
from rlt_jax.inference.log_probs import compile_programs, fill, packed_log_probs
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.types import Batch, Params, Spans

V = 40
SHAPE = RowShape(micro_batch_size=2, row_length=20)
SEQUENCES = [np.random.default_rng(n).integers(1, V, n + 4, np.int32) for n in range(6)]
NaiveLogProbs = Callable[..., np.ndarray]


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def compiled(model: Transformer, temperature: float) -> Callable:
    return jax.jit(lambda p, batch: packed_log_probs(model, temperature, p, batch))


def alone(
    naive_log_probs: NaiveLogProbs,
    model: Transformer,
    params: Params,
    temperature: float,
) -> list[np.ndarray]:
    """Log-probs of each sequence by itself."""
    longest = max(map(len, SEQUENCES))
    padded = np.stack([np.pad(one, (0, longest - len(one))) for one in SEQUENCES])
    values = naive_log_probs(model, params, padded, temperature)
    return [row[: len(one)] for row, one in zip(values, SEQUENCES, strict=True)]


def spans_of(starts: np.ndarray, first: int, length: int) -> Spans:
    """The same tokens of every sequence."""
    segments = [np.arange(length)] * len(starts)
    return make_spans(starts + first, segments, SHAPE.row_length)


def test_packed_sequences_have_the_values_of_each_alone(
    model: Transformer, params: Params, naive_log_probs: NaiveLogProbs
) -> None:
    packed, starts = pack_sequences(SEQUENCES, SHAPE)
    assert packed.num_micro_batches < len(packed.tokens), "nothing was packed"
    score = compiled(model, 0.7)
    ours = np.asarray(score(params, packed)).reshape(-1)
    expected = alone(naive_log_probs, model, params, 0.7)
    covered = np.zeros(len(ours), bool)
    for start, values in zip(starts, expected, strict=True):
        place = slice(start, start + len(values))
        close(ours[place], values)
        covered[place] = True
    np.testing.assert_array_equal(ours[~covered], 0.0)


def test_empty_micro_batches_are_not_computed(
    model: Transformer, params: Params
) -> None:
    packed, _ = pack_sequences(SEQUENCES, SHAPE)
    score = compiled(model, 1.0)
    none = score(params, packed._replace(num_micro_batches=np.int32(0)))
    np.testing.assert_array_equal(none, 0.0)
    one = score(params, packed._replace(num_micro_batches=np.int32(1)))
    np.testing.assert_array_equal(one[1:], 0.0)
    np.testing.assert_array_equal(one[0], score(params, packed)[0])


def test_only_tokens_of_spans_have_log_probs(
    model: Transformer, params: Params
) -> None:
    packed, starts = pack_sequences(SEQUENCES, SHAPE)
    every = compiled(model, 1.0)(params, packed)
    one, two = spans_of(starts, 1, 2), spans_of(starts, 3, 1)
    student = packed._replace(policy_explanation=two)
    for batch in (
        packed._replace(explanation=one, solution=two),
        packed._replace(completion=one, students=(student,)),
    ):
        some = compiled(model, 1.0)(params, batch)
        wanted = spans.on_tokens(packed.tokens.shape, one, two)
        assert int(wanted.sum()) == 3 * len(SEQUENCES)
        close(some, jnp.where(wanted, every, 0.0))


def test_the_batch_is_filled_with_the_log_probs_of_its_models(
    model: Transformer, params: Params, mesh: Mesh
) -> None:
    packed, starts = pack_sequences(SEQUENCES, SHAPE)
    other = jax.tree.map(lambda x: 0.5 * x, params)
    span = spans_of(starts, 1, 2)
    student = packed._replace(explanation=span, policy_explanation=span, solution=span)
    batch = packed._replace(completion=span, students=(student,))
    programs = compile_programs(
        (model, 0.7), [(model, 0.9)], mesh, over_vocabulary=True
    )
    filled = fill(programs, batch, params, (other,), reference=other)

    def expected(params: Params, batch: Batch, temperature: float) -> np.ndarray:
        return compiled(model, temperature)(params, batch)

    close(filled.log_probs, expected(params, batch, 0.7))
    close(filled.ref_log_probs, expected(other, batch, 0.7))
    (ours,) = filled.students
    close(ours.log_probs, expected(other, student, 0.9))
    divergence = np.asarray(ours.vocabulary_kl)
    assert (divergence[:, :2] > 0).all() and not divergence[:, 2:].any()
    again = fill(programs, batch, params, (params,))
    assert again.ref_log_probs is None
    unfilled = fill(programs, packed, None, reference={})
    assert unfilled.log_probs is None and unfilled.ref_log_probs is None


def log_softmax(
    full_logits: Callable[..., np.ndarray],
    model: Transformer,
    params: Params,
    tokens: list[int],
    size: int = V,
) -> np.ndarray:
    """[T, size] the distribution of each token given those before it, at 0.7."""
    values = full_logits(model, params, np.array([tokens]))[0, :-1, :size] / 0.7
    values -= values.max(-1, keepdims=True)
    return np.pad(
        values - np.log(np.exp(values).sum(-1, keepdims=True)), [(1, 0), (0, 0)]
    )


def divergences(
    policy: tuple[Transformer, Params, list[int], list[int]],
    student: tuple[Transformer, Params, list[int], list[int]],
    mesh: Mesh,
    top_k: int | None = None,
) -> np.ndarray:
    """KL by segment of two sequences of 4 prompt tokens and an explanation."""
    packed = []
    for _, _, tokens, segments in (policy, student):
        batch, starts = pack_sequences([np.array(tokens, np.int32)], SHAPE)
        span = make_spans(starts + 4, [np.array(segments)], SHAPE.row_length)
        packed.append((batch, span))
    (batch, in_policy), (of_student, in_student) = packed
    of_student = of_student._replace(
        explanation=in_student, policy_explanation=in_policy, solution=in_student
    )
    batch = batch._replace(completion=in_policy, students=(of_student,))
    programs = compile_programs(
        (policy[0], 0.7), [(student[0], 0.7)], mesh, top_k, over_vocabulary=True
    )
    filled = fill(programs, batch, policy[1], (student[1],))
    return np.asarray(filled.students[0].vocabulary_kl)[0]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum())


PROMPT = [3, 1, 4, 1]


@pytest.mark.parametrize("top_k", [None, V - 1])
def test_other_ids_of_a_text_are_compared_by_segment(
    model: Transformer,
    params: Params,
    mesh: Mesh,
    full_logits: Callable[..., np.ndarray],
    top_k: int | None,
) -> None:
    # The token 6 is sampled as 8 and 9; everything after it moves by one.
    sampled, canonical = [*PROMPT, 5, 8, 9, 7, 2], [*PROMPT, 5, 6, 7, 2]
    ours = divergences(
        (model, params, sampled, [0, 1, 1, 2, 3]),
        (model, params, canonical, [0, 1, 2, 3]),
        mesh,
        top_k,
    )
    p = log_softmax(full_logits, model, params, sampled)
    q = log_softmax(full_logits, model, params, canonical)
    expected = [kl(p[i], q[j]) for i, j in ((4, 4), (5, 5), (7, 6), (8, 7))]
    assert max(map(abs, expected[:2])) < 1e-9 < min(expected[2:])
    np.testing.assert_allclose(ours[:4], expected, rtol=2e-3, atol=1e-5)
    assert not ours[4:].any()


def test_borders_without_counterpart_and_a_split_of_the_student(
    model: Transformer,
    params: Params,
    mesh: Mesh,
    full_logits: Callable[..., np.ndarray],
) -> None:
    first, second = [*PROMPT, 5, 6, 7], [*PROMPT, 11, 8, 9, 7]
    ours = divergences(
        (model, params, first, [-1, 0, 1]), (model, params, second, [-1, 0, 0, 1]), mesh
    )
    p = log_softmax(full_logits, model, params, first)
    q = log_softmax(full_logits, model, params, second)
    expected = [kl(p[5], q[5]), kl(p[6], q[7])]
    np.testing.assert_allclose(ours[:2], expected, rtol=2e-3, atol=1e-5)
    assert not ours[2:].any()


def test_padded_vocabularies_are_compared_on_the_ids_of_both(
    model: Transformer,
    params: Params,
    mesh: Mesh,
    full_logits: Callable[..., np.ndarray],
) -> None:
    larger = Transformer(dataclasses.replace(model.config, vocab_size=V + 8))
    more = jax.tree.map(lambda x: 2 * x, init_params(larger.config, jax.random.key(5)))
    tokens = [*PROMPT, 5, 6, 7]
    for one, other in (
        ((model, params), (larger, more)),
        ((larger, more), (model, params)),
    ):
        ours = divergences((*one, tokens, [0, 1, 2]), (*other, tokens, [0, 1, 2]), mesh)
        p = log_softmax(full_logits, *one, tokens)
        q = log_softmax(full_logits, *other, tokens)
        expected = [kl(p[i], q[i]) for i in (4, 5, 6)]
        np.testing.assert_allclose(ours[:3], expected, rtol=2e-3, atol=1e-5)
