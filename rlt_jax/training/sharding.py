"""The mesh, and the one table from logical axes to mesh axes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, logical_axes

MESH_AXES = ("data", "fsdp", "tensor")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
# Logical axis of a parameter or activation -> mesh axis it is split over. An axis that an
# array's earlier axes took is not used again: embed is split in kernels, whose rows are
# no batch. Between layers the length is split over tensor, within one the heads are.
RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("length", "tensor"),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
)
# Generation keeps weights whole over data and fsdp, whose parts know nothing of each
# other, and feeds tokens one by one.
_WHOLE = ("batch", "length", "embed")
DECODING_RULES: Rules = tuple((x, None if x in _WHOLE else to) for x, to in RULES)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, "all that is left"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, or over those given.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    count = jax.device_count() if devices is None else len(devices)
    if sizes.count(-1) == 1:
        known = -sizes[0] * sizes[1] * sizes[2]
        sizes[sizes.index(-1)] = count // known if known > 0 else 0
    if min(sizes) < 1 or sizes[0] * sizes[1] * sizes[2] != count:
        raise UserError(
            f"mesh {dataclasses.asdict(config)} does not cover {count} devices: the "
            "product of data, fsdp and tensor must equal them (one may be -1)."
        )
    # Neighbours in the mesh are neighbours on the torus, also where a mesh axis has only
    # a part of one of its axes.
    arranged = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """Refuses a model that the mesh cannot split.

    Raises:
      UserError: names every size that is no multiple of its mesh axis.
    """
    sizes = (
        ("embed_dim", "fsdp"),
        ("num_heads", "tensor"),
        ("num_kv_heads", "tensor"),
        ("mlp_dim", "tensor"),
        ("vocab_size", "tensor"),
    )
    odd = [
        f"{name}={getattr(config, name)} over {axis}={mesh.shape[axis]}"
        for name, axis in sizes
        if getattr(config, name) % mesh.shape[axis]
    ]
    if odd:
        raise UserError(
            f"the model's {', '.join(odd)} cannot be split evenly: choose sizes of the "
            "mesh that divide them."
        )


def num_groups(mesh: Mesh) -> int:
    """Groups of devices, each with rows of its own: data * fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(mesh: Mesh, rows: int, row_length: int, names: str) -> None:
    """Refuses rows that the mesh cannot split.

    Args:
      mesh: where they go.
      rows: computed at once.
      row_length: tokens of each.
      names: keys of the config that set both, for the message.

    Raises:
      UserError: with the numbers.
    """
    groups, tensor = num_groups(mesh), mesh.shape["tensor"]
    if rows % groups or row_length % tensor:
        raise UserError(
            f"{names}: {rows} rows of {row_length} tokens cannot be split over data * "
            f"fsdp = {groups} groups of tensor = {tensor} devices."
        )


def jit(function: Callable, mesh: Mesh, rules: Rules = RULES, **options: Any) -> Any:
    """`jax.jit` on a mesh, where logical axes in the function mean its axes."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with nn.logical_axis_rules(rules), use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    # One device has nothing to constrain.
    return jax.jit(traced if mesh.size > 1 else function, **options)


def to_shardings(specs: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """PartitionSpecs of logical axes -> NamedShardings on the mesh."""
    return nn.logical_to_mesh_sharding(specs, mesh, rules)


def param_shardings(model: Transformer, mesh: Mesh) -> Any:
    """A NamedSharding for every parameter."""
    return to_shardings(logical_axes(model.config), mesh)


def decoding_shardings(specs: Any, mesh: Mesh) -> Any:
    """Those for generation, where no weight is gathered at every step."""
    return to_shardings(specs, mesh, DECODING_RULES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of values that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Arrays whose axis `leading` is the batch, split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, ("data", "fsdp")))


def row_shardings(tree: Any, mesh: Mesh) -> Any:
    """For packed rows and what goes with them, by their shapes.

    [M, B, T] is split over B, [N, ...] over N, both over data and fsdp; what these do
    not divide is whole on every device.
    """
    groups = num_groups(mesh)

    def one(x: Any) -> NamedSharding:
        axis = 1 if np.ndim(x) == 3 else 0
        if np.ndim(x) and np.shape(x)[axis] % groups == 0:
            return batch_sharding(mesh, axis)
        return replicated(mesh)

    return jax.tree.map(one, tree)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Puts rows of the host, the same on every host, where `row_shardings` says.

    Arrays that are on devices already stay where they are.
    """

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array):
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, row_shardings(tree, mesh))


def abstract(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    """Arrays, or their shapes, as ShapeDtypeStructs with a sharding.

    Args:
      tree: what has shapes and dtypes.
      shardings: of each, or one for all.
      dtype: of floats, in place of their own.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def one(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        floats = dtype is not None and jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(
            x.shape, dtype if floats else x.dtype, sharding=sharding
        )

    return jax.tree.map(one, tree, shardings)


def device_bytes(tree: Any) -> int:
    """Bytes that arrays, or ShapeDtypeStructs, with shardings take on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
