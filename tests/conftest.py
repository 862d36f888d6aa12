"""What several tests share: a model small enough to compile in no time."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

# The numbers are compared in float32, which accelerators round on the way.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little, also those that run commands.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Devices of one machine otherwise enter collectives in any order, and where cores are few
# all threads can wait in different ones, for ever.
ONE_BY_ONE = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# XLA's emitters of fusions take a large part of the time that tests compile. Later versions
# have no flag for that, and XLA ends the process at one that it does not know.
HAS_FLAG = version("jaxlib").startswith("0.10.")
COMPILED_SOONER = "--xla_cpu_use_fusion_emitters=false" if HAS_FLAG else ""
GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{ONE_BY_ONE} {COMPILED_SOONER} {GIVEN}"

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from rlt_jax.data.templates import Template, load_template
from rlt_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import (
    Transformer,
    hidden_states,
    init_params,
    logits,
)
from rlt_jax.training.sharding import MeshConfig, make_mesh
from rlt_jax.types import Params

SHARED = Path(__file__).parents[2] / "shared"


@contextlib.contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Processes started in it heed Ctrl-C and SIGHUP.

    Those in the background of a shell ignore the first, those of nohup the second.
    """
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    lost = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, ctrl_c)
    signal.signal(signal.SIGHUP, lost)


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder next to the repository with data that is too large for it."""
    if not SHARED.is_dir():
        pytest.skip(f"there is no {SHARED.name}/ next to the repository")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("embedded")


@pytest.fixture(scope="session")
def tiny() -> Template:
    return load_template("tiny")


@pytest.fixture(scope="session")
def rlt() -> Template:
    return load_template("rlt")


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    return make_mesh(MeshConfig())


def small_model(vocab_size: int) -> Transformer:
    return Transformer(
        ModelConfig(
            vocab_size=vocab_size,
            embed_dim=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            mlp_dim=24,
            max_length=512,
        )
    )


def random_params(model: Transformer, seed: int) -> Params:
    """Large enough that no two tokens are about as likely."""
    shapes = jax.eval_shape(lambda: init_params(model.config, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jax.numpy.asarray(0.5 * rng.standard_normal(x.shape), x.dtype), shapes
    )


@pytest.fixture(scope="session")
def model() -> Transformer:
    return small_model(40)


@pytest.fixture(scope="session")
def params(model: Transformer) -> Params:
    return random_params(model, seed=1)


@pytest.fixture(scope="session")
def text_model(tokenizer: Tokenizer) -> Transformer:
    """A model that knows the tokens of the embedded tokenizer."""
    return small_model(tokenizer.vocab_size)


@pytest.fixture(scope="session")
def teacher_params(text_model: Transformer) -> Params:
    return random_params(text_model, seed=2)


@pytest.fixture(scope="session")
def student_params(text_model: Transformer) -> Params:
    return random_params(text_model, seed=3)


@pytest.fixture(scope="session")
def full_logits() -> Callable[[Transformer, Params, np.ndarray], np.ndarray]:
    """All logits [B, T, V] of unpacked rows in float64, the slow and obvious way."""

    @jax.jit(static_argnums=0)
    def forward(model: Transformer, params: Params, tokens: jax.Array) -> jax.Array:
        positions = jax.numpy.broadcast_to(
            jax.numpy.arange(tokens.shape[1]), tokens.shape
        )
        ones = jax.numpy.ones_like(tokens)
        hidden, _ = hidden_states(model, params, tokens, positions, ones)
        return logits(model, params, hidden)

    return lambda *args: np.asarray(forward(*args), np.float64)


@pytest.fixture(scope="session")
def naive_log_probs(
    full_logits: Callable[[Transformer, Params, np.ndarray], np.ndarray],
) -> Callable[..., np.ndarray]:
    """Log-probs [B, T] of unpacked rows by a log-softmax of all logits."""

    def log_probs(
        model: Transformer, params: Params, tokens: np.ndarray, temperature: float = 1
    ) -> np.ndarray:
        scaled = full_logits(model, params, tokens) / temperature
        scaled -= scaled.max(-1, keepdims=True)
        normalised = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
        chosen = np.take_along_axis(normalised[:, :-1], tokens[:, 1:, None], -1)[..., 0]
        return np.pad(chosen, ((0, 0), (1, 0)))

    return log_probs
