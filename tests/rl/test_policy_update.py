"""The policy step: sums over micro-batches against one plain expression."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlt_jax.data.packing import gather_spans, pack
from rlt_jax.inference.log_probs import token_log_probs
from rlt_jax.inference.scoring import score_rows
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl import policy_update
from rlt_jax.rl.policy_update import PolicyBatch
from rlt_jax.types import Params, TrainState

RNG = np.random.default_rng(0)
PROMPT = 3
COMPLETIONS = (5, 1, 8, 3, 6, 2)  # lengths
TOKENS = [RNG.integers(1, 40, PROMPT + length, np.int32) for length in COMPLETIONS]
ADVANTAGES = RNG.normal(size=len(TOKENS)).astype(np.float32)
TEMPERATURE, BETA, RATE = 0.7, 0.3, 0.5
TX = optax.sgd(RATE)
Updated = tuple[TrainState, dict[str, jax.Array]]


@pytest.fixture(scope="module")
def reference(params: Params) -> Params:
    return jax.tree.map(lambda x: x * 1.05, params)


@pytest.fixture(scope="module")
def score(model: Transformer) -> Callable[..., jax.Array]:
    return jax.jit(partial(score_rows, model, TEMPERATURE))


@pytest.fixture(scope="module")
def compilations() -> list[PolicyBatch]:
    """Grows by one whenever `update` is compiled."""
    return []


@pytest.fixture(scope="module")
def update(
    model: Transformer, compilations: list[PolicyBatch]
) -> Callable[..., Updated]:
    @jax.jit
    def update(state: TrainState, batch: PolicyBatch) -> Updated:
        compilations.append(batch)
        return policy_update.update(model, TX, TEMPERATURE, BETA, state, batch)

    return update


def state_of(params: Params) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, TX.init(params))


@pytest.fixture(scope="module")
def batch_of(
    params: Params, reference: Params, score: Callable[..., jax.Array]
) -> Callable[[int, int], PolicyBatch]:
    """The completions, packed into lines of a length, so many to a micro-batch."""

    def batch(micro_batch_size: int, row_length: int) -> PolicyBatch:
        rows, starts = pack(TOKENS, micro_batch_size, row_length)
        spans = gather_spans(
            starts + PROMPT, [np.arange(n) for n in COMPLETIONS], max(COMPLETIONS)
        )
        old, ref = score(params, rows), score(reference, rows)
        return PolicyBatch(rows, spans, jnp.asarray(ADVANTAGES), old, ref)

    return batch


@pytest.fixture(scope="module")
def expected(
    model: Transformer, params: Params, reference: Params
) -> tuple[float, Params]:
    """Loss and parameters after the step, by one expression over unpacked rows."""
    width = PROMPT + max(COMPLETIONS)
    tokens = np.stack([np.pad(row, (0, width - len(row))) for row in TOKENS])
    place = np.arange(width)
    lengths = np.array(COMPLETIONS)[:, None]
    mask = (place >= PROMPT) & (place < PROMPT + lengths)

    def loss(params: Params) -> jax.Array:
        ours = token_log_probs(model, params, tokens, TEMPERATURE)
        theirs = token_log_probs(model, reference, tokens, TEMPERATURE)
        # REINFORCE with a baseline; the value of ratio * A is A on the policy.
        gain = ADVANTAGES[:, None] * (1 + ours - jax.lax.stop_gradient(ours))
        kl = jnp.exp(theirs - ours) - 1 - (theirs - ours)
        per_token = jnp.where(mask, -gain + BETA * kl, 0.0)
        return (per_token.sum(-1) / lengths[:, 0]).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    stepped = jax.tree.map(lambda x, g: x - RATE * g, params, gradient)
    return float(value), stepped


def assert_close(ours: Params, theirs: Params) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("micro_batch_size", "row_length", "used"),
    [
        (1, 11, 5),
        (2, 24, 1),  # several rows a line
    ],
)
def test_neither_micro_batches_nor_packing_matter(
    params: Params,
    expected: tuple[float, Params],
    update: Callable[..., Updated],
    batch_of: Callable[[int, int], PolicyBatch],
    micro_batch_size: int,
    row_length: int,
    used: int,
) -> None:
    batch = batch_of(micro_batch_size, row_length)
    assert batch.rows.num_micro_batches == used
    state, metrics = update(state_of(params), batch)
    loss, stepped = expected
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-4)
    assert_close(state.params, stepped)
    assert state.step == 1


def test_the_number_of_micro_batches_is_not_compiled_in(
    params: Params,
    update: Callable[..., Updated],
    compilations: list[PolicyBatch],
    batch_of: Callable[[int, int], PolicyBatch],
) -> None:
    batch = batch_of(1, 11)
    whole, _ = update(state_of(params), batch)
    before = len(compilations)
    # Without the micro-batches of the later rows, those rows teach nothing.
    fewer = batch._replace(rows=batch.rows._replace(num_micro_batches=np.int32(2)))
    part, _ = update(state_of(params), fewer)
    embedding = [state.params["embedding"] for state in (whole, part)]
    assert np.abs(embedding[0] - embedding[1]).max() > 1e-3
    none = batch._replace(rows=batch.rows._replace(num_micro_batches=np.int32(0)))
    unchanged, metrics = update(state_of(params), none)
    assert_close(unchanged.params, params)
    assert metrics["policy/loss"] == 0.0
    assert len(compilations) == before


def test_metrics_by_another_way(
    params: Params,
    reference: Params,
    score: Callable[..., jax.Array],
    update: Callable[..., Updated],
    batch_of: Callable[[int, int], PolicyBatch],
) -> None:
    batch = batch_of(1, 11)
    _, metrics = update(state_of(params), batch)
    drift = np.asarray(batch.old_log_probs - batch.ref_log_probs).reshape(-1)
    means = [
        drift[index[keep]].mean()
        for index, keep in zip(batch.completion.index, batch.completion.mask)
    ]
    ours = metrics["policy/kl_to_reference"]
    np.testing.assert_allclose(ours, np.mean(means), rtol=1e-4)
    assert 0 < metrics["policy/entropy"] < np.log(40)
    assert metrics["optimizer/gradient_norm"] > 0


def test_completions_without_tokens_count_but_teach_nothing(
    params: Params,
    update: Callable[..., Updated],
    batch_of: Callable[[int, int], PolicyBatch],
) -> None:
    batch = batch_of(1, 11)
    nothing = jax.tree.map(np.zeros_like, batch.completion)
    state, metrics = update(state_of(params), batch._replace(completion=nothing))
    assert metrics["policy/loss"] == 0.0
    assert_close(state.params, params)
