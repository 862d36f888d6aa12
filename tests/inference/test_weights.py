"""Decoding with rounded weights against decoding with the weights of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from rlt_jax.errors import UserError
from rlt_jax.inference.engine import Engine, make_engine
from rlt_jax.inference.layout import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.types import Params, Request, Rollout

# Kernels hold most of the parameters, as they do in real models.
MODEL = Transformer(
    ModelConfig(40, 128, 2, 4, 2, 32, 256, 64, qkv_bias=True, tie_embeddings=False)
)
PROMPTS = [
    np.random.default_rng(n).integers(1, 40, length, np.int32)
    for n, length in enumerate((3, 20, 7, 1, 12, 5))
]
MAX_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def wide_params() -> Params:
    # Logits of the size that a trained model's have.
    params = jax.jit(lambda: init_params(MODEL.config, jax.random.key(0)))()
    return params | {"output": 3 * params["output"]}


def engine_with(weights: str, mesh: Mesh) -> Engine:
    sampling = SamplingConfig(MAX_NEW_TOKENS, temperature=0.0, stop_ids=(0,))
    config = EngineConfig(slots=4, page_size=8, prefill_chunk=16, weights=weights)
    return make_engine(MODEL, None, sampling, config, mesh, 32)


def decoded(engine: Engine, params: Params) -> Rollout:
    requests = [Request(prompt, n, MAX_NEW_TOKENS) for n, prompt in enumerate(PROMPTS)]
    return engine.generate(params, requests, jax.random.key(0))


def size(params: Params) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(params))


@pytest.mark.parametrize(("weights", "atol"), [("bfloat16", 0.1), ("int8", 0.1)])
def test_rounded_weights_decode_nearly_the_same(
    weights: str, atol: float, wide_params: Params, mesh: Mesh
) -> None:
    exact = decoded(engine_with("model", mesh), wide_params)
    rounded = decoded(engine_with(weights, mesh), wide_params)
    differences, same = [], 0
    for ours, theirs, our_log_probs, their_log_probs in zip(
        rounded.tokens, exact.tokens, rounded.log_probs, exact.log_probs, strict=True
    ):
        shared = min(len(ours), len(theirs))
        unlike = np.append(ours[:shared] != theirs[:shared], True)
        alike = int(unlike.argmax())  # after it the prefixes differ
        same += alike == len(ours) == len(theirs)
        differences.extend(np.abs(our_log_probs[:alike] - their_log_probs[:alike]))
    assert same >= 4  # of 6 completions, token by token
    assert len(differences) > 30
    assert 0 < max(differences) < atol


def test_int8_kernels_have_a_scale_for_each_output(
    wide_params: Params, mesh: Mesh
) -> None:
    engine = engine_with("int8", mesh)
    weights = engine.to_decode(wide_params)
    assert size(weights) < 0.35 * size(wide_params)
    for module, name, shape in (
        ("attention", "query", (2, 1, 4, 32)),
        ("attention", "out", (2, 1, 1, 128)),
        ("mlp", "down", (2, 1, 128)),
    ):
        kernel = weights["layers"][module][name]["kernel"].array
        exact = wide_params["layers"][module][name]["kernel"]
        assert kernel.qvalue.dtype == jnp.int8 and kernel.scale.shape == shape
        # Half a step of the rounding, and the largest of a channel is 127 steps.
        gap = np.abs(kernel.qvalue * kernel.scale - exact)
        assert (gap <= 0.5001 * kernel.scale).all()
        axes = tuple(n for n, length in enumerate(shape) if length == 1)
        largest = np.abs(exact).max(axes, keepdims=True)
        np.testing.assert_allclose(127.5 * kernel.scale, largest, rtol=0.01)
    for name in ("embedding", "output"):
        np.testing.assert_array_equal(weights[name], wide_params[name])


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(UserError, match="'int4': one of model, bfloat16, int8"):
        EngineConfig(weights="int4")
