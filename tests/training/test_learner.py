"""The learner: sums over micro-batches against one plain expression."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlt_jax.data.examples import EMPTY, Example
from rlt_jax.data.pipeline import all_batches
from rlt_jax.data.rows import RowShape, make_spans, pack_sequences
from rlt_jax.inference.head import token_log_probs
from rlt_jax.inference.log_probs import packed_log_probs
from rlt_jax.inference.spans import gather, mask
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl import advantages
from rlt_jax.rl.losses import ObjectiveConfig, policy_loss
from rlt_jax.stages.sft import next_token_loss
from rlt_jax.training import learner
from rlt_jax.training.learner import LossFn
from rlt_jax.types import Batch, Metrics, Params, TrainState

RNG = np.random.default_rng(0)
PROMPT = 3
COMPLETIONS = (5, 1, 8, 3, 6, 2)  # lengths
TOKENS = [RNG.integers(1, 40, PROMPT + length, np.int32) for length in COMPLETIONS]
WIDTH = PROMPT + max(COMPLETIONS)
UNPACKED = np.stack([np.pad(ids, (0, WIDTH - len(ids))) for ids in TOKENS])
LENGTHS = np.array(COMPLETIONS)
IN_COMPLETION = (np.arange(WIDTH) >= PROMPT) & (
    np.arange(WIDTH) < PROMPT + LENGTHS[:, None]
)
GROUP_SIZE, MAX_NEW_TOKENS = 3, 10
REWARDS = RNG.normal(size=len(TOKENS)).astype(np.float32)
GROUPS = REWARDS.reshape(-1, GROUP_SIZE)
ADVANTAGES = (GROUPS - GROUPS.mean(1, keepdims=True)) / (
    GROUPS.std(1, ddof=1, keepdims=True) + 1e-4
)
ADVANTAGES = ADVANTAGES.reshape(-1)
FINISHED = np.array([True, True, False, True, True, True])
TEMPERATURE, BETA, RATE = 0.7, 0.3, 0.5
TX = optax.chain(optax.trace(decay=0.0), optax.sgd(RATE))  # the trace is the gradient
GRPO = ObjectiveConfig(beta=BETA)
# Rows of a micro-batch and their length: one sequence a row, and several. A batch has
# six rows, so six, three and one micro-batches; the last runs without a loop.
SHAPES = [RowShape(1, 11), RowShape(2, 24), RowShape(6, 24)]
USED = list(zip(SHAPES, (5, 1, 1), strict=True))  # with their micro-batches in use
Updated = tuple[TrainState, Metrics]


@pytest.fixture(scope="module")
def reference(params: Params) -> Params:
    return scaled(params, 1.05)


def scaled(params: Params, factor: float) -> Params:
    return jax.tree.map(lambda x: x * factor, params)


@pytest.fixture(scope="module")
def log_probs_of(model: Transformer) -> Callable[..., jax.Array]:
    return jax.jit(partial(packed_log_probs, model, TEMPERATURE))


def policy_loss_of(objective: ObjectiveConfig) -> LossFn:
    return policy_loss(objective, TEMPERATURE, len(TOKENS))


@pytest.fixture(scope="module")
def compilations() -> list[Batch]:
    """Grows by one whenever `update` is compiled."""
    return []


@pytest.fixture(scope="module")
def update(model: Transformer, compilations: list[Batch]) -> Callable[..., Updated]:
    @jax.jit
    def update(state: TrainState, batch: Batch) -> Updated:
        compilations.append(batch)
        return learner.update(policy_loss_of(GRPO), model, TX, None, state, batch)

    return update


@pytest.fixture(scope="module")
def sft_update(model: Transformer) -> Callable[..., Updated]:
    return jax.jit(partial(learner.update, next_token_loss, model, TX, None))


def state_of(params: Params, tx: optax.GradientTransformation = TX) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), jnp.int32(0))


def gradient_of(state: TrainState) -> Params:
    """The gradient of the last step."""
    return state.opt_state[0].trace


@pytest.fixture(scope="module")
def rl_batch(
    params: Params, reference: Params, log_probs_of: Callable[..., jax.Array]
) -> Callable[..., Batch]:
    def rl_batch(shape: RowShape, objective: ObjectiveConfig = GRPO) -> Batch:
        """The packed completions with log-probs, advantages and loss weights."""
        batch, starts = pack_sequences(TOKENS, shape)
        spans = make_spans(
            starts + PROMPT, [np.arange(n) for n in COMPLETIONS], max(COMPLETIONS)
        )
        batch = batch._replace(completion=spans, finished=FINISHED)
        batch = batch._replace(
            log_probs=log_probs_of(params, batch),
            ref_log_probs=log_probs_of(reference, batch),
        )
        rewards = jnp.asarray(REWARDS)
        return advantages.fill(objective, GROUP_SIZE, MAX_NEW_TOKENS, batch, rewards)

    return rl_batch


def sft_batch(shape: RowShape) -> Batch:
    """The same sequences, of which the completions are learned."""
    made = [Example(ids, np.arange(len(ids)) >= PROMPT, EMPTY, EMPTY) for ids in TOKENS]
    (batch,) = all_batches(made, shape, len(TOKENS))
    return batch


@pytest.fixture(scope="module")
def expected(
    model: Transformer, params: Params, reference: Params
) -> tuple[float, Params]:
    """Loss and parameters after the step, by one expression over unpacked rows."""

    def loss(params: Params) -> jax.Array:
        ours = token_log_probs(model, params, UNPACKED, TEMPERATURE)
        theirs = token_log_probs(model, reference, UNPACKED, TEMPERATURE)
        # REINFORCE with a baseline; the value of ratio * A is A on the policy.
        gain = ADVANTAGES[:, None] * (1 + ours - jax.lax.stop_gradient(ours))
        kl = jnp.exp(theirs - ours) - 1 - (theirs - ours)
        per_token = jnp.where(IN_COMPLETION, -gain + BETA * kl, 0.0)
        return (per_token.sum(-1) / LENGTHS).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    stepped = jax.tree.map(lambda x, g: x - RATE * g, params, gradient)
    return float(value), stepped


def assert_close(ours: Params, theirs: Params) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "used"), USED)
def test_policy_loss_does_not_depend_on_micro_batches_and_packing(
    params: Params,
    expected: tuple[float, Params],
    update: Callable[..., Updated],
    rl_batch: Callable[..., Batch],
    shape: RowShape,
    used: int,
) -> None:
    batch = rl_batch(shape)
    assert batch.num_micro_batches == used
    state, metrics = update(state_of(params), batch)
    loss, stepped = expected
    np.testing.assert_allclose(metrics["policy/loss"], loss, rtol=1e-4)
    assert_close(state.params, stepped)
    assert state.step == 1


@pytest.mark.parametrize(("shape", "used"), USED)
def test_next_token_loss_does_not_depend_on_micro_batches_and_packing(
    model: Transformer,
    params: Params,
    sft_update: Callable[..., Updated],
    shape: RowShape,
    used: int,
) -> None:
    def plain(params: Params) -> jax.Array:
        log_probs = token_log_probs(model, params, UNPACKED)
        return -jnp.where(IN_COMPLETION, log_probs, 0.0).sum() / IN_COMPLETION.sum()

    loss, gradient = jax.jit(jax.value_and_grad(plain))(params)
    batch = sft_batch(shape)
    assert batch.num_micro_batches == used
    state, metrics = sft_update(state_of(params), batch)
    np.testing.assert_allclose(metrics["sft/loss"], loss, rtol=1e-4)
    assert_close(gradient_of(state), gradient)
    norm = optax.tree.norm(gradient)
    np.testing.assert_allclose(metrics["optimizer/gradient_norm"], norm, rtol=1e-4)
    # The held-out loss, which needs no gradient.
    alone = jax.jit(partial(learner.batch_loss, next_token_loss, model))(params, batch)
    np.testing.assert_allclose(alone, loss, rtol=1e-4)


def test_metrics_are_sums_over_micro_batches_or_maxima(
    model: Transformer,
    params: Params,
    log_probs_of: Callable[..., jax.Array],
    update: Callable[..., Updated],
    sft_update: Callable[..., Updated],
    rl_batch: Callable[..., Batch],
) -> None:
    batch = rl_batch(SHAPES[0])
    # An older policy, so that ratios differ.
    older = log_probs_of(scaled(params, 0.9), batch)
    for step, loss_fn, one in (
        (update, policy_loss_of(GRPO), batch._replace(log_probs=older)),
        (sft_update, next_token_loss, sft_batch(SHAPES[0])),
    ):
        _, metrics = step(state_of(params), one)
        of_micro_batch = jax.jit(partial(loss_fn, model))
        parts = [of_micro_batch(params, one.micro_batch(m))[1] for m in range(5)]
        for name in parts[0]:
            values = [float(part[name]) for part in parts]
            assert np.ptp(values) > 1e-3 or name == "policy/clip_fraction"
            total = max(values) if name.endswith("_max") else sum(values)
            np.testing.assert_allclose(
                metrics[name], total, rtol=1e-4, atol=1e-6, err_msg=name
            )
        if loss_fn is next_token_loss:
            assert set(parts[0]) == {"sft/loss"}
        else:
            assert {"policy/ratio_max", "policy/entropy"} < set(parts[0])


def test_the_largest_of_negative_metrics(model: Transformer, params: Params) -> None:
    def loss_fn(model: Transformer, params: Params, batch: Batch) -> tuple:
        last = batch.tokens.max().astype(jnp.float32)
        return 0.0 * params["embedding"].sum(), {"a/b": -last, "a/b_max": -last}

    tokens = np.array([3, 7, 5, 1], np.int32).reshape(4, 1, 1)
    batch = Batch(tokens, np.zeros_like(tokens), np.ones_like(tokens), np.int32(3))
    update = jax.jit(partial(learner.update, loss_fn, model, TX, None))
    _, metrics = update(state_of(params), batch)
    # The fourth micro-batch is not computed.
    assert (metrics["a/b"], metrics["a/b_max"]) == (-15.0, -3.0)


def test_the_number_of_micro_batches_is_not_compiled_in(
    params: Params,
    update: Callable[..., Updated],
    compilations: list[Batch],
    rl_batch: Callable[..., Batch],
) -> None:
    batch = rl_batch(SHAPES[0])
    whole, _ = update(state_of(params), batch)
    before = len(compilations)
    # Without the micro-batches of the later rows, those rows have no gradient.
    fewer = batch._replace(num_micro_batches=np.int32(2))
    part, _ = update(state_of(params), fewer)
    embedding = [state.params["embedding"] for state in (whole, part)]
    assert np.abs(embedding[0] - embedding[1]).max() > 1e-3
    none = batch._replace(num_micro_batches=np.int32(0))
    unchanged, metrics = update(state_of(params), none)
    assert_close(unchanged.params, params)
    assert metrics["policy/loss"] == 0.0
    assert len(compilations) == before


def test_metrics_by_another_way(
    model: Transformer,
    params: Params,
    full_logits: Callable[..., np.ndarray],
    update: Callable[..., Updated],
    rl_batch: Callable[..., Batch],
) -> None:
    batch = rl_batch(SHAPES[0])
    _, metrics = update(state_of(params), batch)
    drift = np.asarray(gather(batch.log_probs - batch.ref_log_probs, batch.completion))
    means = [
        values[in_span].mean()
        for values, in_span in zip(drift, mask(batch.completion), strict=True)
    ]
    ours = metrics["policy/kl_to_reference"]
    np.testing.assert_allclose(ours, np.mean(means), rtol=1e-4)
    scores = full_logits(model, params, UNPACKED) / TEMPERATURE
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    # State t - 1 predicts token t.
    entropy = np.where(IN_COMPLETION[:, 1:], -(p * np.log(p)).sum(-1)[:, :-1], 0.0)
    mean = (entropy.sum(-1) / LENGTHS).mean()
    np.testing.assert_allclose(metrics["policy/entropy"], mean, rtol=1e-4)
    assert 0 < metrics["policy/entropy"] < np.log(40)
    assert metrics["optimizer/gradient_norm"] > 0
    np.testing.assert_allclose(metrics["policy/ratio_mean"], 1.0, rtol=1e-5)
    assert "policy/sampler_difference" not in metrics


def test_completions_without_tokens_count_but_have_no_gradient(
    params: Params, update: Callable[..., Updated], rl_batch: Callable[..., Batch]
) -> None:
    batch = rl_batch(SHAPES[0])
    empty = batch.completion._replace(
        segment=np.full_like(batch.completion.segment, -1)
    )
    batch = advantages.fill(
        GRPO,
        GROUP_SIZE,
        MAX_NEW_TOKENS,
        batch._replace(completion=empty),
        jnp.asarray(REWARDS),
    )
    state, metrics = update(state_of(params), batch)
    assert metrics["policy/loss"] == 0.0
    assert_close(state.params, params)


OFF_POLICY = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.3, "importance_cap": 1.05},
    "dr_grpo": {"beta": 0.0, "clip_high": 0.3},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "kl_estimator": "k2"},
    "gspo": {"clip_low": 0.05, "clip_high": 0.1, "kl_estimator": "k1"},
}


def off_policy(
    batch: Batch, params: Params, log_probs_of: Callable[..., jax.Array]
) -> Batch:
    """The same completions, as if sampled by a slightly different policy and sampler."""
    return batch._replace(
        log_probs=log_probs_of(scaled(params, 0.9), batch),
        sampler_log_probs=log_probs_of(scaled(params, 0.87), batch),
    )


def plain_loss(
    model: Transformer, params: Params, reference: Params, objective: ObjectiveConfig
) -> Callable[[Params], jax.Array]:
    """The loss over unpacked rows, all at once, as in the papers."""
    log_probs = jax.jit(
        partial(token_log_probs, model, tokens=UNPACKED, temperature=TEMPERATURE)
    )
    old, sampler = log_probs(scaled(params, 0.9)), log_probs(scaled(params, 0.87))
    theirs = log_probs(reference)
    A = ADVANTAGES[:, None]

    def loss(params: Params) -> jax.Array:
        ours = log_probs(params)
        change = jnp.where(IN_COMPLETION, ours - old, 0.0)
        if objective.loss == "gspo":
            change = jnp.broadcast_to(
                change.sum(-1, keepdims=True) / LENGTHS[:, None], change.shape
            )
        ratio = jnp.exp(change)
        low, high = 1 - (objective.clip_low or 9), 1 + (objective.clip_high or 9e9)
        gain = jnp.minimum(ratio * A, jnp.clip(ratio, low, high) * A)
        if objective.importance_cap:
            gain *= jnp.minimum(jnp.exp(old - sampler), objective.importance_cap)
        drift = ours - theirs
        kl = {"k1": drift, "k2": drift**2 / 2, "k3": jnp.exp(-drift) - 1 + drift}
        per_token = -gain + objective.beta * kl[objective.kl_estimator]
        kept = IN_COMPLETION & FINISHED[:, None]
        sums = jnp.where(kept, per_token, 0.0).sum(-1)
        if objective.loss == "dapo":
            return sums.sum() / LENGTHS[FINISHED].sum()
        if objective.loss == "dr_grpo":
            return sums.mean() / MAX_NEW_TOKENS
        return (sums / LENGTHS).mean()

    return loss


@pytest.mark.parametrize("loss", OFF_POLICY)
def test_every_objective_packed_or_not_is_one_plain_expression(
    model: Transformer,
    params: Params,
    reference: Params,
    log_probs_of: Callable[..., jax.Array],
    rl_batch: Callable[..., Batch],
    loss: str,
) -> None:
    settings = {"beta": BETA, "truncated": "mask", **OFF_POLICY[loss]}
    objective = ObjectiveConfig(loss, **settings)
    plain = jax.jit(jax.value_and_grad(plain_loss(model, params, reference, objective)))
    value, gradient = plain(params)
    loss_fn = policy_loss_of(objective)
    update = jax.jit(partial(learner.update, loss_fn, model, TX, None))
    for shape in SHAPES[:2]:
        batch = off_policy(rl_batch(shape, objective), params, log_probs_of)
        state, metrics = update(state_of(params), batch)
        np.testing.assert_allclose(metrics["policy/loss"], value, rtol=1e-4)
        assert_close(gradient_of(state), gradient)
        assert metrics["policy/ratio_max"] > 1.1
        assert 0 < metrics["policy/clip_fraction"] < 1
        assert 0.01 < metrics["policy/sampler_difference"] < 1.0
        if objective.importance_cap:
            assert 0.5 < metrics["policy/importance_weight_mean"] < 1.05
    # A later update of the rollout has the policy of the first, everything else is old.
    again, _ = update(state, batch)
    assert_close(gradient_of(again), plain(state.params)[1])
    assert again.step == 2


@pytest.mark.parametrize("clip", [None, 1e6, 1e-3])
def test_at_ratio_one_each_of_several_updates_is_the_single_update(
    model: Transformer,
    params: Params,
    update: Callable[..., Updated],
    rl_batch: Callable[..., Batch],
    clip: float | None,
) -> None:
    batch = rl_batch(SHAPES[1])
    single = gradient_of(update(state_of(params), batch)[0])
    still = optax.chain(optax.trace(decay=0.0), optax.sgd(0.0))
    objective = ObjectiveConfig(beta=BETA, clip_low=clip, clip_high=clip)
    loss_fn = policy_loss_of(objective)
    repeat = jax.jit(partial(learner.update, loss_fn, model, still, None))
    state = state_of(params)
    for _ in range(2):
        state, metrics = repeat(state, batch)
        for ours, theirs in zip(
            jax.tree.leaves(gradient_of(state)), jax.tree.leaves(single), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(metrics["policy/ratio_mean"], 1.0, rtol=1e-5)
        np.testing.assert_allclose(metrics["policy/clip_fraction"], 0.0)


def assert_skipped(before: TrainState, after: TrainState, metrics: Metrics) -> None:
    """No bit of the state has changed, but for the count of skipped steps."""
    assert metrics["optimizer/skipped"] == 1
    assert metrics["optimizer/update_norm"] == 0
    assert after.skipped == metrics["optimizer/skipped_in_a_row"] == before.skipped + 1
    after = after._replace(skipped=before.skipped)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


def test_a_step_that_is_not_finite_or_too_long_changes_no_bit(
    model: Transformer, params: Params, rl_batch: Callable[..., Batch]
) -> None:
    tx = optax.adamw(0.1)
    loss_fn = policy_loss_of(ObjectiveConfig())
    update = jax.jit(partial(learner.update, loss_fn, model, tx, 50.0))
    batch = rl_batch(SHAPES[1])
    state, metrics = update(state_of(params, tx), batch)
    assert metrics["optimizer/skipped"] == 0.0
    assert metrics["optimizer/gradient_norm"] < 50
    assert state.step == 1
    third = (batch.inverse_length > 0) & (
        batch.inverse_length == 1 / np.float32(COMPLETIONS[2])
    )
    assert third.sum() == COMPLETIONS[2]
    for advantage in (np.nan, np.inf, -np.inf, 1e4):
        changed = jnp.where(third, advantage, batch.advantages)
        after, metrics = update(state, batch._replace(advantages=changed))
        assert_skipped(state, after, metrics)
        assert np.isfinite(metrics["policy/entropy"])


def test_skipped_steps_are_counted_until_one_changes_the_parameters(
    model: Transformer,
    params: Params,
    update: Callable[..., Updated],
    sft_update: Callable[..., Updated],
    rl_batch: Callable[..., Batch],
) -> None:
    good_rl, good_sft = rl_batch(SHAPES[1]), sft_batch(SHAPES[1])
    for step, good in ((update, good_rl), (sft_update, good_sft)):
        bad = good._replace(loss_weights=np.asarray(good.loss_weights) * np.nan)
        state = state_of(params)
        for _ in range(3):
            before = state
            state, metrics = step(state, bad)
            assert_skipped(before, state, metrics)
        assert (state.step, state.skipped) == (0, 3)
        state, metrics = step(state, good)
        assert (state.step, state.skipped) == (1, 0)
        assert metrics["optimizer/skipped"] == 0
        assert metrics["optimizer/skipped_in_a_row"] == 0


def test_an_only_update_computes_the_old_log_probs_itself(
    model: Transformer, params: Params, rl_batch: Callable[..., Batch]
) -> None:
    objective = ObjectiveConfig(beta=BETA, clip_low=0.2, clip_high=0.2)
    loss_fn = policy_loss_of(objective)
    update = jax.jit(partial(learner.update, loss_fn, model, TX, None))
    batch = rl_batch(SHAPES[1])
    state, metrics = update(state_of(params), batch)
    alone, computed = update(state_of(params), batch._replace(log_probs=None))
    assert_close(alone.params, state.params)
    assert metrics.keys() == computed.keys()
    assert computed["policy/ratio_max"] == 1.0
    for name, value in computed.items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-4, atol=1e-6)


def test_the_mixed_reference() -> None:
    mixed = learner.mix({"a": jnp.ones(2)}, {"a": jnp.zeros(2)}, 0.9)
    np.testing.assert_allclose(mixed["a"], 0.1, rtol=1e-6)
