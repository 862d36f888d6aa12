"""What each model family calls its tensors and its settings.

A family is one entry of `FAMILIES`.
"""

import dataclasses
from typing import Any, NamedTuple

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.layouts import Tensor


class Family(NamedTuple):
    """One architecture.

    Attributes:
      architecture: class name that config.json states.
      tensors: parameter path -> stored tensor; paths a config lacks are not looked for.
      settings: field of ModelConfig -> key of config.json.
      fixed: fields that the architecture itself decides.
      defaults: values of keys that a config.json may leave out.
    """

    architecture: str
    tensors: dict[str, Tensor]
    settings: dict[str, str]
    fixed: dict[str, Any]
    defaults: dict[str, Any]


_LAYER = "model.layers.{}."
_TENSORS = {
    "embedding": Tensor("model.embed_tokens.weight", "V,D", "VD"),
    "final_norm/scale": Tensor("model.norm.weight", "D", "D"),
    "output": Tensor("lm_head.weight", "V,D", "DV"),
} | {
    f"layers/{path}": Tensor(_LAYER + name, stored, ours)
    for path, (name, stored, ours) in {
        "attention_norm/scale": ("input_layernorm.weight", "D", "D"),
        "attention/query/kernel": ("self_attn.q_proj.weight", "NH,D", "DNH"),
        "attention/key/kernel": ("self_attn.k_proj.weight", "KH,D", "DKH"),
        "attention/value/kernel": ("self_attn.v_proj.weight", "KH,D", "DKH"),
        "attention/out/kernel": ("self_attn.o_proj.weight", "D,NH", "NHD"),
        "attention/query/bias": ("self_attn.q_proj.bias", "NH", "NH"),
        "attention/key/bias": ("self_attn.k_proj.bias", "KH", "KH"),
        "attention/value/bias": ("self_attn.v_proj.bias", "KH", "KH"),
        "attention/query_norm/scale": ("self_attn.q_norm.weight", "H", "H"),
        "attention/key_norm/scale": ("self_attn.k_norm.weight", "H", "H"),
        "mlp_norm/scale": ("post_attention_layernorm.weight", "D", "D"),
        "mlp/gate/kernel": ("mlp.gate_proj.weight", "F,D", "DF"),
        "mlp/up/kernel": ("mlp.up_proj.weight", "F,D", "DF"),
        "mlp/down/kernel": ("mlp.down_proj.weight", "D,F", "FD"),
    }.items()
}
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
}
_DEFAULTS = {
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

FAMILIES = {
    "qwen2": Family(
        "Qwen2ForCausalLM", _TENSORS, _SETTINGS, {"qkv_bias": True}, _DEFAULTS
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", _TENSORS, _SETTINGS, {"qk_norm": True}, _DEFAULTS
    ),
    "llama": Family("LlamaForCausalLM", _TENSORS, _SETTINGS, {}, _DEFAULTS),
}


def family(model_type: str | None) -> Family:
    """The family of a `model_type`; UserError names the known ones."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]


def config_from_json(content: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that the content of a config.json describes.

    Raises:
      UserError: unknown family, a missing key, or a setting we do not implement.
    """
    kind = family(content.get("model_type"))
    content = kind.defaults | {k: v for k, v in content.items() if v is not None}
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    content.setdefault("num_key_value_heads", content.get("num_attention_heads"))
    missing = set(kind.settings.values()) - set(content) - {"head_dim"}
    if missing:
        raise UserError(f"config.json lacks {', '.join(sorted(missing))}.")
    content.setdefault(
        "head_dim", content["hidden_size"] // content["num_attention_heads"]
    )
    content["rope_theta"] = float(rope.get("rope_theta", content["rope_theta"]))
    _refuse_unsupported(content, rope)
    read = {field: content[key] for field, key in kind.settings.items()}
    return ModelConfig(**read, **kind.fixed)


def config_to_json(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The content of a config.json for `config` as a model of that family.

    Raises:
      UserError: unknown family, or one that cannot express the config.
    """
    kind = family(model_type)
    content = {
        "architectures": [kind.architecture],
        "model_type": model_type,
    } | kind.defaults
    content |= {key: getattr(config, field) for field, key in kind.settings.items()}
    back = dataclasses.asdict(config_from_json(content))
    differing = [
        f"{field}={value!r}"
        for field, value in dataclasses.asdict(config).items()
        if field not in ("dtype", "remat") and back[field] != value
    ]
    if differing:
        raise UserError(f"A {model_type} model cannot have {', '.join(differing)}.")
    return content


def _refuse_unsupported(content: dict[str, Any], rope: dict[str, Any]) -> None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for key, value, supported in (
        ("rope_type", rope_type, "default"),
        ("hidden_act", content["hidden_act"], "silu"),
        ("use_sliding_window", content.get("use_sliding_window", False), False),
        ("attention_bias", content.get("attention_bias", False), False),
        ("mlp_bias", content.get("mlp_bias", False), False),
        ("quantization_config", content.get("quantization_config"), None),
    ):
        if value != supported:
            raise UserError(
                f"config.json: {key}={value!r} is not supported, only {supported!r}."
            )
