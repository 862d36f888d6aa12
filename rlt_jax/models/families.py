"""Names of tensors and config.json keys of each model family, one entry of `FAMILIES`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlt_jax.errors import UserError
from rlt_jax.models.layouts import Tensor


class Family(NamedTuple):
    """One model architecture.

    Attributes:
      architecture: class name in an exported config.json.
      tensors: parameter path -> stored tensor; a model may have only some of the paths.
      settings: field of ModelConfig -> key of config.json.
      fixed: fields of ModelConfig that are the same for the whole family.
      defaults: values of keys that a config.json may omit.
      windowed: from config.json and the index of a layer, whether the layer is windowed
        where there are no `layer_types`; None if the family has no windowed layers.
      skipped: beginnings of bare names of tensors that are not read; of multimodal models
        only the language model is.
    """

    architecture: str
    tensors: dict[str, Tensor]
    settings: dict[str, str]
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    windowed: Callable[[Mapping[str, Any], int], bool] | None = None
    skipped: tuple[str, ...] = ()


# Projection -> its name in a layer, and the layouts of its outputs and inputs.
_PROJECTIONS = {
    "attention/query": ("self_attn.q_proj", "NH", "D"),
    "attention/key": ("self_attn.k_proj", "KH", "D"),
    "attention/value": ("self_attn.v_proj", "KH", "D"),
    "attention/out": ("self_attn.o_proj", "D", "NH"),
    "mlp/gate": ("mlp.gate_proj", "F", "D"),
    "mlp/up": ("mlp.up_proj", "F", "D"),
    "mlp/down": ("mlp.down_proj", "D", "F"),
}
# Norm -> its name in a layer, and the layout of its scale.
_NORMS = {
    "attention_norm": ("input_layernorm", "D"),
    "attention/query_norm": ("self_attn.q_norm", "H"),
    "attention/key_norm": ("self_attn.k_norm", "H"),
    "mlp_norm": ("post_attention_layernorm", "D"),
}
_POST_NORMS = _NORMS | {
    "attention_post_norm": ("post_attention_layernorm", "D"),
    "mlp_norm": ("pre_feedforward_layernorm", "D"),
    "mlp_post_norm": ("post_feedforward_layernorm", "D"),
}


def _tensors(norms: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
    """Parameter path -> stored tensor, for a family with the given norms."""
    tensors = {
        "embedding": Tensor("model.embed_tokens.weight", "V,D", "VD"),
        "final_norm/scale": Tensor("model.norm.weight", "D", "D"),
        "output": Tensor("lm_head.weight", "V,D", "DV"),
    }
    layer = "model.layers.{}."
    for path, (name, out, into) in _PROJECTIONS.items():
        kernel = Tensor(f"{layer}{name}.weight", f"{out},{into}", into + out)
        tensors[f"layers/{path}/kernel"] = kernel
        tensors[f"layers/{path}/bias"] = Tensor(f"{layer}{name}.bias", out, out)
    for path, (name, axis) in norms.items():
        tensors[f"layers/{path}/scale"] = Tensor(f"{layer}{name}.weight", axis, axis)
    return tensors


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
# Defaults of transformers for keys that a config.json omits.
_DEFAULTS = {
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

_LLAMA = Family(
    architecture="LlamaForCausalLM",
    tensors=_tensors(_NORMS),
    settings=_SETTINGS | _ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
    fixed={},
    defaults=_DEFAULTS,
)
_QWEN2 = _LLAMA._replace(
    architecture="Qwen2ForCausalLM",
    settings=_SETTINGS,
    fixed={"qkv_bias": True},
    defaults=_DEFAULTS | _WINDOW,
    windowed=lambda c, i: c["use_sliding_window"] and i >= c["max_window_layers"],
)
_QWEN3 = _QWEN2._replace(
    architecture="Qwen3ForCausalLM",
    settings=_SETTINGS | _ATTENTION_BIAS,
    fixed={"qk_norm": True},
    defaults=_QWEN2.defaults | {"head_dim": 128},
)
_GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    tensors=_tensors(_POST_NORMS),
    settings={
        **_SETTINGS,
        **_ATTENTION_BIAS,
        "activation": "hidden_activation",
        "query_scale_dim": "query_pre_attn_scalar",
        "attention_softcap": "attn_logit_softcapping",
        "final_softcap": "final_logit_softcapping",
    },
    fixed={"norm_plus_one": True, "post_norms": True, "scale_embeddings": True},
    defaults={
        **_DEFAULTS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    windowed=lambda c, i: i % 2 == 0,
)
_GEMMA3 = _GEMMA2._replace(
    architecture="Gemma3ForCausalLM",
    settings=_GEMMA2.settings | {"local_rope_theta": "rope_local_base_freq"},
    fixed=_GEMMA2.fixed | {"qk_norm": True},
    defaults={
        **_GEMMA2.defaults,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
    },
    windowed=lambda c, i: (i + 1) % c["sliding_window_pattern"] > 0,
)
FAMILIES = {
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3._replace(skipped=("vision_tower.", "multi_modal_projector.")),
}


def family(model_type: str | None) -> Family:
    """The family of a `model_type`.

    Raises:
      UserError: the family is not supported.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        unknown = f"model_type {str(model_type)[:99]!r} is not supported"
        raise UserError(f"{unknown}; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]
