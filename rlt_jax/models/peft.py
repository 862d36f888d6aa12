"""Low-rank adapters in the layout of PEFT, on top of models in Hugging Face format.

A folder has adapter_config.json and adapter_model.safetensors with, for a projection W
[out, in], `lora_A` [r, in] and `lora_B` [out, r]: W + scale * B A.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from rlt_jax.errors import UserError
from rlt_jax.models.families import Family
from rlt_jax.models.weight_files import (
    StoredTensor,
    bare_name,
    open_safetensors,
    read_json,
    write_json,
)
from rlt_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")
# Settings that change what is computed, with the values that do not.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    # Others (PiSSA, OLoRA, CorDA) change W when the adapter is made.
    "init_lora_weights": (True, False, None, "gaussian"),
}


class AdaptedTensor(NamedTuple):
    """A stored tensor with its adapter, read slice by slice like `StoredTensor`.

    Attributes:
      base: the tensor W.
      a: [r, in] float32.
      b: [out, r] float32, times the scale.
    """

    base: StoredTensor
    a: np.ndarray
    b: np.ndarray

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        W = self.base[index].astype(np.float32)
        return W + self.b[rows] @ self.a[:, columns]


def adapter_base(folder: Path) -> str:
    """Path or Hub id of the model that an adapter belongs to.

    Raises:
      UserError: adapter_config.json does not name it.
    """
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(
            f"adapter {folder}: {CONFIG} has base_model_name_or_path={base!r}; write the "
            "folder or Hub id of the model that the adapter was trained on."
        )
    return base


def adapt(
    folder: Path, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor | AdaptedTensor]:
    """Puts the adapters of a folder on stored tensors, by their bare names.

    Raises:
      UserError: a file is missing or damaged, or the adapter does anything that is not
        W + scale * B A of the model's projections.
    """
    config = read_json(folder / CONFIG)
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise UserError(
                f"adapter {folder}: {key}={config[key]!r} is not supported; merge the "
                "adapter into its model with PEFT."
            )
    tensors: dict[str, StoredTensor | AdaptedTensor] = dict(stored)
    for module, pair in _read_pairs(folder).items():
        name = bare_name(f"{module}.weight")
        if set(pair) != {"A", "B"} or name not in stored:
            raise UserError(
                f"adapter {folder}: {WEIGHTS} has only lora_{'/'.join(pair)} for {module}, "
                "or the model has no such layer."
            )
        a, b = (pair[key].astype(np.float32) for key in "AB")
        if a.shape[:1] != b.shape[1:] or [len(b), *a.shape[1:]] != stored[name].shape:
            raise UserError(
                f"adapter {folder}: {module} has lora_A {list(a.shape)} and lora_B "
                f"{list(b.shape)}, the model's tensor {stored[name].shape}."
            )
        alphas = (config.get("alpha_pattern") or {}).items()
        # The first key that matches the end of the module's name, as in PEFT.
        matching = (x for key, x in alphas if re.match(rf"(.*\.)?({key})$", module))
        alpha = next(matching, config["lora_alpha"])
        rank = len(a) ** 0.5 if config.get("use_rslora") else len(a)
        tensors[name] = AdaptedTensor(stored[name], a, b * np.float32(alpha / rank))
    return tensors


def _read_pairs(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Module -> its tensors "A" and "B"."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    with open_safetensors(folder, WEIGHTS) as opened:
        for name in list(opened.keys()):
            match = _NAME.fullmatch(name)
            if match is None:
                raise UserError(
                    f"adapter {folder}: the tensor {name!r} in {WEIGHTS} is not an adapter "
                    "of a projection."
                )
            pairs.setdefault(match[1], {})[match[2]] = opened.get_tensor(name)
    return pairs


def write_adapter(
    folder: Path, adapters: Params, kind: Family, base: str, alpha: float
) -> None:
    """Writes adapters of `training/lora.py` as a PEFT folder.

    Args:
      folder: folder to create.
      adapters: A [L, in, rank] and B [L, rank, out] of each adapted projection.
      kind: family of the model.
      base: path or Hub id of the model that they were trained on.
      alpha: the product of the adapters is multiplied by alpha / rank.
    """
    tensors = dict(_stored(adapters, kind))
    rank = next(len(x) for name, x in tensors.items() if ".lora_A." in name)
    content = {key: values[0] for key, values in _PLAIN.items()} | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, content)


def _stored(adapters: Params, kind: Family) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the tensors, contiguous float32."""
    for path, values in flatten_dict(adapters).items():
        kernel, _, letter = path[-1].rpartition("_lora_")
        names = kind.tensors["/".join((*path[:-1], kernel))].names(len(values))
        for name, value in zip(names, np.asarray(values, np.float32), strict=True):
            lora = f".lora_{letter.upper()}.weight"
            stored = f"base_model.model.{name.removesuffix('.weight')}{lora}"
            yield stored, np.ascontiguousarray(value.T)
