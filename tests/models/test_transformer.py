"""The decoder against itself: causality, packing, padding, cache, remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import (
    Transformer,
    empty_cache,
    hidden_states,
    init_params,
    logits,
)
from rlt_jax.types import KVCache

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
    "biases": dataclasses.replace(PLAIN, qkv_bias=True, tie_embeddings=False),
    "qk_norm": dataclasses.replace(PLAIN, qk_norm=True, num_kv_heads=1),
}
LENGTH = 12


@pytest.fixture(params=CONFIGS, scope="module")
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@functools.cache
def random_params(config: ModelConfig) -> dict:
    """Like a trained model's: no bias is zero, no norm scale is its initial value."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (0.2 * rng.standard_normal(x.shape)).astype(x.dtype), shapes
    )


def random_tokens(config: ModelConfig, *shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(1, config.vocab_size, shape, np.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(
    config: ModelConfig,
    params: dict,
    tokens: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    model = Transformer(config)
    hidden, _ = hidden_states(model, params, tokens, positions, segment_ids)
    return logits(model, params, hidden)


def full_logits(
    config: ModelConfig,
    tokens: np.ndarray,
    segment_ids: np.ndarray | None = None,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """Logits [B, T, V] of one forward pass without a cache."""
    if segment_ids is None:
        segment_ids = np.ones_like(tokens)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    params = random_params(config)
    return np.asarray(forward(config, params, tokens, segment_ids, positions))


def test_each_logit_depends_on_its_past_alone(config: ModelConfig) -> None:
    """d logits[t] / d embedding of token s is zero exactly where s > t."""
    params = random_params(config)
    params = {"output": np.ones((config.embed_dim, config.vocab_size)), **params}
    untied = dataclasses.replace(config, tie_embeddings=False)
    tokens = np.arange(LENGTH)[None]  # token s is row s of the embedding

    @jax.jit
    @jax.jacrev
    def jacobian(embedding: jax.Array) -> jax.Array:
        changed = {**params, "embedding": embedding}
        return forward(untied, changed, tokens, np.ones_like(tokens), tokens).sum(-1)[0]

    depends = np.abs(jacobian(params["embedding"])[:, :LENGTH]).sum(axis=-1) > 0
    np.testing.assert_array_equal(depends, np.tri(LENGTH, dtype=bool))


def test_packed_rows_equal_unpacked_rows(config: ModelConfig) -> None:
    tokens = random_tokens(config, 1, LENGTH)
    lengths = (5, 4, 3)
    segment_ids = np.repeat([1, 2, 3], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = full_logits(config, tokens, segment_ids, positions)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = full_logits(config, tokens[:, part])
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5, rtol=1e-5)
        start += length


def test_padding_does_not_matter(config: ModelConfig) -> None:
    tokens = random_tokens(config, 2, LENGTH)
    alone = full_logits(config, tokens[:, :7])
    segment_ids = np.where(np.arange(LENGTH) < 7, 1, 0)[None].repeat(2, axis=0)
    padded = full_logits(config, tokens, segment_ids)
    assert np.isfinite(padded).all()
    np.testing.assert_allclose(padded[:, :7], alone, atol=1e-5, rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def cached_forward(
    config: ModelConfig,
    params: dict,
    tokens: jax.Array,
    positions: jax.Array,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    model = Transformer(config)
    hidden, cache = hidden_states(model, params, tokens, positions, None, cache)
    return logits(model, params, hidden), cache


def cached_logits(
    config: ModelConfig, tokens: np.ndarray, prompt_lengths: np.ndarray
) -> np.ndarray:
    """Logits [B, T, V]: right-padded prompts first, then a token of each row a time."""
    params = random_params(config)
    B, T = tokens.shape
    P = int(prompt_lengths.max())
    row = np.arange(B)
    prompt = np.where(np.arange(P) < prompt_lengths[:, None], tokens[:, :P], 0)
    positions = np.broadcast_to(np.arange(P), (B, P))
    cache = empty_cache(config, B, T)
    first, cache = cached_forward(config, params, prompt, positions, cache)
    out = np.zeros((B, T, config.vocab_size), np.float32)
    for b, length in enumerate(prompt_lengths):
        out[b, :length] = first[b, :length]
    for i in range(T - int(prompt_lengths.min())):
        # A row that is done writes its last token again.
        at = np.minimum(prompt_lengths + i, T - 1)
        step = tokens[row, at][:, None], at[:, None]
        new, cache = cached_forward(config, params, *step, cache)
        out[row, at] = new[:, 0]
    return out


def test_cached_decoding_equals_the_full_forward(config: ModelConfig) -> None:
    tokens = random_tokens(config, 3, LENGTH)
    cached = cached_logits(config, tokens, np.array([2, 7, 4]))
    full = full_logits(config, tokens)
    np.testing.assert_allclose(cached, full, atol=1e-5, rtol=1e-5)


def value_and_grad(config: ModelConfig) -> tuple[jax.Array, dict]:
    tokens = random_tokens(config, 2, LENGTH)
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)

    @jax.jit
    @jax.value_and_grad
    def loss(params: dict) -> jax.Array:
        out = forward(config, params, tokens, np.ones_like(tokens), positions)
        return jax.nn.logsumexp(out, axis=-1).mean()

    return loss(random_params(config))


def test_remat_changes_neither_values_nor_gradients(config: ModelConfig) -> None:
    plain = value_and_grad(config)
    for remat in ("full", "dots"):
        again = value_and_grad(dataclasses.replace(config, remat=remat))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
            plain,
            again,
        )


def test_activations_have_the_configured_dtype(config: ModelConfig) -> None:
    config = dataclasses.replace(config, dtype="bfloat16")
    tokens = random_tokens(config, 1, LENGTH)
    hidden, cache = jax.eval_shape(
        functools.partial(hidden_states, Transformer(config)),
        random_params(config),
        tokens,
        tokens,
        None,
        empty_cache(config, 1, LENGTH),
    )
    assert hidden.dtype == cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert full_logits(config, tokens).dtype == np.float32


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
    ],
)
def test_impossible_configs_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **changes)
