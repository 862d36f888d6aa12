"""The policy step: sums over micro-batches against one plain expression."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rlt_jax.data.packing import gather_spans, pack
from rlt_jax.inference.scoring import score_rows
from rlt_jax.rl.policy_update import PolicyBatch

from rlt_jax.inference.log_probs import token_log_probs
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl import policy_update
from rlt_jax.rl.losses import ObjectiveConfig
from rlt_jax.types import Params, TrainState

RNG = np.random.default_rng(0)
PROMPT = 3
COMPLETIONS = (5, 1, 8, 3, 6, 2)  # lengths
TOKENS = [RNG.integers(1, 40, PROMPT + length, np.int32) for length in COMPLETIONS]
ADVANTAGES = RNG.normal(size=len(TOKENS)).astype(np.float32)
SAMPLING = SamplingConfig(max_new_tokens=10, temperature=0.7)
TEMPERATURE, BETA, RATE = 0.7, 0.3, 0.5
TX = optax.chain(optax.trace(decay=0.0), optax.sgd(RATE))  # the trace is the gradient
GRPO = ObjectiveConfig(beta=BETA)
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
        return policy_update.update(model, TX, SAMPLING, GRPO, state, batch)

    return update


def state_of(params: Params) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, TX.init(params), jnp.int32(0))


def gradient_of(state: TrainState) -> Params:
    """The gradient of the last step."""
    return state.opt_state[0].trace


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
    np.testing.assert_allclose(metrics["policy/ratio_mean"], 1.0, rtol=1e-5)
    assert "policy/sampler_difference" not in metrics


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


OFF_POLICY = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.3, "importance_cap": 1.05},
    "dr_grpo": {"beta": 0.0, "clip_high": 0.3},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "kl_estimator": "k2"},
    "gspo": {"clip_low": 0.05, "clip_high": 0.1, "kl_estimator": "k1"},
}
COUNTED = np.array([True, True, False, True, True, True])


def off_policy(
    batch: PolicyBatch, params: Params, score: Callable[..., jax.Array]
) -> PolicyBatch:
    """The same completions, as if drawn from a policy and a sampler a little off."""
    old = score(jax.tree.map(lambda x: x * 0.9, params), batch.rows)
    sampler = score(jax.tree.map(lambda x: x * 0.87, params), batch.rows)
    return batch._replace(old_log_probs=old, sampler_log_probs=sampler, counted=COUNTED)


def plain_loss(
    model: Transformer, params: Params, reference: Params, objective: ObjectiveConfig
) -> Callable[[Params], jax.Array]:
    """The loss over unpacked rows, all at once, as the papers write it."""
    width = PROMPT + max(COMPLETIONS)
    tokens = np.stack([np.pad(row, (0, width - len(row))) for row in TOKENS])
    place, lengths = np.arange(width), np.array(COMPLETIONS)
    mask = (place >= PROMPT) & (place < PROMPT + lengths[:, None])
    log_probs = partial(token_log_probs, model, tokens=tokens, temperature=TEMPERATURE)
    old = log_probs(jax.tree.map(lambda x: x * 0.9, params))
    sampler = log_probs(jax.tree.map(lambda x: x * 0.87, params))
    theirs = log_probs(reference)
    A = ADVANTAGES[:, None]

    def loss(params: Params) -> jax.Array:
        ours = log_probs(params)
        change = jnp.where(mask, ours - old, 0.0)
        if objective.loss == "gspo":
            change = jnp.broadcast_to(
                change.sum(-1, keepdims=True) / lengths[:, None], change.shape
            )
        ratio = jnp.exp(change)
        low, high = 1 - (objective.clip_low or 9), 1 + (objective.clip_high or 9e9)
        gain = jnp.minimum(ratio * A, jnp.clip(ratio, low, high) * A)
        if objective.importance_cap:
            gain *= jnp.minimum(jnp.exp(old - sampler), objective.importance_cap)
        drift = ours - theirs
        kl = {"k1": drift, "k2": drift**2 / 2, "k3": jnp.exp(-drift) - 1 + drift}
        per_token = -gain + objective.beta * kl[objective.kl_estimator]
        sums = jnp.where(mask & COUNTED[:, None], per_token, 0.0).sum(-1)
        if objective.loss == "dapo":
            return sums.sum() / lengths[COUNTED].sum()
        if objective.loss == "dr_grpo":
            return sums.mean() / SAMPLING.max_new_tokens
        return (sums / lengths).mean()

    return loss


@pytest.mark.parametrize("loss", OFF_POLICY)
def test_every_objective_packed_or_not_is_one_plain_expression(
    model: Transformer,
    params: Params,
    reference: Params,
    score: Callable[..., jax.Array],
    batch_of: Callable[[int, int], PolicyBatch],
    loss: str,
) -> None:
    objective = ObjectiveConfig(loss, **{"beta": BETA, **OFF_POLICY[loss]})
    plain = jax.jit(jax.value_and_grad(plain_loss(model, params, reference, objective)))
    value, gradient = plain(params)
    update = jax.jit(partial(policy_update.update, model, TX, SAMPLING, objective))
    for shape in ((1, 11), (2, 24)):
        batch = off_policy(batch_of(*shape), params, score)
        state, metrics = update(state_of(params), batch)
        np.testing.assert_allclose(metrics["policy/loss"], value, rtol=1e-4)
        assert_close(gradient_of(state), gradient)
        assert metrics["policy/ratio_max"] > 1.1
        assert 0 < metrics["policy/clip_fraction"] < 1
        assert 0.01 < metrics["policy/sampler_difference"] < 1.0
        if objective.importance_cap:
            assert 0.5 < metrics["policy/importance_weight_mean"] < 1.05
    # A later update of the rollout has the policy of the first, and the old rest.
    again, _ = update(state, batch)
    assert_close(gradient_of(again), plain(state.params)[1])
    assert again.step == 2


@pytest.mark.parametrize("clip", [None, 1e9, 1e-3])
def test_at_ratio_one_each_of_several_updates_is_the_single_update(
    model: Transformer,
    params: Params,
    update: Callable[..., Updated],
    batch_of: Callable[[int, int], PolicyBatch],
    clip: float | None,
) -> None:
    batch = batch_of(2, 24)
    single = gradient_of(update(state_of(params), batch)[0])
    still = optax.chain(optax.trace(decay=0.0), optax.sgd(0.0))
    objective = ObjectiveConfig(beta=BETA, clip_low=clip, clip_high=clip)
    repeat = jax.jit(partial(policy_update.update, model, still, SAMPLING, objective))
    state = state_of(params)
    for _ in range(2):
        state, metrics = repeat(state, batch)
        for ours, theirs in zip(
            jax.tree.leaves(gradient_of(state)), jax.tree.leaves(single), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(metrics["policy/ratio_mean"], 1.0, rtol=1e-5)
        np.testing.assert_allclose(metrics["policy/clip_fraction"], 0.0)


def test_a_step_that_is_not_finite_or_too_long_changes_no_bit(
    model: Transformer,
    params: Params,
    batch_of: Callable[[int, int], PolicyBatch],
) -> None:
    tx = optax.adamw(0.1)
    objective = ObjectiveConfig(skip_gradient_norm=50.0)
    update = jax.jit(partial(policy_update.update, model, tx, SAMPLING, objective))
    batch = batch_of(2, 24)
    start = TrainState(jnp.int32(0), params, tx.init(params), jnp.int32(0))
    state, metrics = update(start, batch)
    assert metrics["optimizer/skipped"] == 0.0
    assert metrics["optimizer/gradient_norm"] < 50
    assert state.step == 1
    spoilt = (np.nan, np.inf, -np.inf, 1e4)
    for advantage in spoilt:
        advantages = batch.advantages.at[2].set(advantage)
        after, metrics = update(state, batch._replace(advantages=advantages))
        assert after.skipped == metrics["optimizer/skipped"] == 1
        after = after._replace(skipped=state.skipped)
        for old, new in zip(
            jax.tree.leaves(state), jax.tree.leaves(after), strict=True
        ):
            assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
        assert np.isfinite(metrics["policy/entropy"])


def test_an_only_update_finds_the_old_log_probs_itself(
    model: Transformer,
    params: Params,
    batch_of: Callable[[int, int], PolicyBatch],
) -> None:
    objective = ObjectiveConfig(beta=BETA, clip_low=0.2, clip_high=0.2)
    update = jax.jit(partial(policy_update.update, model, TX, SAMPLING, objective))
    batch = batch_of(2, 24)
    state, metrics = update(state_of(params), batch)
    alone, found = update(state_of(params), batch._replace(old_log_probs=None))
    assert_close(alone.params, state.params)
    assert metrics.keys() == found.keys()
    assert found["policy/ratio_max"] == 1.0
    for name, value in found.items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-4, atol=1e-6)


def test_the_mixed_reference() -> None:
    mixed = policy_update.mix_reference({"a": jnp.ones(2)}, {"a": jnp.zeros(2)}, 0.9)
    np.testing.assert_allclose(mixed["a"], 0.1, rtol=1e-6)
