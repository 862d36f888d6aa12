"""Attention by blocks is attention."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.models import attention as attention_lib
from rlt_jax.models.attention import MASKED, Tokens, attention, soft_cap
from rlt_jax.models.attention_kernels import Settings

B, T, N, K, H = 2, 128, 6, 2, 8
LENGTHS = ([40, 50, 20], [90, 7, 31])


def packed() -> tuple[jax.Array, jax.Array]:
    positions = np.zeros((B, T), np.int32)
    segment_ids = np.zeros((B, T), np.int32)
    for b, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths, 1):
            positions[b, start : start + length] = np.arange(length)
            segment_ids[b, start : start + length] = number
            start += length
    return jnp.array(positions), jnp.array(segment_ids)


def dense(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    settings: Settings,
) -> jax.Array:
    """The same by all pairs of tokens, one query head at a time."""
    scale, softcap, window = settings
    distance = tokens.positions[:, :, None] - tokens.positions[:, None, :]
    seen = tokens.segment_ids[:, :, None] == tokens.segment_ids[:, None, :]
    seen &= distance >= 0
    if window is not None and bool(tokens.windowed):
        seen &= distance < window
    heads = []
    for n in range(N):
        k, v = (x[:, :, n // (N // K)] for x in (key, value))
        scores = scale * jnp.einsum("BTH,BSH->BTS", query[:, :, n], k)
        if softcap is not None:
            scores = soft_cap(scores, softcap)
        weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
        heads.append(jnp.einsum("BTS,BSH->BTH", weights, v))
    return jnp.stack(heads, axis=2)


@pytest.mark.parametrize("block", [16, 24, 64, 200])  # 24 leaves part of a block over
@pytest.mark.parametrize(
    ("softcap", "window", "windowed"),
    [(None, None, False), (2.0, None, False), (3.0, 10, True), (None, 10, False)],
)
def test_blocks_change_neither_values_nor_gradients(
    monkeypatch: pytest.MonkeyPatch,
    softcap: float | None,
    window: int | None,
    windowed: bool,
    block: int,
) -> None:
    positions, segment_ids = packed()
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (B, T, N, H))
    key = jax.random.normal(keys[1], (B, T, K, H))
    value = jax.random.normal(keys[2], (B, T, K, H))
    live = (segment_ids > 0)[:, :, None, None]
    tokens = Tokens(positions, segment_ids, jnp.array(windowed))
    settings = Settings(H**-0.5, softcap, window)
    monkeypatch.setattr(attention_lib, "BLOCK", block)

    def loss(attend: Callable, *arrays: jax.Array) -> jax.Array:
        out = attend(*arrays, tokens, settings)
        return (jnp.where(live, out, 0.0) ** 2).sum()

    found = [
        jax.value_and_grad(functools.partial(loss, attend), argnums=(0, 1, 2))(
            query, key, value
        )
        for attend in (attention, dense)
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    def peak(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        numbers = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(x: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
            tokens = Tokens(positions, segments, jnp.array(False))
            return (attention(x, x, x, tokens, Settings(1.0)) ** 2).sum()

        compiled = jax.jit(jax.grad(loss)).lower(shape, numbers, numbers).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(16_384) < 4.5 * peak(4096)
