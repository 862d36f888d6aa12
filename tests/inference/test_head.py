"""Log-probabilities against a log-softmax of all logits."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.inference import head
from rlt_jax.inference.head import log_probs_and_entropy, token_log_probs
from rlt_jax.models.transformer import (
    Transformer,
    hidden_states,
    init_params,
    logits,
)
from rlt_jax.types import Batch, Params

V = 40
TOKENS = np.random.default_rng(9).integers(1, V, (2, 11), np.int32)
NaiveLogProbs = Callable[..., np.ndarray]


def unpacked(tokens: np.ndarray) -> Batch:
    """A micro-batch with one sequence a row."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return Batch(tokens, positions, np.ones_like(tokens), None)


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_log_softmax_of_all_logits(
    model: Transformer,
    params: Params,
    naive_log_probs: NaiveLogProbs,
    temperature: float,
) -> None:
    ours = token_log_probs(model, params, TOKENS, temperature)
    close(ours, naive_log_probs(model, params, TOKENS, temperature))
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours[:, 0], 0.0)
    assert (ours[:, 1:] < 0).all()


def test_a_temperature_of_zero_counts_as_one(
    model: Transformer, params: Params
) -> None:
    np.testing.assert_array_equal(
        token_log_probs(model, params, TOKENS, 0.0),
        token_log_probs(model, params, TOKENS, 1.0),
    )


def test_entropy_is_that_of_the_distribution_a_token_came_from(
    model: Transformer,
    params: Params,
    full_logits: Callable[..., np.ndarray],
) -> None:
    _, entropy = log_probs_and_entropy(model, params, unpacked(TOKENS), 0.7)
    scaled = full_logits(model, params, TOKENS) / 0.7
    p = np.exp(scaled) / np.exp(scaled).sum(-1, keepdims=True)
    close(entropy[:, 1:], -(p * np.log(p)).sum(-1)[:, :-1])
    np.testing.assert_array_equal(entropy[:, 0], 0.0)


def test_chunks_change_neither_values_nor_gradients(
    model: Transformer, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[jax.Array, Params]:
        def weighted(params: Params) -> tuple[jax.Array, jax.Array]:
            values = token_log_probs(model, params, TOKENS, 0.7)
            return (values * jnp.arange(11)).sum(), values

        (_, values), gradients = jax.jit(jax.value_and_grad(weighted, has_aux=True))(
            params
        )
        return values, gradients

    values, gradients = run()
    for chunk in (1, 4):  # with 4, the last chunk is not full
        monkeypatch.setattr(head, "LOGITS_PER_CHUNK", chunk * V * len(TOKENS))
        chunked_values, chunked_gradients = run()
        close(chunked_values, values)
        for ours, whole in zip(
            jax.tree.leaves(chunked_gradients), jax.tree.leaves(gradients), strict=True
        ):
            np.testing.assert_allclose(ours, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("tied", "softcap"), [(True, None), (False, 2.0)])
def test_gradients_are_those_of_a_log_softmax_of_all_logits(
    model: Transformer, tied: bool, softcap: float | None
) -> None:
    config = dataclasses.replace(
        model.config, tie_embeddings=tied, final_softcap=softcap
    )
    model = Transformer(config)
    params = init_params(config, jax.random.key(1))
    weights = jax.random.normal(jax.random.key(2), TOKENS.shape)

    def ours(params: Params) -> jax.Array:
        values, _ = log_probs_and_entropy(model, params, unpacked(TOKENS), 0.7)
        return (values * weights).sum()

    def plain(params: Params) -> jax.Array:
        tokens, positions, segment_ids = map(jnp.asarray, unpacked(TOKENS)[:3])
        hidden, _ = hidden_states(model, params, tokens, positions, segment_ids)
        normalised = jax.nn.log_softmax(logits(model, params, hidden) / 0.7)
        chosen = jnp.take_along_axis(normalised[:, :-1], tokens[:, 1:, None], axis=-1)
        return (chosen[..., 0] * weights[:, 1:]).sum()

    for a, b in zip(
        *(jax.tree.leaves(jax.jit(jax.grad(f))(params)) for f in (ours, plain)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tied"), [("float32", False), ("bfloat16", True)])
def test_gradients_have_the_dtype_of_the_parameters(
    model: Transformer, tied: bool, dtype: str
) -> None:
    """Whatever that of the activations is."""
    config = dataclasses.replace(model.config, tie_embeddings=tied, dtype=dtype)
    model = Transformer(config)
    exact = init_params(config, jax.random.key(1))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)

    def total(params: Params) -> jax.Array:
        values, _ = log_probs_and_entropy(model, params, unpacked(TOKENS))
        return values.sum()

    gradient = jax.jit(jax.grad(total))
    fine, coarse = gradient(exact), gradient(rounded)
    for a, b in zip(jax.tree.leaves(fine), jax.tree.leaves(coarse), strict=True):
        assert (a.dtype, b.dtype) == (jnp.float32, jnp.bfloat16)
        largest = np.abs(np.asarray(a)).max()
        # Sums of some tens of bfloat16 numbers, 8 bits each.
        np.testing.assert_allclose(b.astype(jnp.float32), a, atol=0.1 * largest)


@pytest.mark.parametrize(("share", "chunk"), [(0.0, 4), (0.4, 1), (0.4, 100), (1.0, 4)])
def test_tokens_that_are_not_wanted_change_nothing(
    model: Transformer,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    share: float,
) -> None:
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", chunk * V * len(TOKENS))
    mask = np.random.default_rng(3).random(TOKENS.shape) < share

    def total(params: Params, *wanted: np.ndarray) -> tuple[jax.Array, tuple]:
        result = log_probs_and_entropy(model, params, unpacked(TOKENS), 0.7, *wanted)
        return jnp.where(mask, result[0], 0.0).sum(), result

    both = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, ours), gradients = both(params, mask)
    (_, whole), expected = both(params)
    for some, every in zip(ours, whole, strict=True):
        close(some, np.where(mask, every, 0.0))
    for a, b in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def shapes_in(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of everything computed in a jaxpr and in those it calls."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_all_logits_are_never_held_at_once(
    model: Transformer, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than the model is wide, so that the embedding is not taken for logits.
    tokens = np.ones((1, 33), np.int32)

    def most_logits(chunk: int) -> int:
        """Positions of the largest array with an axis over the vocabulary."""
        monkeypatch.setattr(head, "LOGITS_PER_CHUNK", chunk * V)

        def loss(params: Params) -> jax.Array:
            return token_log_probs(model, params, tokens).sum()

        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr
        shapes = list(shapes_in(jaxpr))
        return max(int(np.prod(shape)) // V for shape in shapes if V in shape)

    assert most_logits(33) == 33
    assert most_logits(20) <= 20
    assert most_logits(1) <= model.config.embed_dim
