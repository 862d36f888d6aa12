"""Every published size, from its own config.json: shapes and parameter counts."""

import math
from typing import Any

import jax
import pytest

from rlt_jax.models.config_json import config_from_json
from rlt_jax.models.transformer import init_params

KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def qwen2(*sizes: int, tied: bool = False, vocab: int = 152_064) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": 131_072,
        "tie_word_embeddings": tied,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": vocab,
        **dict(zip(KEYS, sizes, strict=True)),
    }


def qwen3(*sizes: int, tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40_960,
        "max_window_layers": sizes[2],
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": 151_936,
        **dict(zip(KEYS, sizes, strict=True)),
    }


def llama3(*sizes: int, factor: float = 8.0, tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500_000.0,
        "tie_word_embeddings": tied,
        "vocab_size": 128_256,
        **dict(zip(KEYS, sizes, strict=True)),
    }


def gemma2(*sizes: int, head_dim: int = 256, scalar: int = 256) -> dict[str, Any]:
    return {
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": scalar,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
        "vocab_size": 256_000,
        **dict(zip(KEYS, sizes, strict=True)),
    }


def gemma3_text(*sizes: int) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32_768,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10_000,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262_144,
        **dict(zip(KEYS, sizes, strict=True)),
    }


def gemma3(*sizes: int, **more: int) -> dict[str, Any]:
    """Its text_config leaves out whatever has the default value."""
    text = {
        "model_type": "gemma3_text",
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        **dict(zip(KEYS, sizes, strict=False)),
        **more,
    }
    return {"model_type": "gemma3", "text_config": text, "vision_config": {}}


# Counts as published; of the last three the published total (4,300,079,472 for 4b) less
# what does not read text: vision tower 416,866,032 and projector 1152 * (D + 1).
SIZES = {
    "Qwen2.5-0.5B": (
        qwen2(896, 4864, 24, 14, 2, tied=True, vocab=151_936),
        494_032_768,
    ),
    "Qwen2.5-1.5B": (
        qwen2(1536, 8960, 28, 12, 2, tied=True, vocab=151_936),
        1_543_714_304,
    ),
    "Qwen2.5-3B": (
        qwen2(2048, 11008, 36, 16, 2, tied=True, vocab=151_936),
        3_085_938_688,
    ),
    "Qwen2.5-7B": (qwen2(3584, 18944, 28, 28, 4), 7_615_616_512),
    "Qwen2.5-14B": (qwen2(5120, 13824, 48, 40, 8), 14_770_033_664),
    "Qwen2.5-32B": (qwen2(5120, 27648, 64, 40, 8), 32_763_876_352),
    "Qwen2.5-72B": (qwen2(8192, 29568, 80, 64, 8), 72_706_203_648),
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, 8, tied=True), 596_049_920),
    "Qwen3-1.7B": (qwen3(2048, 6144, 28, 16, 8, tied=True), 1_720_574_976),
    "Qwen3-4B": (qwen3(2560, 9728, 36, 32, 8, tied=True), 4_022_468_096),
    "Qwen3-8B": (qwen3(4096, 12288, 36, 32, 8), 8_190_735_360),
    "Qwen3-14B": (qwen3(5120, 17408, 40, 40, 8), 14_768_307_200),
    "Qwen3-32B": (qwen3(5120, 25600, 64, 64, 8), 32_762_123_264),
    "Llama-3.1-8B": (llama3(4096, 14336, 32, 32, 8), 8_030_261_248),
    "Llama-3.1-70B": (llama3(8192, 28672, 80, 64, 8), 70_553_706_496),
    "Llama-3.2-1B": (
        llama3(2048, 8192, 16, 32, 8, factor=32.0, tied=True),
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        llama3(3072, 8192, 28, 24, 8, factor=32.0, tied=True),
        3_212_749_824,
    ),
    "gemma-2-2b": (gemma2(2304, 9216, 26, 8, 4), 2_614_341_888),
    "gemma-2-9b": (gemma2(3584, 14336, 42, 16, 8), 9_241_705_984),
    "gemma-2-27b": (
        gemma2(4608, 36864, 46, 32, 16, head_dim=128, scalar=144),
        27_227_128_320,
    ),
    "gemma-3-270m": (gemma3_text(640, 2048, 18, 4, 1), 268_098_176),
    "gemma-3-1b": (gemma3_text(1152, 6912, 26, 4, 1), 999_885_952),
    "gemma-3-4b": (gemma3(2560, 10240, 34), 3_880_263_168),
    "gemma-3-12b": (gemma3(3840, 15360, 48, 16, 8), 11_766_034_176),
    "gemma-3-27b": (
        gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
        27_009_346_304,
    ),
}


@pytest.mark.parametrize(("content", "count"), SIZES.values(), ids=SIZES)
def test_parameter_counts(content: dict[str, Any], count: int) -> None:
    config = config_from_json(content)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(("content", "count"), SIZES.values(), ids=SIZES)
def test_transformers_counts_the_same(content: dict[str, Any], count: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    transformers = pytest.importorskip("transformers", reason="the oracle's models")
    settings = dict(content.get("text_config", content))
    config = transformers.AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_gemma3_layers_alternate_five_to_one() -> None:
    config = config_from_json(SIZES["gemma-3-4b"][0])
    assert config.windowed_layers == (((True,) * 5 + (False,)) * 6)[:34]
    assert (config.sliding_window, config.local_rope_theta) == (1024, 10_000.0)
    assert config.rope_scaling is not None
    assert config.rope_scaling.kind == "linear"


def test_gemma2_layers_alternate() -> None:
    config = config_from_json(SIZES["gemma-2-27b"][0])
    assert config.windowed_layers == (True, False) * 23
    assert (config.query_scale_dim, config.attention_softcap) == (144, 50.0)


def test_windows_that_are_off_are_not_used() -> None:
    config = config_from_json(SIZES["Qwen2.5-7B"][0])
    assert config.sliding_window is None
    assert config.windowed_layers == ()
