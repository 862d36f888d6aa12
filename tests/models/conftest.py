"""Logits of whole rows and of rows decoded with a cache; absent accelerators."""

import functools
import importlib.util
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from rlt_jax.models.config import ModelConfig
from rlt_jax.models.paged_cache import empty_pages
from rlt_jax.models.transformer import Transformer, hidden_states, logits
from rlt_jax.training.sharding import MESH_AXES
from rlt_jax.types import PagedCache, Params

PAGE = 4


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """Logits [B, T, V] of packed rows."""
    model = Transformer(config)
    hidden, _ = hidden_states(model, params, tokens, positions, segment_ids)
    return logits(model, params, hidden)


def _full_logits(
    config: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    positions: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Logits [B, T, V] of one forward pass; by default each row is one segment."""
    if segment_ids is None:
        segment_ids = np.ones_like(tokens)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(_forward(config, params, tokens, positions, segment_ids))


@functools.partial(jax.jit, static_argnums=0)
def _cached_forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    cache: PagedCache,
) -> tuple[jax.Array, PagedCache]:
    """Logits [B, T, V] of the next tokens of each row, and the filled cache."""
    model = Transformer(config)
    hidden, cache = hidden_states(model, params, tokens, positions, None, cache)
    return logits(model, params, hidden), cache


def _cached_logits(
    config: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    prompt_lengths: np.ndarray,
) -> np.ndarray:
    """Logits [B, T, V]: prompts in two chunks, then a token of each row a time."""
    B, T = tokens.shape
    P = int(prompt_lengths.max())
    row = np.arange(B)
    prompt = np.where(np.arange(P) < prompt_lengths[:, None], tokens[:, :P], 0)
    positions = np.broadcast_to(np.arange(P), (B, P))
    columns = -(-T // PAGE)
    cache = empty_pages(config, 1 + B * columns, PAGE)
    # No row's pages are neighbours.
    table = 1 + np.arange(B * columns).reshape(columns, B).T
    cache = cache._replace(table=jnp.asarray(table))
    out = np.zeros((B, T, config.vocab_size), np.float32)
    for start, end in ((0, min(P, PAGE)), (PAGE, P)):  # a whole page, then the rest
        if start < end:
            chunk = prompt[:, start:end], positions[:, start:end]
            out[:, start:end], cache = _cached_forward(config, params, *chunk, cache)
    for i in range(T - int(prompt_lengths.min())):
        # A row that is done writes its last token again.
        at = np.minimum(prompt_lengths + i, T - 1)
        step = tokens[row, at][:, None], at[:, None]
        new, cache = _cached_forward(config, params, *step, cache)
        out[row, at] = new[:, 0]
    return out


@pytest.fixture(scope="session")
def forward() -> Callable[..., jax.Array]:
    """Config, params, tokens, positions, segment_ids -> logits, differentiable."""
    return _forward


@pytest.fixture(scope="session")
def full_logits() -> Callable[..., np.ndarray]:
    """Config, params, tokens, optionally positions and segment_ids -> logits."""
    return _full_logits


@pytest.fixture(scope="session")
def cached_logits() -> Callable[..., np.ndarray]:
    """Config, params, tokens, prompt_lengths -> logits."""
    return _cached_logits


@pytest.fixture(scope="session")
def tpus() -> Mesh:
    """Four devices of a TPU to compile for: fsdp 2, tensor 2."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the compiler for TPU, is not installed")
    # No device is touched, so other processes need not wait for this one.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    shape = np.array(devices).reshape(1, 2, 2)
    return Mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture
def gpu() -> AbstractMesh:
    """One GPU to lower for; JAX 0.11 asks which."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    auto = (AxisType.Auto,) * 3
    return AbstractMesh((1, 1, 1), MESH_AXES, axis_types=auto, abstract_device=device)
