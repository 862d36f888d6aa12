"""Reads and writes model directories in Hugging Face format.

A directory contains config.json and model.safetensors, or shards that are listed in
model.safetensors.index.json. `families.py` has the names of the tensors.
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from huggingface_hub import split_state_dict_into_shards_factory
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors.numpy import save_file

from rlt_jax.errors import LOG, UserError, as_user_error
from rlt_jax.files import read_json, write_json, write_whole
from rlt_jax.models import peft, weight_files
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.config_json import config_from_json, config_to_json
from rlt_jax.models.families import FAMILIES, Family, family
from rlt_jax.models.layouts import Index, axis_sizes, read_part, stored_shape, to_stored
from rlt_jax.models.transformer import init_params
from rlt_jax.models.weight_files import bare_name
from rlt_jax.types import Params

Place = tuple[str, int | None]  # a parameter, and the layer if it is stacked
ReadFn = Callable[[Index], np.ndarray]  # reads a part of a stored array

CONFIG = "config.json"
GENERATION = "generation_config.json"
MAX_SHARD_BYTES = 5_000_000_000  # larger models are split into files of this size
TOKENIZER_FILES = ("*token*.json", "tokenizer.model", "chat_template.jinja")  # globs
TOKENIZER_FILES += ("vocab.json", "merges.txt")


def read_config(path: str | Path, **overrides: Any) -> ModelConfig:
    """The configuration of the model in a directory, from its config.json.

    Embedding and head count as tied only if the weight files have no other head.

    Args:
      path: model directory.
      **overrides: fields of ModelConfig to replace, such as dtype and remat.

    Raises:
      UserError: no config.json, an unknown family, an unsupported setting, or a damaged
        weight file.
    """
    file = Path(path) / CONFIG
    content = read_json(file)
    with as_user_error(str(file), UserError, end=""):
        config = config_from_json(content)
    kind = family(content.get("model_type"))
    if config.tie_embeddings and weight_files.has_own_head(Path(path), kind):
        LOG.warning("%s has a head that differs: tie_word_embeddings is ignored", path)
        config = dataclasses.replace(config, tie_embeddings=False)
    return dataclasses.replace(config, **overrides)


def model_type_of(config: ModelConfig) -> str:
    """The first family in `families.FAMILIES` that can express the config.

    Raises:
      UserError: no family can.
    """
    for model_type in FAMILIES:
        with contextlib.suppress(UserError):
            config_to_json(config, model_type)
            return model_type
    raise UserError(f"model: none of the families {', '.join(FAMILIES)} fits it.")


def read_params(
    path: str | Path,
    config: ModelConfig,
    shardings: Any = None,
    dtype: Any = jnp.float32,
    adapter: Path | None = None,
) -> Params:
    """Reads the weights of a model directory into device arrays.

    Each process reads only the slices of its own devices, and stacked parameters layer by
    layer, so the host never holds more than its slice of one stored tensor.

    Args:
      path: model directory.
      config: configuration of the model, from `read_config`.
      shardings: tree of Shardings like the parameters; by default the first device.
      dtype: dtype of the parameters, which may differ from that of the files.
      adapter: folder of a PEFT adapter, which is added to the weights; None for none.

    Returns:
      Parameters with the tree and shapes of `init_params`, in `dtype`.

    Raises:
      UserError: files are missing or truncated, or have other tensors than the model.
    """
    path = Path(path)
    kind = family(read_json(path / CONFIG).get("model_type"))
    shapes = _shapes(config)
    if shardings is None:
        shardings = dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        shardings = traverse_util.flatten_dict(shardings, sep="/")
    sizes = axis_sizes(config)
    stored = weight_files.find_tensors(path, kind)
    # Some files have a tied head in addition to the embedding, or in its place.
    head, embedding = (bare_name(kind.tensors[x].name) for x in ("output", "embedding"))
    if config.tie_embeddings and head in stored:
        stored.setdefault(embedding, stored.pop(head))
    names = _stored_names(config, kind).items()
    shape_of = {leaf: stored_shape(kind.tensors[leaf], sizes) for leaf in shapes}
    expected = {bare_name(name): shape_of[leaf] for name, (leaf, _) in names}
    weight_files.check_tensors(path, stored, expected)
    if adapter is not None:
        stored = peft.adapt(adapter, stored)
    params = {}
    for leaf, shape in shapes.items():
        tensor = kind.tensors[leaf]
        tensors = (stored[bare_name(name)] for name in tensor.names(config.num_layers))
        reads = [partial(read_part, one, tensor, sizes, dtype) for one in tensors]
        put = _device_put_layers if tensor.stacked else _device_put
        params[leaf] = put(shape, shardings[leaf], dtype, *reads)
    return traverse_util.unflatten_dict(params, sep="/")


def write_model(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    model_type: str,
    tokenizer_dir: str | Path | None = None,
    stop_ids: Sequence[int] = (),
    dtype: Any = jnp.float32,
) -> None:
    """Writes a model directory that transformers and compatible tools can load.

    Every process has to call this function; process 0 writes. The directory gets its
    final name when it is complete.

    Args:
      path: directory to create; it may exist if it is empty.
      config: configuration of the model.
      params: parameters, on any devices of any processes.
      model_type: family of the model, one of `families.FAMILIES`.
      tokenizer_dir: directory to copy the tokenizer and generation_config.json from.
      stop_ids: ids that end a completion, in addition to those in tokenizer_dir.
      dtype: dtype of the weights in the files, float32 or bfloat16.

    Raises:
      UserError: the family cannot express the config, or `path` is not empty.
    """
    path = Path(path)
    content, kind = config_to_json(config, model_type), family(model_type)
    content["torch_dtype"] = str(jnp.dtype(dtype))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists; remove it or choose another directory.")
    unfinished = path.with_name(path.name + ".partial")
    is_writer = jax.process_index() == 0
    if is_writer:
        shutil.rmtree(unfinished, ignore_errors=True)  # of an interrupted export
        unfinished.mkdir(parents=True)
        if tokenizer_dir is not None:
            copy_tokenizer(Path(tokenizer_dir), unfinished)
        file = unfinished / GENERATION
        generation = read_json(file, {})
        ids = generation.get("eos_token_id")  # None, an id or a list
        ids = [] if ids is None else np.ravel(ids).tolist()
        stops = sorted({*map(int, stop_ids), *ids})
        generation["eos_token_id"] = content["eos_token_id"] = stops or None
        write_json(file, generation)
        write_json(unfinished / CONFIG, content)
    _write_tensors(unfinished, config, params, kind, dtype)
    if is_writer:
        unfinished.replace(path)
    multihost_utils.sync_global_devices(f"write_model {path}")


def _stored_names(config: ModelConfig, kind: Family) -> dict[str, Place]:
    """Stored name -> its place, in the order of the layers."""
    stored = {}
    for leaf in _shapes(config):
        tensor = kind.tensors[leaf]
        for layer, name in enumerate(tensor.names(config.num_layers)):
            stored[name] = leaf, layer if tensor.stacked else None
    return dict(sorted(stored.items(), key=lambda item: item[1][1] or 0))


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Parameter path -> shape, without allocating parameters."""
    tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    leaves = traverse_util.flatten_dict(tree, sep="/")
    return {name: leaf.shape for name, leaf in leaves.items()}


def _device_put(
    shape: tuple[int, ...], sharding: Sharding, dtype: Any, read: ReadFn
) -> jax.Array:
    parts: dict[str, np.ndarray] = {}

    def read_once(index: Index) -> np.ndarray:
        # Called once per device, also for replicas of the same slice.
        if str(index) not in parts:
            parts[str(index)] = read(index)
        return parts[str(index)]

    return jax.make_array_from_callback(shape, sharding, read_once, dtype)


def _device_put_layers(
    shape: tuple[int, ...], sharding: Sharding, dtype: Any, *reads: ReadFn
) -> jax.Array:
    """Fills a stacked array layer by layer, so the host holds one layer at a time."""
    layer_sharding = sharding
    if isinstance(sharding, NamedSharding):
        layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    # In place; `stack.at[i].set` is a scatter, for which XLA copies the array on CPU.
    update = jax.lax.dynamic_update_index_in_dim
    put = jax.jit(update, static_argnums=3, donate_argnums=0, out_shardings=sharding)
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    for i, read in enumerate(reads):
        layer = _device_put(shape[1:], layer_sharding, dtype, read)
        # Frees the host's copy of this layer before the next one is read.
        stack = jax.block_until_ready(put(stack, layer, i, 0))
    return stack


def _write_tensors(
    path: Path, config: ModelConfig, params: Params, kind: Family, dtype: Any
) -> None:
    """Writes the weights file by file, so the host holds one file at a time."""
    stored, sizes = _stored_names(config, kind), axis_sizes(config)
    leaves = traverse_util.flatten_dict(params, sep="/")
    itemsize = jnp.dtype(dtype).itemsize
    shapes = {k: stored_shape(kind.tensors[x], sizes) for k, (x, _) in stored.items()}
    num_bytes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
    options = {"get_storage_size": int, "max_shard_size": MAX_SHARD_BYTES}
    options["filename_pattern"] = "model{suffix}.safetensors"
    plan = split_state_dict_into_shards_factory(num_bytes, **options)
    is_writer = jax.process_index() == 0
    for file, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            leaf, layer = stored[name]
            value = _to_host(leaves[leaf] if layer is None else leaves[leaf][layer])
            if is_writer:
                tensors[name] = to_stored(value, kind.tensors[leaf], sizes, dtype)
        if is_writer:
            save_file(tensors, path / file, metadata={"format": "pt"})
            shutil.copymode(path / CONFIG, path / file)  # save_file sets mode 600
    if is_writer and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(path / weight_files.INDEX, index)


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the files of a tokenizer and generation_config.json, where they exist."""
    # By name: the directory of the tokenizer may also have the weights of the model.
    for pattern in (*TOKENIZER_FILES, GENERATION):
        for file in source.glob(pattern):
            write_whole(target / file.name, file.read_bytes())
