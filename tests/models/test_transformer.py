"""The decoder against itself: causality, packing, padding, cache, remat."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig, RopeScaling
from rlt_jax.models.paged_cache import empty_pages
from rlt_jax.models.transformer import (
    RMSNorm,
    Transformer,
    hidden_states,
    init_params,
    logical_axes,
)
from rlt_jax.types import Params

Function = Callable[..., Any]
PLAIN = ModelConfig(
    vocab_size=61,
    embed_dim=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_length=64,
)
CONFIGS = {
    "plain": PLAIN,
    "biases": dataclasses.replace(
        PLAIN, qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=False
    ),
    "windows": dataclasses.replace(
        PLAIN,
        qk_norm=True,
        num_kv_heads=1,
        activation="gelu_tanh",
        norm_plus_one=True,
        post_norms=True,
        scale_embeddings=True,
        query_scale_dim=4,
        attention_softcap=5.0,
        final_softcap=3.0,
        sliding_window=4,
        windowed_layers=(True, False, True),
        local_rope_theta=100.0,
        rope_scaling=RopeScaling("yarn", 4.0, original_length=8),
    ),
}
LENGTH = 12


@pytest.fixture(params=CONFIGS, scope="module")
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@functools.cache
def random_params(config: ModelConfig) -> Params:
    """Like a trained model's: no bias is zero, no norm scale is its initial value."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (0.2 * rng.standard_normal(x.shape)).astype(x.dtype), shapes
    )


def random_tokens(config: ModelConfig, *shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(1, config.vocab_size, shape, np.int32)


def test_each_logit_depends_on_its_past_alone(
    config: ModelConfig, forward: Function
) -> None:
    """d logits[t] / d embedding of token s is zero exactly where s > t."""
    params = random_params(config)
    params = {"output": np.ones((config.embed_dim, config.vocab_size)), **params}
    untied = dataclasses.replace(config, tie_embeddings=False)
    tokens = np.arange(LENGTH)[None]  # token s is row s of the embedding

    @jax.jit
    @jax.jacrev
    def jacobian(embedding: jax.Array) -> jax.Array:
        changed = {**params, "embedding": embedding}
        return forward(untied, changed, tokens, tokens, np.ones_like(tokens)).sum(-1)[0]

    depends = np.abs(jacobian(params["embedding"])[:, :LENGTH]).sum(axis=-1) > 0
    np.testing.assert_array_equal(depends, np.tri(LENGTH, dtype=bool))


def test_packed_rows_equal_unpacked_rows(
    config: ModelConfig, full_logits: Function
) -> None:
    tokens = random_tokens(config, 1, LENGTH)
    lengths = (5, 4, 3)
    segment_ids = np.repeat([1, 2, 3], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = full_logits(config, random_params(config), tokens, positions, segment_ids)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = full_logits(config, random_params(config), tokens[:, part])
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5, rtol=1e-5)
        start += length


def test_padding_does_not_matter(config: ModelConfig, full_logits: Function) -> None:
    tokens = random_tokens(config, 2, LENGTH)
    alone = full_logits(config, random_params(config), tokens[:, :7])
    segment_ids = np.where(np.arange(LENGTH) < 7, 1, 0)[None].repeat(2, axis=0)
    padded = full_logits(config, random_params(config), tokens, segment_ids=segment_ids)
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[:, :7], alone, atol=1e-5, rtol=1e-5)


def test_cached_decoding_equals_the_full_forward(
    config: ModelConfig, full_logits: Function, cached_logits: Function
) -> None:
    tokens = random_tokens(config, 3, LENGTH)
    cached = cached_logits(config, random_params(config), tokens, np.array([2, 7, 4]))
    full = full_logits(config, random_params(config), tokens)
    np.testing.assert_allclose(cached, full, atol=1e-5, rtol=1e-5)


def value_and_grad(config: ModelConfig, forward: Function) -> tuple[jax.Array, Params]:
    tokens = random_tokens(config, 2, LENGTH)
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)

    @jax.jit
    @jax.value_and_grad
    def loss(params: Params) -> jax.Array:
        out = forward(config, params, tokens, positions, np.ones_like(tokens))
        return jax.nn.logsumexp(out, axis=-1).mean()

    return loss(random_params(config))


@pytest.mark.parametrize("config", ["windows"], indirect=True)
def test_remat_changes_neither_values_nor_gradients(
    config: ModelConfig, forward: Function
) -> None:
    plain = value_and_grad(config, forward)
    for remat in ("full", "dots"):
        again = value_and_grad(dataclasses.replace(config, remat=remat), forward)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
            plain,
            again,
        )


def test_activations_have_the_configured_dtype(
    config: ModelConfig, full_logits: Function
) -> None:
    config = dataclasses.replace(config, dtype="bfloat16")
    tokens = random_tokens(config, 1, LENGTH)
    hidden, cache = jax.eval_shape(
        functools.partial(hidden_states, Transformer(config)),
        random_params(config),
        tokens,
        tokens,
        None,
        empty_pages(config, 4, 4)._replace(table=np.array([[1, 2, 3]])),
    )
    assert hidden.dtype == cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    logits = full_logits(config, random_params(config), tokens)
    assert logits.dtype == np.float32


def test_rows_need_segments_or_a_cache() -> None:
    params = random_params(PLAIN)
    tokens = random_tokens(PLAIN, 1, 4)
    with pytest.raises(ValueError, match="segment_ids"):
        hidden_states(Transformer(PLAIN), params, tokens, np.arange(4)[None])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"remat": "half"}, "remat='half'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"windowed_layers": (True,) * 3}, "sliding_window"),
        ({"windowed_layers": (True,), "sliding_window": 4}, "1 values"),
        ({"rope_scaling": {"kind": "dynamic", "factor": 2.0}}, "kind='dynamic'"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "original_length"),
    ],
)
def test_impossible_configs_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAIN, **changes)


def test_a_config_survives_json(config: ModelConfig) -> None:
    text = json.dumps(dataclasses.asdict(config))
    assert ModelConfig(**json.loads(text)) == config
    assert hash(ModelConfig(**json.loads(text))) == hash(config)


def test_a_window_hides_what_lies_before_it(full_logits: Function) -> None:
    """One windowed layer of 4 tokens: logit t does not depend on token t - 4."""
    config = dataclasses.replace(
        PLAIN, num_layers=1, sliding_window=4, windowed_layers=(True,)
    )
    tokens = random_tokens(config, 1, LENGTH)
    changed = tokens.copy()
    changed[0, 3] = (changed[0, 3] + 1) % config.vocab_size
    params = random_params(config)
    before = full_logits(config, params, tokens)
    after = full_logits(config, params, changed)
    differs = np.abs(after - before).max(axis=-1)[0] > 0
    assert differs.nonzero()[0].tolist() == [3, 4, 5, 6]


def test_every_parameter_has_logical_axes(config: ModelConfig) -> None:
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    axes = logical_axes(config)
    assert jax.tree.structure(shapes) == jax.tree.structure(axes)
    for path, spec in jax.tree_util.tree_leaves_with_path(axes):
        stacked = path[0].key == "layers"
        assert (spec[0] == "layers") == stacked
        assert None not in spec


@pytest.mark.parametrize("plus_one", [False, True])
def test_an_initial_norm_only_normalises(plus_one: bool) -> None:
    x = np.random.default_rng(3).standard_normal((2, 32)).astype(np.float32)
    y, _ = RMSNorm(1e-6, plus_one).init_with_output(jax.random.key(0), x)
    expected = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
    np.testing.assert_allclose(y, expected, atol=1e-5, rtol=1e-5)
