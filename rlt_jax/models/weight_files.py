"""The weight files of a model directory in Hugging Face format."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from rlt_jax.errors import UserError
from rlt_jax.models.families import Family

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
# What libraries put around a language model, in front of the names of its tensors.
_WRAPPERS = re.compile(r"(?:(?:_orig_mod|module|model|language_model)\.)*")
_FREQUENCIES = "rotary_emb.inv_freq"
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
      UserError: a file is missing or truncated, or has two tensors of one bare name.
    """
    if (path / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (path / INDEX).is_file():
        files = sorted(set(read_json(path / INDEX)["weight_map"].values()))
    else:
        raise UserError(f"model {path}: it has neither {WEIGHTS} nor {INDEX}.")
    stored = {}
    for file in files:
        with open_safetensors(path, file) as opened:
            for name in list(opened.keys()):
                bare = bare_name(name)
                # Old files also have the RoPE frequencies.
                if bare.startswith(kind.skipped) or bare.endswith(_FREQUENCIES):
                    continue
                if bare in stored:
                    raise UserError(
                        f"model {path}: {stored[bare].name} and {name} in the weight "
                        "files are the same tensor of the model; remove one of them."
                    )
                tensor = opened.get_slice(name)
                stored[bare] = StoredTensor(
                    path / file, name, tensor.get_shape(), tensor.get_dtype()
                )
    return stored


def bare_name(name: str) -> str:
    """The name of a tensor without what it is wrapped in: "layers.0.mlp.up_proj.weight"."""
    return name[_WRAPPERS.match(name).end() :]


def has_own_head(path: Path, kind: Family) -> bool:
    """Whether the weight files have a head that differs from the embedding."""
    if not (path / WEIGHTS).is_file() and not (path / INDEX).is_file():
        return False
    stored = find_tensors(path, kind)
    names = (bare_name(kind.tensors[key].name) for key in ("output", "embedding"))
    head, embedding = (stored.get(name) for name in names)
    if head is None or embedding is None or head.shape != embedding.shape:
        return False
    size = head.shape[0]
    parts = (slice(n, min(n + _ROWS, size)) for n in range(0, size, _ROWS))
    return not all(np.array_equal(head[part,], embedding[part,]) for part in parts)


def check_tensors(
    path: Path,
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, list[int]],
    optional: Collection[str],
) -> None:
    """Checks that the weight files have the tensors that the config requires.

    Args:
      path: path of the model, for messages.
      stored: tensors in the files, from `find_tensors`.
      expected: name -> shape of the required tensors.
      optional: names of tensors that are allowed but not required.

    Raises:
      UserError: tensors are missing, unexpected, of another shape, or not floating point.
    """
    missing = sorted(set(expected) - set(stored))
    extra = sorted(set(stored) - set(expected) - set(optional))
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


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file; raises UserError if it is missing or invalid."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}.") from error


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes an indented JSON file."""
    text = json.dumps(content, indent=2, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")


def open_safetensors(path: Path, file: str) -> safe_open:
    """Opens a file; raises UserError if it is missing or damaged."""
    try:
        return safe_open(path / file, "numpy")
    except (FileNotFoundError, SafetensorError) as error:
        what = f"damaged or truncated ({error})"
        if isinstance(error, FileNotFoundError):
            what = "missing"
        raise UserError(
            f"model {path}: {file} is {what}; download it again."
        ) from error
