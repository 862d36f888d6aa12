"""The weight files of a model directory in Hugging Face format."""

import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from rlt_jax.errors import UserError, as_user_error
from rlt_jax.files import read_json
from rlt_jax.models.families import Family

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
# What libraries put in names of tensors: around the model, and around any module.
_MODULE = r"_(?:orig_mod|(?:forward|fsdp_wrapped|checkpoint_wrapped)_module)\."
_WRAPPERS = re.compile(rf"^(?:{_MODULE}|(?:module|model|language_model)\.)+|{_MODULE}")
_ROTARY = ".rotary_emb."  # buffers of old files, such as the RoPE frequencies
_FILE = re.compile(r"[^/\\\0]{1,240}\.safetensors")
_ROWS = 4096  # read at once to compare two tensors


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, read slice by slice.

    Attributes:
      file: path of the file.
      name: name of the tensor in the file.
      shape: shape of the tensor in the file.
      dtype: dtype by its safetensors name, such as "BF16".
    """

    file: Path
    name: str
    shape: list[int]
    dtype: str

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        # Opened for each read: the pages of a mapped file use memory until it is closed.
        with safe_open(self.file, "numpy") as opened:
            return opened.get_slice(self.name)[index]


def find_tensors(path: Path, kind: Family) -> dict[str, StoredTensor]:
    """The tensors of all weight files, by their bare names.

    Raises:
      UserError: a file is missing or damaged, lacks a tensor that the index says it has,
        or has two tensors of one bare name.
    """
    listed = _weight_map(path)
    if not listed:
        raise UserError(f"model {path}: it has neither {WEIGHTS} nor files of {INDEX}.")
    files = sorted(set(listed.values()))
    tensors = [tensor for file in files for tensor in open_tensors(path / file)]
    found = {(tensor.name, tensor.file.name) for tensor in tensors}
    if lacking := sorted({x for x in listed.items() if x[0]} - found):
        name, file = bare_name(lacking[0][0]), path / lacking[0][1]
        raise UserError(
            f"{path / INDEX} lists {len(lacking)} missing tensors: {name} is not in {file}."
        )
    stored: dict[str, StoredTensor] = {}
    for tensor in tensors:
        bare = bare_name(tensor.name)
        if bare.startswith(kind.skipped) or _ROTARY in f".{bare}":
            continue
        if bare in stored:
            raise UserError(
                f"model {path}: {stored[bare].name} and {tensor.name} (in "
                f"{tensor.file.name}) are the same tensor of the model; remove one of them."
            )
        stored[bare] = tensor
    return stored


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> its file by the index, or "" -> the only file; {} without weights."""
    if (path / WEIGHTS).is_file():
        return {"": WEIGHTS}
    index = read_json(path / INDEX, {})
    listed = index.get("weight_map", {})
    files = listed.values() if isinstance(listed, dict) else [None]
    if strange := [x for x in files if type(x) is not str or not _FILE.fullmatch(x)]:
        what = f"weight_map has {short(strange[0])}, not a .safetensors file beside it"
        raise UserError(f"{path / INDEX}: {what}; download it again.")
    return listed


def bare_name(name: str) -> str:
    """The name of a tensor without what it is wrapped in: "layers.0.mlp.up_proj.weight"."""
    return _WRAPPERS.sub("", name)


def has_own_head(path: Path, kind: Family) -> bool:
    """Whether the weight files have a head that differs from the embedding.

    False if there are no weights, as where only the shape of a model is needed.
    """
    if not any((path / file).is_file() for file in _weight_map(path).values()):
        return False
    stored = find_tensors(path, kind)
    names = (bare_name(kind.tensors[key].name) for key in ("output", "embedding"))
    head, embedding = (stored.get(name) for name in names)
    if head is None or embedding is None:
        return False
    kinds = {head.dtype, embedding.dtype}
    if head.shape != embedding.shape or not head.shape or not kinds.issubset(FLOATS):
        return True
    size = head.shape[0]
    parts = (slice(n, min(n + _ROWS, size)) for n in range(0, size, _ROWS))
    return not all(np.array_equal(head[part,], embedding[part,]) for part in parts)


def check_tensors(
    path: Path, stored: Mapping[str, StoredTensor], expected: Mapping[str, list[int]]
) -> None:
    """Checks that the weight files have the tensors that the config requires.

    Args:
      path: path of the model, for messages.
      stored: tensors in the files, from `find_tensors`.
      expected: name -> shape of the required tensors.

    Raises:
      UserError: tensors are missing, unexpected, of another shape, or not floating point.
    """
    missing = sorted(set(expected) - set(stored))
    extra = sorted(set(stored) - set(expected))
    for problem, names in (("missing", missing), ("unexpected", extra)):
        if names:
            raise UserError(
                f"model {path}: the weight files do not match config.json; {len(names)} "
                f"{problem} tensors: {', '.join(names[:3])}{', ...' if names[3:] else ''}."
            )
    for name, shape in expected.items():
        what = None
        if stored[name].shape != shape:
            what = f"shape {stored[name].shape}, but config.json requires {shape}"
        elif stored[name].dtype not in FLOATS:
            what = f"dtype {stored[name].dtype}; supported are {', '.join(FLOATS)}"
        if what:
            raise UserError(f"model {path}: {name} has {what}.")


def open_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a file; raises UserError if it is missing or damaged."""
    if not file.is_file():
        raise UserError(f"{file} is missing; download it again.")
    what = f"{file} is damaged; download it again"
    damage = as_user_error(what, SafetensorError, OSError)
    with damage, safe_open(file, "numpy") as opened:
        slices = [(n, opened.get_slice(n)) for n in list(opened.keys())]
    return [StoredTensor(file, n, x.get_shape(), x.get_dtype()) for n, x in slices]
