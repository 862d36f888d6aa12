"""Low-rank adapters in the layout of PEFT, on top of models in Hugging Face format.

A folder has adapter_config.json and adapter_model.safetensors with, for a projection W
[out, in], `lora_A` [r, in] and `lora_B` [out, r]: W + scale * B A.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save

from rlt_jax.errors import UserError
from rlt_jax.files import read_json, write_json, write_whole
from rlt_jax.models.families import Family
from rlt_jax.models.weight_files import FLOATS, StoredTensor, bare_name, open_tensors
from rlt_jax.records import Record
from rlt_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_REPEATS = re.compile(r"[*+?{(]")  # each multiplies the time that a match may take
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")
# Settings that change what is computed, with the values that do not; what else does comes
# with tensors of its own.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "revision": ("main", None),
    # Others, such as PiSSA, take the initial adapters out of W.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
    **dict.fromkeys(("use_dora", "fan_in_fan_out"), (False, None)),
    **dict.fromkeys(("modules_to_save", "layer_replication"), ([], None)),
    "alora_invocation_tokens": (None,),
}


class AdaptedTensor(NamedTuple):
    """A stored tensor with its adapter, read slice by slice like `StoredTensor`.

    Attributes:
      base: the tensor W.
      a: [r, in].
      b: [out, r].
      scale: factor of the product.
    """

    base: StoredTensor
    a: StoredTensor
    b: StoredTensor
    scale: float

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        parts = self.base[index], self.b[rows, :], self.a[:, columns]
        W, B, A = (part.astype(np.float32) for part in parts)
        return W + np.float32(self.scale) * (B @ A)


Readable = StoredTensor | AdaptedTensor


def adapter_base(folder: Path) -> str:
    """Path or Hub id of the model that an adapter belongs to.

    Raises:
      UserError: adapter_config.json does not name it.
    """
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(
            f"adapter {folder}: {CONFIG} has base_model_name_or_path={short(base)}; write the "
            "folder or Hub id of the model that the adapter was trained on."
        )
    return base


def adapt(folder: Path, stored: Mapping[str, StoredTensor]) -> dict[str, Readable]:
    """Puts the adapters of a folder on stored tensors, by their bare names.

    Raises:
      UserError: a file is missing or damaged, or the adapter does anything that is not
        W + scale * B A of the model's projections.
    """
    config = read_json(folder / CONFIG)
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise UserError(
                f"adapter {folder}: {key}={short(config.get(key))} is not supported; merge the "
                "adapter into its model with PEFT."
            )
    ranks = _patterns(folder, config, "rank_pattern")
    alphas = _patterns(folder, config, "alpha_pattern")
    unadapted, adapted = dict(stored), {}
    for module, pair in _read_pairs(folder).items():
        base = unadapted.pop(name := bare_name(f"{module}.weight"), None)
        shapes = [pair[key].shape if key in pair else None for key in "AB"]
        what = f"adapter {folder}: {module}"
        if base is None:
            raise UserError(f"{what} is no layer, or has two adapters.")
        rank = _of_module(module, ranks, config.get("r"))  # names of layers are short
        alpha = _of_module(module, alphas, config.get("lora_alpha"))
        fits = shapes == [[rank, *base.shape[1:]], [*base.shape[:1], rank]]
        fits = fits and len(base.shape) == 2 and type(rank) is int and rank > 0
        if not (fits and type(alpha) in (int, float) and abs(alpha) < 1e9):
            raise UserError(
                f"{what} has lora_A {shapes[0]} and lora_B {shapes[1]}, not for r={rank!r}, "
                f"lora_alpha={alpha!r} and the model's {base.shape}."
            )
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        adapted[name] = AdaptedTensor(base, pair["A"], pair["B"], scale)
    return unadapted | adapted


def _patterns(folder: Path, config: Record, key: str) -> dict[re.Pattern[str], Any]:
    """Patterns for modules by the ends of their names, and their settings."""
    given = config.get(key) or {}
    if isinstance(given, dict) and all(len(_REPEATS.findall(x)) < 4 for x in given):
        with contextlib.suppress(re.error, OverflowError, RecursionError):
            return {re.compile(rf"(.*\.)?({end})$"): x for end, x in given.items()}
    give = "ends of module names, with at most three repetitions and groups"
    raise UserError(f"{folder / CONFIG}: {key}={short(given)}; give {give}.")


def _of_module(module: str, patterns: Mapping[re.Pattern[str], Any], other: Any) -> Any:
    """The setting by the first pattern for the module, as in PEFT."""
    return next((x for end, x in patterns.items() if end.match(module)), other)


def _read_pairs(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Module -> its tensors "A" and "B"."""
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for tensor in open_tensors(folder / WEIGHTS):
        match = _NAME.fullmatch(bare_name(tensor.name))
        pair = pairs.setdefault(match[1], {}) if match else {}
        if match is None or match[2] in pair or tensor.dtype not in FLOATS:
            raise UserError(
                f"adapter {folder}: the tensor {tensor.name!r} ({tensor.dtype}) in "
                f"{WEIGHTS} is not an adapter of a projection, or not the only one."
            )
        pair[match[2]] = tensor
    if not pairs:
        raise UserError(f"adapter {folder}: {WEIGHTS} has no tensors.")
    return pairs


def write_adapter(
    folder: Path, adapters: Params, kind: Family, base: str, alpha: float
) -> None:
    """Writes adapters of `training/lora.py` as a PEFT folder, in float32.

    Args:
      folder: folder to create.
      adapters: A [L, in, rank] and B [L, rank, out] of each adapted projection.
      kind: family of the model.
      base: path or Hub id of the model that they were trained on.
      alpha: the product of the adapters is multiplied by alpha / rank.
    """
    tensors = dict(_stored(adapters, kind))
    content = {  # keys that every version of PEFT reads
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": next(len(x) for name, x in tensors.items() if ".lora_A." in name),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    write_json(folder / CONFIG, content)
    # `save_file` would set mode 600.
    write_whole(folder / WEIGHTS, save(tensors, {"format": "pt"}))


def _stored(adapters: Params, kind: Family) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the tensors, contiguous float32."""
    for path, values in flatten_dict(adapters).items():
        kernel, _, letter = path[-1].rpartition("_lora_")
        names = kind.tensors["/".join((*path[:-1], kernel))].names(len(values))
        for name, value in zip(names, np.asarray(values, np.float32), strict=True):
            lora = f".lora_{letter.upper()}.weight"
            stored = f"base_model.model.{name.removesuffix('.weight')}{lora}"
            yield stored, np.ascontiguousarray(value.T)
