"""The files of a model directory: which tensors are there, and in which file."""

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
    """A tensor in a file, read slice by slice.

    Attributes:
      file: safetensors file.
      name: of the tensor in it.
      shape: in the file.
      dtype: as safetensors writes it, such as "BF16".
    """

    file: Path
    name: str
    shape: list[int]
    dtype: str

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        # Opened for each read: pages of a mapped file count as memory until it is closed.
        with safe_open(self.file, "numpy") as opened:
            return opened.get_slice(self.name)[index]


def find_tensors(path: Path, kind: Family) -> dict[str, StoredTensor]:
    """The tensors of all weights files, by the names that the family gives them.

    Raises:
      UserError: a file is missing or cut short.
    """
    if (path / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (path / INDEX).is_file():
        files = sorted(set(read_json(path / INDEX)["weight_map"].values()))
    else:
        raise UserError(f"model {path}: neither {WEIGHTS} nor {INDEX} is there.")
    stored = {}
    for file in files:
        with _open(path, file) as opened:
            names = opened.keys()
            for name in names:
                ours = _family_name(name, kind)
                if ours is not None:
                    part = opened.get_slice(name)
                    stored[ours] = StoredTensor(
                        path / file, name, part.get_shape(), part.get_dtype()
                    )
    return stored


def check_tensors(
    path: Path,
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, list[int]],
    spare: Collection[str],
) -> None:
    """Makes sure that a model is what it says it is.

    Args:
      path: of the model, for messages.
      stored: from `find_tensors`.
      expected: name -> shape that the config asks for.
      spare: names that may be there without being needed.

    Raises:
      UserError: tensors missing, too many, of another shape, or not floating point.
    """
    missing = sorted(set(expected) - set(stored))
    extra = sorted(set(stored) - set(expected) - set(spare))
    for problem, names in (("lacks", missing), ("has unexpected", extra)):
        if names:
            raise UserError(
                f"model {path}: for its config.json it {problem} {len(names)} tensors: "
                f"{', '.join(names[:3])}{', ...' if names[3:] else ''}."
            )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"model {path}: {name} has shape {stored[name].shape}, but its "
                f"config.json asks for {shape}."
            )
        if stored[name].dtype not in FLOATS:
            raise UserError(
                f"model {path}: {name} is {stored[name].dtype}; only weights in "
                f"{', '.join(FLOATS)} can be read."
            )


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file; UserError where it is missing or broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}.") from error


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file for people to read."""
    text = json.dumps(content, indent=2, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")


def _open(path: Path, file: str) -> safe_open:
    try:
        return safe_open(path / file, "numpy")
    except FileNotFoundError as error:
        raise UserError(
            f"model {path}: {file} is missing, though {INDEX} names it."
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"model {path}: {file} is damaged or cut short ({error}); fetch it again."
        ) from error


def _family_name(name: str, kind: Family) -> str | None:
    """What the family calls a stored tensor; None for one that is not its own."""
    for start, ours in kind.renamed.items():
        if name.startswith(start):
            return None if ours is None else ours + name.removeprefix(start)
    # Old files hold the constants of RoPE as well.
    return None if name.endswith("rotary_emb.inv_freq") else name
