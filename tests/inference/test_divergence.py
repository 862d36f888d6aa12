"""Divergences over the vocabulary against dense float64 formulas, values and gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.inference import divergence as module
from rlt_jax.inference import head
from rlt_jax.inference.divergence import (
    DivergenceConfig,
    Models,
    contributions,
    divergence,
    log_probs_and_divergence,
)
from rlt_jax.inference.head import log_probs_and_entropy
from rlt_jax.models.transformer import Transformer, hidden_states, logits
from rlt_jax.types import Batch, Params
from tests.conftest import random_params

V, T = 40, 11
RNG = np.random.default_rng(4)
TOKENS = RNG.integers(1, V, (3, T), np.int32)
INPUTS = (
    TOKENS,
    np.broadcast_to(np.arange(T), TOKENS.shape),
    np.ones_like(TOKENS),
)
WEIGHTS = RNG.normal(size=(2, 3, T))
WANTED = np.arange(T) >= np.array([[3], [1], [6]])
CONFIGS = {
    "reverse": DivergenceConfig("reverse"),
    "forward": DivergenceConfig("forward"),
    "jensen_shannon": DivergenceConfig("jensen_shannon", mixture=0.3),
    "top_k": DivergenceConfig("reverse", top_k=5),
    "top_k_forward": DivergenceConfig("forward", top_k=5),
    "clipped": DivergenceConfig("forward", clip=0.02),
}


def dense(config: DivergenceConfig, teacher: Any, student: Any) -> Any:
    """The divergence of logits [..., V] as the textbook has it."""
    t, s = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    if config.top_k is not None:
        order = jnp.argsort(-t, axis=-1)
        t, s = (jnp.take_along_axis(x, order, -1) for x in (t, s))
        k = config.top_k
        t, s = (
            jnp.concatenate(
                [x[..., :k], jnp.log(jnp.exp(x[..., k:]).sum(-1, keepdims=True))], -1
            )
            for x in (t, s)
        )

    def kl(p: Any, q: Any) -> Any:
        terms = jnp.exp(p) * (p - q) - jnp.exp(p) + jnp.exp(q)
        return terms

    if config.kind == "reverse":
        terms = kl(s, t)
    elif config.kind == "forward":
        terms = kl(t, s)
    else:
        a = config.mixture
        m = jnp.log(a * jnp.exp(t) + (1 - a) * jnp.exp(s))
        terms = a * kl(t, m) + (1 - a) * kl(s, m)
    if config.clip is not None:
        terms = jnp.minimum(terms, config.clip)
    return terms.sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def all_logits(model: Transformer, params: Params) -> Any:
    return logits(model, params, hidden_states(model, params, *INPUTS)[0])


@functools.partial(jax.jit, static_argnums=0)
def states_of(model: Transformer, params: Params) -> Any:
    return hidden_states(model, params, *INPUTS)[0]


@pytest.fixture
def teacher(model: Transformer) -> Params:
    return random_params(model, seed=8)


def batch_of(model: Transformer, teacher: Params) -> Batch:
    """One sequence a row; the teacher has read the same tokens."""
    states = states_of(model, teacher)
    return Batch(
        *INPUTS,
        None,
        teacher_states=jnp.roll(states, 1, axis=1),
        teacher_kernel=head.kernel_of(model.config, teacher),
    )


@pytest.fixture
def batch(model: Transformer, teacher: Params) -> Batch:
    return batch_of(model, teacher)


def models_of(model: Transformer) -> Models:
    return Models((model.config, 0.7), (model.config, 1.3))


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, True) for name in CONFIGS), ("reverse", False)]
)
def test_values_and_gradients_are_those_of_dense_float64(
    name: str, tied: bool, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS_PER_CHUNK", 3 * V * module.LIVE * 4)
    model = Transformer(dataclasses.replace(model.config, tie_embeddings=tied))
    params, teacher = random_params(model, seed=1), random_params(model, seed=8)
    batch = batch_of(model, teacher)
    config, weights = CONFIGS[name], WEIGHTS * WANTED

    def ours(params: Params) -> Any:
        args = config, models_of(model), model, params, batch, WANTED
        log_probs, _, divergences = log_probs_and_divergence(*args)
        return (log_probs * weights[0] + divergences * weights[1]).sum(), divergences

    both = jax.jit(jax.value_and_grad(ours, has_aux=True))
    (value, divergences), gradient = both(params)

    student, pull = jax.vjp(functools.partial(all_logits, model), params)
    told = np.asarray(all_logits(model, teacher), np.float64)
    with jax.enable_x64(True):

        def reference(scores: Any) -> Any:
            found = dense(config, told[:, :-1] / 1.3, scores[:, :-1] / 0.7)
            log_probs = jax.nn.log_softmax(scores[:, :-1] / 0.7)
            chosen = jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], -1)[..., 0]
            total = chosen * weights[0, :, 1:] + found * weights[1, :, 1:]
            return total.sum(), found

        scores = np.asarray(student, np.float64)
        both = jax.jit(jax.value_and_grad(reference, has_aux=True))
        (expected, found), slope = jax.tree.map(np.asarray, both(scores))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    kept = WANTED[:, 1:]
    np.testing.assert_allclose(divergences[:, 1:][kept], found[kept], rtol=1e-4)
    assert not divergences[:, 1:][~kept].any()
    (wanted,) = pull(slope.astype(np.float32))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        gradient,
        wanted,
    )


def test_log_probs_and_entropy_are_those_without_a_teacher(
    model: Transformer, params: Params, batch: Batch
) -> None:
    args = CONFIGS["reverse"], models_of(model), model, params, batch, WANTED
    log_probs, entropy, _ = log_probs_and_divergence(*args)
    plain = log_probs_and_entropy(model, params, batch, 0.7, WANTED)
    np.testing.assert_allclose(log_probs, plain[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, plain[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", module.KINDS)
def test_all_outcomes_apart_are_the_full_vocabulary(
    kind: str, model: Transformer, params: Params, batch: Batch
) -> None:
    found = []
    for top_k in (None, V, V - 1):
        config = DivergenceConfig(kind, top_k=top_k)
        args = config, models_of(model), model, params, batch, WANTED
        found.append(log_probs_and_divergence(*args)[2])
    np.testing.assert_array_equal(found[1], found[0])
    # The last outcome is "the rest".
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["reverse", "jensen_shannon", "top_k_forward"])
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(
    name: str, model: Transformer, teacher: Params, batch: Batch
) -> None:
    same = models_of(model)._replace(teacher=(model.config, 0.7))

    def loss(params: Params) -> Any:
        args = CONFIGS[name], same, model, params, batch, WANTED
        return log_probs_and_divergence(*args)[2].sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(teacher)
    assert abs(value) < 1e-6
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(gradient)) < 1e-6


@pytest.mark.parametrize("kind", module.KINDS)
def test_no_outcome_adds_less_than_nothing(kind: str) -> None:
    scores = RNG.normal(scale=9, size=(2, 500, 7)).astype(np.float32)
    t, s = jax.nn.log_softmax(scores)
    parts = contributions(DivergenceConfig(kind), t, s)
    assert parts.min() > -1e-6
    mean = np.log(0.5 * np.exp(t) + 0.5 * np.exp(s))
    expected = {
        "reverse": (np.exp(s) * (s - t)).sum(-1),
        "forward": (np.exp(t) * (t - s)).sum(-1),
        "jensen_shannon": (np.exp(t) * (t - mean) + np.exp(s) * (s - mean)).sum(-1) / 2,
    }[kind]
    np.testing.assert_allclose(parts.sum(-1), expected, rtol=1e-4, atol=1e-6)


def test_the_example_of_the_docstring() -> None:
    p, q = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    parts = contributions(DivergenceConfig("forward"), p, q)
    np.testing.assert_allclose(parts, [-0.294 + 0.4, 0.805 - 0.4], atol=1e-3)
    np.testing.assert_allclose(parts.sum(), 0.511, atol=1e-3)


def test_the_example_of_the_docs() -> None:
    student = jnp.log(jnp.array([0.60, 0.30, 0.10]))
    teacher = jnp.log(jnp.array([0.97, 0.02, 0.01]))
    found = [
        float(divergence(DivergenceConfig(kind, top_k=k), teacher, student))
        for k in (None, 1)
        for kind in ("reverse", "forward")
    ]
    assert found == pytest.approx([0.754, 0.389, 0.748, 0.388], abs=5e-4)


def test_embeddings_that_are_padded_differently(
    model: Transformer, params: Params, batch: Batch
) -> None:
    """The ids that only the teacher has do not count."""
    args = CONFIGS["forward"], models_of(model), model, params
    expected = log_probs_and_divergence(*args, batch, WANTED)[2]
    kernel = jnp.pad(batch.teacher_kernel, ((0, 6), (0, 0)), constant_values=3.0)
    padded = batch._replace(teacher_kernel=kernel)
    found = log_probs_and_divergence(*args, padded, WANTED)[2]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
