"""The weight files of a model directory in Hugging Face format."""

import json
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
    """The tensors of all weight files, by their names in the family.

    Raises:
      UserError: a file is missing or truncated.
    """
    if (path / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (path / INDEX).is_file():
        files = sorted(set(read_json(path / INDEX)["weight_map"].values()))
    else:
        raise UserError(f"model {path}: it has neither {WEIGHTS} nor {INDEX}.")
    stored = {}
    for file in files:
        with _open(path, file) as opened:
            for name in list(opened.keys()):
                tensor = opened.get_slice(name)
                stored[_family_name(name, kind)] = StoredTensor(
                    path / file, name, tensor.get_shape(), tensor.get_dtype()
                )
    stored.pop(None, None)  # tensors that are not read
    return stored


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


def _open(path: Path, file: str) -> safe_open:
    try:
        return safe_open(path / file, "numpy")
    except (FileNotFoundError, SafetensorError) as error:
        what = f"damaged or truncated ({error})"
        if isinstance(error, FileNotFoundError):
            what = "missing"
        raise UserError(
            f"model {path}: {file} is {what}; download it again."
        ) from error


def _family_name(name: str, kind: Family) -> str | None:
    """The name of a stored tensor in the family; None if the tensor is not read."""
    for prefix, replacement in kind.renamed.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return None if replacement is None else replacement + rest
    # Old files also have the RoPE frequencies.
    return None if name.endswith("rotary_emb.inv_freq") else name
