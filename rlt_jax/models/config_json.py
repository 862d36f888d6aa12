"""Conversion between ModelConfig and the content of a Hugging Face config.json.

Reads both formats of RoPE settings: `rope_theta` with `rope_scaling`, and the newer
`rope_parameters`. Writes the older one, which every tool reads.
"""

import dataclasses
from reprlib import repr as short
from typing import Annotated, Any

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig, RopeScaling, Theta
from rlt_jax.models.families import Family, family
from rlt_jax.ranges import NonNegativeInt, OneOf, PositiveInt, check_value, hints_of
from rlt_jax.settings import Section, build

# Names in config.json -> names in ModelConfig.
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_TYPES = {"sliding_attention": True, "full_attention": False}

_LENGTH = "original_max_position_embeddings"  # RopeScaling.original_length
# Kind of RoPE scaling -> its keys in config.json, which are named as in RopeScaling.
SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", _LENGTH, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", _LENGTH, "beta_fast", "beta_slow", "attention_factor"),
}

# Types of keys of config.json, besides those of the fields that the family names.
_TYPES = dict.fromkeys(("text_config", "rope_parameters", "rope_scaling"), dict)
_TYPES |= dict.fromkeys(("full_attention", "sliding_attention"), dict)
_TYPES |= dict.fromkeys(("sliding_window", "sliding_window_pattern"), PositiveInt)
_TYPES |= {"max_window_layers": NonNegativeInt, "use_sliding_window": bool}
_TYPES |= {"layer_types": list[Annotated[str, OneOf(LAYER_TYPES)]]}
_SCALING_TYPES = hints_of(RopeScaling) | {_LENGTH: PositiveInt, "rope_theta": Theta}


def config_from_json(content: Section) -> ModelConfig:
    """The ModelConfig that the content of a config.json describes.

    Raises:
      UserError: an unknown family, a missing key, an unsupported setting, or a value that
        the setting cannot have.
    """
    kind = family(content.get("model_type"))
    hints = hints_of(ModelConfig) | {"activation": Annotated[str, OneOf(ACTIVATIONS)]}
    types = _TYPES | {key: hints[field] for field, key in kind.settings.items()}
    # Multimodal models have the settings of the language model in `text_config`.
    text = content.get("text_config")
    content = kind.defaults | dict(content) | (text if isinstance(text, dict) else {})
    _check_values(_given(content), types)
    for key in ("quantization_config", "use_bidirectional_attention"):
        if content.get(key):
            raise UserError(f"{key}={short(content[key])} is not supported.")
    scaling, thetas = _read_rope(content)
    # Old files may lack the number of key/value heads and the head dim.
    heads, width = content.get("num_attention_heads"), content.get("hidden_size")
    head_dim = width // heads or None if heads and width else None
    older = {"num_key_value_heads": heads, "head_dim": head_dim}
    content = older | _given(content) | thetas
    fields = {field: content.get(key) for field, key in kind.settings.items()}
    for field in dataclasses.fields(ModelConfig):
        if fields.get(field.name, "") is None and field.default is not None:
            raise UserError(f"it lacks {kind.settings[field.name]!r}.")
    fields["activation"] = ACTIVATIONS[fields["activation"]]
    fields |= kind.fixed | _read_windows(content, kind) | {"rope_scaling": scaling}
    return build(ModelConfig, fields, "the model's config.json")


def config_to_json(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The content of a config.json for `config` as a model of that family.

    Raises:
      UserError: an unknown family, or one that cannot express the config.
    """
    kind = family(model_type)
    if kind.skipped:
        raise UserError(f"model_type {model_type!r} can be read but not exported.")
    content = {"architectures": [kind.architecture], "model_type": model_type}
    content |= {key: getattr(config, field) for field, key in kind.settings.items()}
    names = {ours: name for name, ours in ACTIVATIONS.items()}
    content[kind.settings["activation"]] = names[config.activation]
    content["rope_scaling"] = _write_scaling(config.rope_scaling)
    if kind.windowed is not None:
        content |= _write_windows(config, kind)
    back = vars(config_from_json(content))
    differing = [
        f"{name}={back[name]!r}, not {value!r}"
        for name, value in vars(config).items()
        if name not in ("dtype", "remat") and back[name] != value
    ]
    if differing:
        raise UserError(
            f"model_type {model_type!r} does not fit: {'; '.join(differing)}."
        )
    return content


def _given(settings: Section) -> dict[str, Any]:
    """The settings that are not null."""
    return {key: value for key, value in settings.items() if value is not None}


def _check_values(values: Section, types: Section) -> None:
    """Raises UserError for a value that does not fit the type of its name, if it has one."""
    for name in values.keys() & types.keys():
        check_value(name, types[name], values[name])


def _read_rope(content: Section) -> tuple[RopeScaling | None, dict]:
    """The scaling, and the thetas in `rope_parameters` under their old keys."""
    parameters = _given(content.get("rope_parameters") or {})
    _check_values(parameters, _TYPES)
    full = parameters.get("full_attention", parameters)
    full = {**(content.get("rope_scaling") or {}), **full}
    local = parameters.get("sliding_attention", {})
    if _read_scaling(local, content) is not None:
        raise UserError("scaled RoPE in windowed layers is not supported.")
    sources = {"rope_theta": full, "rope_local_base_freq": local}
    thetas = {key: source.get("rope_theta") for key, source in sources.items()}
    return _read_scaling(full, content), _given(thetas)


def _read_scaling(scaling: Section, content: Section) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    check_value("rope_type", Annotated[str, OneOf(SCALING_KEYS)], kind)
    keys = SCALING_KEYS[kind]
    others = ("rope_type", "type", "rope_theta")
    given = {k: v for k, v in _given(scaling).items() if k not in others}
    if unknown := sorted(set(given) - set(keys)):
        raise UserError(f"{kind} RoPE with {unknown[0]!r} is unsupported.")
    _check_values(_given(scaling), _SCALING_TYPES)
    if kind == "default":
        return None
    length = given.pop(_LENGTH, content.get("max_position_embeddings"))
    length = length if _LENGTH in keys else None
    fields = {"kind": kind, "original_length": length, **given}
    return build(RopeScaling, fields, "rope_scaling")


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = vars(scaling) | {_LENGTH: scaling.original_length}
    given = _given({key: values[key] for key in SCALING_KEYS[scaling.kind]})
    return {"rope_type": scaling.kind, **given}


def _read_windows(content: Section, kind: Family) -> dict[str, Any]:
    if kind.windowed is None:
        return {}
    types = content.get("layer_types")
    if types is None:
        layers, given = range(content["num_hidden_layers"]), kind.defaults | content
        windowed = tuple(kind.windowed(given, layer) for layer in layers)
    else:
        windowed = tuple(LAYER_TYPES[name] for name in types)
    if not any(windowed) or not content.get("use_sliding_window", True):
        return {}
    window = content.get("sliding_window")
    return {"sliding_window": window, "windowed_layers": windowed}


def _write_windows(config: ModelConfig, kind: Family) -> dict[str, Any]:
    windowed = config.windowed_layers or (False,) * config.num_layers
    types = ["sliding_attention" if w else "full_attention" for w in windowed]
    content = {"sliding_window": config.sliding_window, "layer_types": types}
    if "use_sliding_window" in kind.defaults:
        content["use_sliding_window"] = any(windowed)
        content["max_window_layers"] = windowed.count(False)
    return content
