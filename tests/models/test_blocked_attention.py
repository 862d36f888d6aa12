"""Attention by blocks is attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.models import attention as attention_lib
from rlt_jax.models.attention import attention, packed_visibility

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


@pytest.mark.parametrize("block", [16, 24])  # 24 leaves part of a block over
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

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        out = attention(
            query,
            key,
            value,
            packed_visibility(positions, segment_ids),
            jnp.array(windowed),
            scale=H**-0.5,
            softcap=softcap,
            window=window,
        )
        return (jnp.where(live, out, 0.0) ** 2).sum()

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
    dense = grad(query, key, value)
    monkeypatch.setattr(attention_lib, "LONG", 1)
    monkeypatch.setattr(attention_lib, "BLOCK", block)
    blocked = grad(query, key, value)
    for ours, theirs in zip(
        jax.tree.leaves(blocked), jax.tree.leaves(dense), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    def peak(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(x: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
            visibility = packed_visibility(positions, segments)
            out = attention(x, x, x, visibility, jnp.array(False), scale=1.0)
            return (out**2).sum()

        compiled = jax.jit(jax.grad(loss)).lower(shape, tokens, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(16_384) < 4.5 * peak(4096)
