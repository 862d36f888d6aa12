"""Model directories in Hugging Face layout, in and out.

A directory holds config.json and model.safetensors, or shards of it listed in
model.safetensors.index.json. What tensors are called is written in `families.py`.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlt_jax.errors import UserError
from rlt_jax.models import families
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.families import Family
from rlt_jax.models.layouts import (
    Index,
    axis_sizes,
    read_part,
    stored_shape,
    to_stored,
)
from rlt_jax.models.transformer import init_params
from rlt_jax.types import Params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def read_config(path: str | Path, **overrides: Any) -> ModelConfig:
    """The shape of the model in a directory, from its own config.json.

    Args:
      path: model directory.
      **overrides: fields of ModelConfig to replace: dtype, remat, max_length.

    Raises:
      UserError: no config.json, an unknown architecture or an unsupported setting.
    """
    config = families.config_from_json(_read_json(Path(path) / "config.json"))
    return dataclasses.replace(config, **overrides)


def read_params(
    path: str | Path,
    config: ModelConfig,
    shardings: Any = None,
    dtype: Any = jnp.float32,
) -> Params:
    """Reads the weights of a model directory straight into device arrays.

    Each process reads only the slices its own devices hold, and stacked parameters
    layer by layer: the host never holds more than its part of one stored tensor.

    Args:
      path: model directory.
      config: shape of the model, from `read_config`.
      shardings: tree like the parameters of Shardings; by default the first device.
      dtype: of the parameters, whatever the files hold.

    Returns:
      Parameters as `init_params` makes them, in `dtype`.

    Raises:
      UserError: files missing, cut short, or not holding exactly this model.
    """
    path = Path(path)
    content = _read_json(path / "config.json")
    family = families.family(content.get("model_type"))
    shapes = _shapes(config)
    if shardings is None:
        shardings = dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = traverse_util.flatten_dict(shardings, sep="/")
    sizes = axis_sizes(config)
    placed = {}
    with _open_tensors(path) as stored:
        _check_tensors(path, stored, family, shapes, sizes)
        for name, shape in shapes.items():
            tensor = family.tensors[name]
            reads = [
                partial(read_part, stored[stored_name], tensor, sizes, dtype)
                for stored_name in tensor.names(config.num_layers)
            ]
            place = _place_layers if tensor.stacked else _place
            placed[name] = place(shape, shardings[name], dtype, reads)
    return traverse_util.unflatten_dict(placed, sep="/")


def write_model(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    model_type: str,
    tokenizer_dir: str | Path | None = None,
    stop_ids: Sequence[int] = (),
    dtype: Any = jnp.float32,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model directory that transformers and the tools around it can load.

    Every process has to call it; process 0 writes. The directory appears under its name
    when it is complete.

    Args:
      path: directory to make; may exist if it is empty.
      config: shape of the model.
      params: its parameters, on any devices of any processes.
      model_type: family to write it as, one of `families.FAMILIES`.
      tokenizer_dir: where to copy tokenizer and generation_config.json from.
      stop_ids: ids that end a completion; by default what tokenizer_dir says.
      dtype: of the written weights, float32 or bfloat16.
      max_shard_bytes: a larger model is split into files of at most that size.

    Raises:
      UserError: the family cannot express the config, or `path` holds something.
    """
    path = Path(path)
    family = families.family(model_type)
    content = families.config_to_json(config, model_type)
    content["torch_dtype"] = str(jnp.dtype(dtype))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists; remove it or name another directory.")
    unfinished = path.with_name(path.name + ".partial")
    writes = jax.process_index() == 0
    if writes:
        if unfinished.exists():  # of an export that was interrupted
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        generation = _copy_tokenizer(tokenizer_dir, unfinished)
        if stop_ids:
            generation["eos_token_id"] = sorted(int(token) for token in stop_ids)
        content["eos_token_id"] = generation.get("eos_token_id")
        _write_json(unfinished / "generation_config.json", generation)
        _write_json(unfinished / "config.json", content)
    plan = _plan_files(config, family, jnp.dtype(dtype), max_shard_bytes)
    _write_tensors(unfinished, plan, params, family, axis_sizes(config), dtype)
    if writes:
        unfinished.replace(path)
    multihost_utils.sync_global_devices(f"write_model {path}")


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Parameter path -> shape, without making any parameter."""
    tree = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    leaves = traverse_util.flatten_dict(tree, sep="/")
    return {name: leaf.shape for name, leaf in leaves.items()}


def _place(
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: Any,
    reads: list[Callable[[Index], np.ndarray]],
) -> jax.Array:
    (read,) = reads
    parts: dict[str, np.ndarray] = {}

    def read_once(index: Index) -> np.ndarray:
        # Devices that hold the same part ask for it one after the other.
        if str(index) not in parts:
            parts[str(index)] = read(index)
        return parts[str(index)]

    array = jax.make_array_from_callback(shape, sharding, read_once, dtype)
    return jax.block_until_ready(array)  # before the host's copy of the next one


def _place_layers(
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: Any,
    reads: list[Callable[[Index], np.ndarray]],
) -> jax.Array:
    """Fills a stacked array on the devices, so the host holds one layer at a time."""
    layer_sharding = sharding
    if isinstance(sharding, NamedSharding):
        layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    put = jax.jit(
        lambda stack, layer, i: stack.at[i].set(layer),
        donate_argnums=0,
        out_shardings=sharding,
    )
    stack = zeros()
    for i, read in enumerate(reads):
        stack = put(stack, _place(shape[1:], layer_sharding, dtype, [read]), i)
    return stack


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator[dict[str, Any]]:
    """Opens every weights file; yields stored name -> safetensors slice."""
    if (path / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (path / INDEX).is_file():
        files = sorted(set(_read_json(path / INDEX)["weight_map"].values()))
    else:
        raise UserError(f"model {path}: neither {WEIGHTS} nor {INDEX} is there.")
    with contextlib.ExitStack() as stack:
        stored = {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(path / file, "numpy"))
            except FileNotFoundError as error:
                raise UserError(
                    f"model {path}: {file} is missing, though {INDEX} names it."
                ) from error
            except SafetensorError as error:
                raise UserError(
                    f"model {path}: {file} is damaged or cut short ({error}); fetch it "
                    "again."
                ) from error
            names = opened.keys()
            stored |= {name: opened.get_slice(name) for name in names}
        yield stored


def _check_tensors(
    path: Path,
    stored: dict[str, Any],
    family: Family,
    shapes: dict[str, tuple[int, ...]],
    sizes: dict[str, int],
) -> None:
    expected = {
        name: stored_shape(family.tensors[leaf], sizes)
        for leaf, shape in shapes.items()
        for name in family.tensors[leaf].names(shape[0])
    }
    # A tied head may be stored a second time under its own name.
    ignored = {family.tensors["output"].name}
    missing = sorted(set(expected) - set(stored))
    extra = sorted(set(stored) - set(expected) - ignored)
    for problem, names in (("lacks", missing), ("has unexpected", extra)):
        if names:
            raise UserError(
                f"model {path}: {problem} {len(names)} tensors for this config.json: "
                f"{', '.join(names[:3])}{', ...' if names[3:] else ''}."
            )
    for name, shape in expected.items():
        if stored[name].get_shape() != shape:
            raise UserError(
                f"model {path}: {name} has shape {stored[name].get_shape()}, but "
                f"config.json asks for {shape}."
            )
        if stored[name].get_dtype() not in FLOATS:
            raise UserError(
                f"model {path}: {name} is {stored[name].get_dtype()}; only weights in "
                f"{', '.join(FLOATS)} can be read."
            )


class _Part(NamedTuple):
    """A stored tensor to write: its name, whence it comes, and how large it is."""

    name: str
    leaf: str
    layer: int | None
    num_bytes: int


def _plan_files(
    config: ModelConfig, family: Family, dtype: np.dtype, max_bytes: int
) -> dict[str, list[_Part]]:
    """Which tensors go into which file, layer after layer."""
    sizes = axis_sizes(config)
    parts = []
    for leaf in _shapes(config):
        tensor = family.tensors[leaf]
        num_bytes = math.prod(stored_shape(tensor, sizes)) * dtype.itemsize
        for layer, name in enumerate(tensor.names(config.num_layers)):
            parts.append(
                _Part(name, leaf, layer if tensor.stacked else None, num_bytes)
            )
    parts.sort(key=lambda part: -1 if part.layer is None else part.layer)
    groups: list[list[_Part]] = [[]]
    room = max_bytes
    for part in parts:
        if part.num_bytes > room and groups[-1]:
            groups.append([])
            room = max_bytes
        groups[-1].append(part)
        room -= part.num_bytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


def _write_tensors(
    path: Path,
    plan: dict[str, list[_Part]],
    params: Params,
    family: Family,
    sizes: dict[str, int],
    dtype: Any,
) -> None:
    leaves = traverse_util.flatten_dict(params, sep="/")
    writes = jax.process_index() == 0
    for file, parts in plan.items():
        tensors = {}
        for part in parts:
            leaf = leaves[part.leaf]
            value = _to_host(leaf if part.layer is None else leaf[part.layer])
            if writes:
                tensor = family.tensors[part.leaf]
                tensors[part.name] = to_stored(value, tensor, sizes, dtype)
        if writes:
            save_file(tensors, path / file, metadata={"format": "pt"})
            shutil.copymode(path / "config.json", path / file)  # not the writer's only
    if writes and len(plan) > 1:
        total = sum(part.num_bytes for parts in plan.values() for part in parts)
        weight_map = {part.name: f for f, parts in plan.items() for part in parts}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(path / INDEX, index)


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _copy_tokenizer(source: str | Path | None, target: Path) -> dict[str, Any]:
    """Copies tokenizer files; returns the source's generation_config.json or {}."""
    if source is None:
        return {}
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)
    generation = Path(source) / "generation_config.json"
    return _read_json(generation) if generation.is_file() else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}.") from error


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True)
    file.write_text(text + "\n", encoding="utf-8")
