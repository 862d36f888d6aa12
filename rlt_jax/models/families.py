"""Names of tensors and config.json keys of each model family, one entry of `FAMILIES`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from rlt_jax.errors import UserError
from rlt_jax.models.layouts import Tensor


class Family(NamedTuple):
    """One model architecture.

    Attributes:
      architecture: class name in config.json.
      tensors: parameter path -> stored tensor; a model may have only some of the paths.
      settings: field of ModelConfig -> key of config.json.
      fixed: fields of ModelConfig that are the same for the whole family.
      defaults: values of keys that a config.json may omit.
      windowed: whether a layer is windowed when config.json has no `layer_types`; None
        if the family has no windowed layers.
      renamed: prefix of a stored name -> its replacement, or None to skip the tensor;
        for multimodal models, whose language model is read.
    """

    architecture: str
    tensors: dict[str, Tensor]
    settings: dict[str, str]
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    windowed: Callable[[Mapping[str, Any], int], bool] | None = None
    renamed: Mapping[str, str | None] = MappingProxyType({})


def _in_layers(tensors: dict[str, tuple[str, str, str]]) -> dict[str, Tensor]:
    return {
        f"layers/{path}": Tensor(f"model.layers.{{}}.{name}", stored, ours)
        for path, (name, stored, ours) in tensors.items()
    }


_TENSORS = {
    "embedding": Tensor("model.embed_tokens.weight", "V,D", "VD"),
    "final_norm/scale": Tensor("model.norm.weight", "D", "D"),
    "output": Tensor("lm_head.weight", "V,D", "DV"),
} | _in_layers(
    {
        "attention_norm/scale": ("input_layernorm.weight", "D", "D"),
        "attention/query/kernel": ("self_attn.q_proj.weight", "NH,D", "DNH"),
        "attention/query/bias": ("self_attn.q_proj.bias", "NH", "NH"),
        "attention/query_norm/scale": ("self_attn.q_norm.weight", "H", "H"),
        "attention/key/kernel": ("self_attn.k_proj.weight", "KH,D", "DKH"),
        "attention/key/bias": ("self_attn.k_proj.bias", "KH", "KH"),
        "attention/key_norm/scale": ("self_attn.k_norm.weight", "H", "H"),
        "attention/value/kernel": ("self_attn.v_proj.weight", "KH,D", "DKH"),
        "attention/value/bias": ("self_attn.v_proj.bias", "KH", "KH"),
        "attention/out/kernel": ("self_attn.o_proj.weight", "D,NH", "NHD"),
        "attention/out/bias": ("self_attn.o_proj.bias", "D", "D"),
        "mlp_norm/scale": ("post_attention_layernorm.weight", "D", "D"),
        "mlp/gate/kernel": ("mlp.gate_proj.weight", "F,D", "DF"),
        "mlp/gate/bias": ("mlp.gate_proj.bias", "F", "F"),
        "mlp/up/kernel": ("mlp.up_proj.weight", "F,D", "DF"),
        "mlp/up/bias": ("mlp.up_proj.bias", "F", "F"),
        "mlp/down/kernel": ("mlp.down_proj.weight", "D,F", "FD"),
        "mlp/down/bias": ("mlp.down_proj.bias", "D", "D"),
    }
)
_POST_NORM_TENSORS = _TENSORS | _in_layers(
    {
        "attention_post_norm/scale": ("post_attention_layernorm.weight", "D", "D"),
        "mlp_norm/scale": ("pre_feedforward_layernorm.weight", "D", "D"),
        "mlp_post_norm/scale": ("post_feedforward_layernorm.weight", "D", "D"),
    }
)

_SETTINGS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "max_length": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
}
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_GEMMA_SETTINGS = {
    **_SETTINGS,
    **_ATTENTION_BIAS,
    "activation": "hidden_activation",
    "query_scale_dim": "query_pre_attn_scalar",
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}

# Defaults of transformers for keys that a config.json omits.
_DEFAULTS = {
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN_DEFAULTS = {
    **_DEFAULTS,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_FIXED = {"norm_plus_one": True, "post_norms": True, "scale_embeddings": True}


def _qwen_windowed(content: Mapping[str, Any], layer: int) -> bool:
    return content["use_sliding_window"] and layer >= content["max_window_layers"]


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        tensors=_TENSORS,
        settings=_SETTINGS | _ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        fixed={},
        defaults=_DEFAULTS | {"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        tensors=_TENSORS,
        settings=_SETTINGS,
        fixed={"qkv_bias": True},
        defaults=_QWEN_DEFAULTS,
        windowed=_qwen_windowed,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        tensors=_TENSORS,
        settings=_SETTINGS | _ATTENTION_BIAS,
        fixed={"qk_norm": True},
        defaults=_QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
        windowed=_qwen_windowed,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        tensors=_POST_NORM_TENSORS,
        settings=_GEMMA_SETTINGS,
        fixed=_GEMMA_FIXED,
        defaults=_GEMMA_DEFAULTS
        | {
            "rope_theta": 10_000.0,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        windowed=lambda content, layer: layer % 2 == 0,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        tensors=_POST_NORM_TENSORS,
        settings=_GEMMA_SETTINGS | {"local_rope_theta": "rope_local_base_freq"},
        fixed=_GEMMA_FIXED | {"qk_norm": True},
        defaults=_GEMMA_DEFAULTS
        | {
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
        },
        windowed=lambda content, layer: (
            (layer + 1) % content["sliding_window_pattern"] != 0
        ),
    ),
}
FAMILIES["gemma3"] = FAMILIES["gemma3_text"]._replace(
    architecture="Gemma3ForConditionalGeneration",
    renamed={
        "language_model.": "",
        "vision_tower.": None,
        "multi_modal_projector.": None,
    },
)


def family(model_type: str | None) -> Family:
    """The family of a `model_type`.

    Raises:
      UserError: the family is not supported.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
