"""Low-rank adapters: initial values, training, merging, sharding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, PartitionSpec

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer
from rlt_jax.stages.sft import next_token_loss
from rlt_jax.training.learner import make_learner
from rlt_jax.training.lora import LoRAConfig, Tuning, combine, make_tuning
from rlt_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlt_jax.training.sharding import param_shardings
from rlt_jax.training.state import new_state, state_shardings
from rlt_jax.types import Batch, Params, TrainState

FullLogits = Callable[[Transformer, Params, np.ndarray], np.ndarray]
KEY = jax.random.key(0)
ADAM = make_optimizer(OptimizerConfig(1e-2), 5)
TOKENS = np.random.default_rng(0).integers(1, 40, (2, 9), np.int32)
POSITIONS = np.broadcast_to(np.arange(9, dtype=np.int32), TOKENS.shape)
LEARNED = (POSITIONS > 0).astype(np.float32)
BATCH = Batch(
    tokens=TOKENS[None],
    positions=POSITIONS[None],
    segment_ids=np.ones_like(TOKENS[None]),
    num_micro_batches=np.int32(1),
    loss_weights=(LEARNED / LEARNED.sum())[None],
)


def filled(adapters: Params) -> Params:
    """Adapters with no zeros in them, as after training."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape)), adapters)


def train(
    tuning: Tuning,
    trained: Params,
    mesh: Mesh,
    tx: optax.GradientTransformation,
    steps: int,
) -> tuple[TrainState, float]:
    """The state after some steps on one batch, and its loss before the last step."""
    shardings = state_shardings(tuning.model, tx, mesh)
    state = new_state(trained, tx, shardings)
    learner = make_learner(next_token_loss, tuning, tx, mesh, shardings)
    for _ in range(steps):
        state, metrics = learner.update(state, BATCH)
    return state, float(metrics["sft/loss"])


def test_fresh_adapters_change_nothing(
    model: Transformer, params: Params, mesh: Mesh, full_logits: FullLogits
) -> None:
    tuning, adapters = make_tuning(LoRAConfig(4), model, params, mesh, KEY)
    tree = combine(tuning.model, tuning.frozen, adapters)
    expected = full_logits(model, params, TOKENS)
    np.testing.assert_array_equal(full_logits(tuning.model, tree, TOKENS), expected)
    jax.tree.map(np.testing.assert_array_equal, tuning.merge(adapters), params)
    again = make_tuning(LoRAConfig(4), model, params, mesh, KEY)[1]
    jax.tree.map(np.testing.assert_array_equal, adapters, again)


# A rank that is as large as a width makes an adapter look like its kernel.
@pytest.mark.parametrize("rank", [1, 4, 16, 24])
def test_merged_parameters_are_base_and_adapters(
    rank: int, model: Transformer, params: Params, mesh: Mesh, full_logits: FullLogits
) -> None:
    config = LoRAConfig(rank, alpha=2.0 * rank)
    tuning, adapters = make_tuning(config, model, params, mesh, KEY)
    adapters = filled(adapters)
    tree = combine(tuning.model, tuning.frozen, adapters)
    beside = full_logits(tuning.model, tree, TOKENS)
    merged = tuning.merge(adapters)
    inside = full_logits(model, merged, TOKENS)
    np.testing.assert_allclose(inside, beside, atol=1e-3)
    assert np.abs(inside - full_logits(model, params, TOKENS)).max() > 0.5

    kernel, pair = (tree["layers"]["attention"]["query"] for tree in (params, adapters))
    product = np.einsum("ldr,lrf->ldf", pair["kernel_lora_a"], pair["kernel_lora_b"])
    expected = kernel["kernel"] + 2.0 * product.reshape(kernel["kernel"].shape)
    ours = merged["layers"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_only_the_named_projections_have_adapters(
    model: Transformer, params: Params, mesh: Mesh
) -> None:
    config = LoRAConfig(4, modules=("query", "down"))
    _, adapters = make_tuning(config, model, params, mesh, KEY)
    shapes = {"/".join(path): x.shape for path, x in flatten_dict(adapters).items()}
    assert shapes == {
        "layers/attention/query/kernel_lora_a": (2, 16, 4),
        "layers/attention/query/kernel_lora_b": (2, 4, 16),
        "layers/mlp/down/kernel_lora_a": (2, 24, 4),
        "layers/mlp/down/kernel_lora_b": (2, 4, 16),
    }


def test_low_precision_keeps_adapters_and_base_as_they_are(
    model: Transformer, params: Params, mesh: Mesh, full_logits: FullLogits
) -> None:
    fields = {
        name: getattr(model.config, name) for name in ModelConfig.__dataclass_fields__
    }
    half = Transformer(ModelConfig(**fields | {"dtype": "bfloat16", "remat": "full"}))
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tuning, adapters = make_tuning(LoRAConfig(4), half, base, mesh, KEY)
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    state, _ = train(tuning, adapters, mesh, ADAM, steps=2)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    merged = tuning.merge(state.params)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_only_the_adapters_are_trained(
    model: Transformer, params: Params, mesh: Mesh
) -> None:
    tuning, adapters = make_tuning(LoRAConfig(2), model, params, mesh, KEY)
    before = jax.tree.map(np.array, params)
    state, _ = train(tuning, adapters, mesh, ADAM, steps=5)
    jax.tree.map(np.testing.assert_array_equal, tuning.frozen, before)
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), state.params, adapters)
    assert all(jax.tree.leaves(moved))
    size = sum(x.size for x in jax.tree.leaves(adapters))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * size
    assert size < 0.5 * sum(x.size for x in jax.tree.leaves(params))


def test_a_full_rank_learns_what_full_fine_tuning_of_the_kernels_does(
    model: Transformer, params: Params, mesh: Mesh
) -> None:
    def kind(path: tuple[Any, ...], _: jax.Array) -> str:
        return "kernel" if path[0].key == "layers" and "kernel" in str(path) else "rest"

    tx = optax.multi_transform(
        {
            "kernel": optax.adam(optax.cosine_decay_schedule(3e-2, 100)),
            "rest": optax.set_to_zero(),
        },
        lambda tree: jax.tree_util.tree_map_with_path(kind, tree),
    )
    losses = {}
    for rank in (0, 2, 16):
        config = LoRAConfig(rank, alpha=float(rank))
        tuning, trained = make_tuning(config, model, params, mesh, KEY)
        losses[rank] = train(tuning, trained, mesh, tx, steps=100)[1]
    assert losses[16] == pytest.approx(losses[0], abs=2e-3)
    assert losses[2] > losses[0] + 0.01  # the rank is a limit


def test_adapters_are_sharded_as_their_kernels(
    model: Transformer, params: Params, mesh: Mesh
) -> None:
    tuning, adapters = make_tuning(LoRAConfig(4), model, params, mesh, KEY)
    tx = optax.adam(0.1)
    shardings = state_shardings(tuning.model, tx, mesh)
    assert jax.tree.structure(shardings.params) == jax.tree.structure(adapters)
    query = shardings.params["layers"]["attention"]["query"]
    assert query["kernel_lora_a"].spec == PartitionSpec(None, "fsdp", None)
    assert query["kernel_lora_b"].spec == PartitionSpec(None, None, "tensor")
    assert shardings.opt_state[0].mu == shardings.params
    for tree, wanted in (
        (adapters, shardings.params),
        (tuning.merge(adapters), param_shardings(model, mesh)),
    ):
        jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(), tree, wanted)


def test_rank_zero_is_full_fine_tuning(
    model: Transformer, params: Params, mesh: Mesh
) -> None:
    tuning, trained = make_tuning(LoRAConfig(), model, params, mesh, KEY)
    assert trained is params and tuning.model is model and tuning.frozen is None
    assert combine(model, None, trained) is tuning.merge(trained) is params
    assert tuning.item == "params"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "LoRAConfig.rank=-1: at least 0"),
        ({"rank": 2, "modules": ("query", "head")}, "modules=.*each one of query"),
        ({"rank": 2, "modules": ()}, r"modules=\(\): not empty"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha=0"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoRAConfig(**fields)
