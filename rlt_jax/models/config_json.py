"""Conversion between ModelConfig and the content of a Hugging Face config.json.

Reads both formats of RoPE settings: `rope_theta` with `rope_scaling`, and the newer
`rope_parameters`. Writes the older one, which every tool reads.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig, RopeScaling
from rlt_jax.models.families import Family, family

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
LAYER_TYPES = {True: "sliding_attention", False: "full_attention"}

# Field of RopeScaling -> key of config.json, for each kind.
_LENGTH = {"original_length": "original_max_position_embeddings"}
SCALING_KEYS = {
    kind: {field: _LENGTH.get(field, field) for field in fields}
    for kind, fields in {
        "linear": ("factor",),
        "llama3": ("factor", *_LENGTH, "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", *_LENGTH, "beta_fast", "beta_slow", "attention_factor"),
    }.items()
}


def config_from_json(content: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that the content of a config.json describes.

    Raises:
      UserError: an unknown family, a missing key, or an unsupported setting.
    """
    kind = family(content.get("model_type"))
    # Multimodal models have the settings of the language model in `text_config`.
    content = kind.defaults | dict(content) | content.get("text_config", {})
    for key in ("quantization_config", "use_bidirectional_attention"):
        if content.get(key):
            raise UserError(f"config.json: {key}={content[key]!r} is not supported.")
    scaling, thetas = _read_rope(content)
    content |= thetas
    _derive_heads(content)
    may_be_none = {f.name for f in dataclasses.fields(ModelConfig) if f.default is None}
    for field, key in kind.settings.items():
        if content.get(key) is None and field not in may_be_none:
            raise UserError(f"config.json lacks {key!r}.")
    fields = {field: content[key] for field, key in kind.settings.items()}
    fields["activation"] = _our_name(ACTIVATIONS, "activation", fields["activation"])
    windows = _read_windows(content, kind)
    return ModelConfig(**fields, **kind.fixed, **windows, rope_scaling=scaling)


def config_to_json(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The content of a config.json for `config` as a model of that family.

    Raises:
      UserError: an unknown family, or one that cannot express the config.
    """
    kind = family(model_type)
    if kind.renamed:
        raise UserError(f"model_type {model_type!r} can be read but not exported.")
    content = {"architectures": [kind.architecture], "model_type": model_type}
    content |= {key: getattr(config, field) for field, key in kind.settings.items()}
    content[kind.settings["activation"]] = ACTIVATIONS[config.activation]
    content["rope_scaling"] = _write_scaling(config.rope_scaling)
    if kind.windowed is not None:
        content |= _write_windows(config, kind)
    back = config_from_json(content)
    differing = [
        f"{field.name}={getattr(back, field.name)!r}, not {getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in ("dtype", "remat")
        and getattr(back, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise UserError(
            f"model_type {model_type!r} does not fit: it has {'; '.join(differing)}."
        )
    return content


def _derive_heads(content: dict[str, Any]) -> None:
    """Fills in `num_key_value_heads` and `head_dim`, which old files may lack."""
    heads = content.get("num_attention_heads")
    if content.get("num_key_value_heads") is None:
        content["num_key_value_heads"] = heads
    if content.get("head_dim") is None and heads and content.get("hidden_size"):
        content["head_dim"] = content["hidden_size"] // heads


def _our_name(names: Mapping[Any, str], what: str, theirs: str) -> Any:
    ours = {value: key for key, value in names.items()}
    if theirs not in ours:
        raise UserError(
            f"config.json: {what} {theirs!r} is not supported, only {', '.join(ours)}."
        )
    return ours[theirs]


def _read_rope(
    content: Mapping[str, Any],
) -> tuple[RopeScaling | None, dict[str, float]]:
    """The scaling, and the thetas in `rope_parameters` under their old keys."""
    parameters = content.get("rope_parameters") or {}
    full = parameters.get("full_attention", parameters)
    local = parameters.get("sliding_attention", {})
    if _read_scaling(local, content) is not None:
        raise UserError("config.json: scaled RoPE in windowed layers is not supported.")
    scaling = {**(content.get("rope_scaling") or {}), **full}
    thetas = {}
    if "rope_theta" in scaling:
        thetas["rope_theta"] = scaling["rope_theta"]
    if "rope_theta" in local:
        thetas["rope_local_base_freq"] = local["rope_theta"]
    return _read_scaling(scaling, content), thetas


def _read_scaling(
    scaling: Mapping[str, Any], content: Mapping[str, Any]
) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    given = {key: value for key, value in scaling.items() if value is not None}
    for key in ("rope_type", "type", "rope_theta"):
        given.pop(key, None)
    if kind != "default" and kind not in SCALING_KEYS:
        raise UserError(
            f"config.json: rope_type {kind!r} is not supported, only default, "
            f"{', '.join(SCALING_KEYS)}."
        )
    keys = SCALING_KEYS.get(kind, {})
    unknown = sorted(set(given) - set(keys.values()))
    if unknown:
        raise UserError(f"config.json: {kind} RoPE with {unknown[0]!r} is unsupported.")
    if kind == "default":
        return None
    if "factor" not in given:
        raise UserError(f"config.json: {kind} RoPE needs 'factor'.")
    if "original_length" in keys:
        length = content.get("max_position_embeddings")
        given.setdefault("original_max_position_embeddings", length)
    fields = {field: given[key] for field, key in keys.items() if key in given}
    return RopeScaling(kind, **fields)


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    keys = SCALING_KEYS[scaling.kind].items()
    values = {key: getattr(scaling, field) for field, key in keys}
    values = {key: value for key, value in values.items() if value is not None}
    return {"rope_type": scaling.kind, **values}


def _read_windows(content: Mapping[str, Any], kind: Family) -> dict[str, Any]:
    if kind.windowed is None:
        return {}
    layers = range(content["num_hidden_layers"])
    types = content.get("layer_types")
    if types is None:
        windowed = tuple(kind.windowed(content, layer) for layer in layers)
    else:
        windowed = tuple(_our_name(LAYER_TYPES, "layer type", name) for name in types)
    if not any(windowed) or not content.get("use_sliding_window", True):
        return {}
    return {"sliding_window": content["sliding_window"], "windowed_layers": windowed}


def _write_windows(config: ModelConfig, kind: Family) -> dict[str, Any]:
    windowed = config.windowed_layers or (False,) * config.num_layers
    content = {
        "sliding_window": config.sliding_window,
        "layer_types": [LAYER_TYPES[w] for w in windowed],
    }
    if "use_sliding_window" in kind.defaults:
        content["use_sliding_window"] = any(windowed)
        content["max_window_layers"] = windowed.count(False)
    return content
