"""Every family against transformers, with tiny random models."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.convert import read_config, read_params, write_model
from rlt_jax.types import Params

Function = Callable[..., Any]
LENGTH = 24
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "final_logit_softcapping": 4.0,
}
# Name -> settings of a config.json; rows of LENGTH tokens leave every window and every
# original context.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rope_scaling": YARN,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_scaling": YARN | {"attention_factor": 1.5},
    },
    "qwen3-untied": {
        "model_type": "qwen3",
        "head_dim": 8,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "llama": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
    "llama-tied": {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_theta": 100.0,
        "rope_scaling": LLAMA3,
    },
    "gemma2": {**GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 3.0},
    "gemma3_text": {
        **GEMMA,
        "model_type": "gemma3_text",
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
        "attention_bias": True,
    },
}


class Oracle(NamedTuple):
    """A tiny model on disk, and what transformers computes with it.

    Attributes:
      path: model directory that transformers wrote.
      model_type: family of the model.
      tokens: [B, T] int32.
      logits: [B, T, V] float32.
    """

    path: Path
    model_type: str
    tokens: np.ndarray
    logits: np.ndarray


def random_model(settings: dict[str, Any]) -> Any:
    """A model of transformers whose every parameter, norms and biases too, is random.

    The attention is far from uniform, so that an error shows.
    """
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    transformers = pytest.importorskip("transformers", reason="the oracle's models")
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.normal_(0.0, spread, generator=generator)
    return model.eval()


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def load_torch(path: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager"
    )


@pytest.fixture(params=MODELS, scope="module")
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Oracle:
    path = tmp_path_factory.mktemp(request.param)
    settings = SIZES | MODELS[request.param]
    model = random_model(settings)
    model.save_pretrained(path)
    tokens = np.random.default_rng(0).integers(1, 97, (2, LENGTH), np.int32)
    return Oracle(path, settings["model_type"], tokens, torch_logits(model, tokens))


@pytest.fixture(scope="module")
def params(model: Oracle) -> Params:
    return read_params(model.path, read_config(model.path))


def stored(path: Path) -> dict[str, np.ndarray]:
    return {
        k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()
    }


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def test_logits_agree_with_transformers(
    model: Oracle, params: Params, full_logits: Function
) -> None:
    config = read_config(model.path)
    ours = full_logits(config, params, model.tokens)
    np.testing.assert_allclose(ours, model.logits, atol=1e-4, rtol=0)


def test_packed_and_padded_logits_agree(
    model: Oracle, params: Params, full_logits: Function
) -> None:
    config = read_config(model.path)
    (a, b), pad = model.tokens, LENGTH // 2
    tokens = np.concatenate([a[:13], b, np.zeros(pad, np.int32)])[None]
    segment_ids = np.repeat([1, 2, 0], [13, LENGTH, pad])[None]
    positions = np.concatenate([np.arange(n) for n in (13, LENGTH, pad)])[None]
    ours = full_logits(config, params, tokens, positions, segment_ids)[0]
    np.testing.assert_allclose(ours[:13], model.logits[0, :13], atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours[13:-pad], model.logits[1], atol=1e-4, rtol=0)


def test_cached_logits_agree(
    model: Oracle, params: Params, cached_logits: Function
) -> None:
    config = read_config(model.path)
    ours = cached_logits(config, params, model.tokens, np.array([3, 9]))
    np.testing.assert_allclose(ours, model.logits, atol=1e-4, rtol=0)


def without(config: ModelConfig, field: str) -> ModelConfig:
    """The config with one feature left out."""
    change: dict[str, Any] = {field: None}
    if field == "sliding_window":
        change["windowed_layers"] = ()
    if field == "attention_factor":
        change = {
            "rope_scaling": dataclasses.replace(
                config.rope_scaling, attention_factor=1.0
            )
        }
    return dataclasses.replace(config, **change)


def test_every_feature_would_show_if_it_were_ignored(
    model: Oracle, params: Params, full_logits: Function
) -> None:
    config = read_config(model.path)
    optional = [f.name for f in dataclasses.fields(config) if f.default is None]
    features = [name for name in optional if getattr(config, name) is not None]
    if config.rope_scaling is not None and config.rope_scaling.kind == "yarn":
        features.append("attention_factor")
    for feature in features:
        plainer = without(config, feature)
        ours = full_logits(plainer, params, model.tokens)
        assert np.abs(ours - model.logits).max() > 1e-2, feature


def test_an_exported_model_is_the_same_in_transformers(
    model: Oracle, params: Params, tmp_path: Path
) -> None:
    config = read_config(model.path)
    write_model(tmp_path, config, params, model.model_type)
    assert same_bits(stored(tmp_path), stored(model.path))
    assert read_config(tmp_path) == config
    again = torch_logits(load_torch(tmp_path), model.tokens)
    np.testing.assert_array_equal(again, model.logits)


def test_bfloat16_survives_the_round_trip(
    model: Oracle, params: Params, tmp_path: Path
) -> None:
    config = read_config(model.path)
    write_model(tmp_path / "a", config, params, model.model_type, dtype=jnp.bfloat16)
    half = stored(tmp_path / "a")
    exact = {k: v.astype(jnp.bfloat16) for k, v in stored(model.path).items()}
    assert same_bits(half, exact)
    params = read_params(tmp_path / "a", config, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    write_model(tmp_path / "b", config, params, model.model_type, dtype=jnp.bfloat16)
    assert same_bits(stored(tmp_path / "b"), half)
    assert str(load_torch(tmp_path / "b").dtype) == "torch.bfloat16"


def test_a_model_without_its_prefix_is_the_same(
    model: Oracle, params: Params, tmp_path: Path
) -> None:
    """As `AutoModel.save_pretrained` names the tensors."""
    tensors = stored(model.path).items()
    save_file(
        {name.removeprefix("model."): value for name, value in tensors},
        tmp_path / "model.safetensors",
    )
    shutil.copyfile(model.path / "config.json", tmp_path / "config.json")
    read = read_params(tmp_path, read_config(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_the_text_part_of_gemma3_is_read(tmp_path: Path, full_logits: Function) -> None:
    text = SIZES | MODELS["gemma3_text"] | {"final_logit_softcapping": None}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    whole = random_model(
        {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    )
    whole.save_pretrained(tmp_path / "whole")
    config = read_config(tmp_path / "whole")
    params = read_params(tmp_path / "whole", config)
    tokens = np.random.default_rng(0).integers(1, 97, (2, LENGTH), np.int32)
    ours = full_logits(config, params, tokens)
    theirs = torch_logits(whole, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="'gemma3' can be read but not exported"):
        write_model(tmp_path / "text", config, params, "gemma3")
    write_model(tmp_path / "text", config, params, "gemma3_text")
    again = torch_logits(load_torch(tmp_path / "text"), tokens)
    np.testing.assert_allclose(again, theirs, atol=1e-5, rtol=0)
