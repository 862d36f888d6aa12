"""The device mesh, and the rules that map logical axes to mesh axes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from jax.stages import Wrapped

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, logical_axes
from rlt_jax.ranges import Checked, Range

MESH_AXES = ("data", "fsdp", "tensor")
AxisSize = Annotated[int, Range(-1, 2**20)]

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
# Logical axis of a parameter or activation -> mesh axis that shards it. A mesh axis shards
# only one axis of an array: fsdp shards embed in kernels, but batch in activations.
# Between layers tensor shards the length, within a layer the heads.
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
# For generation, weights are replicated over data and fsdp, whose shards decode
# independently, and the length is one token.
_REPLICATED = ("batch", "length", "embed")
DECODING_RULES: Rules = tuple(
    (logical, None if logical in _REPLICATED else axis) for logical, axis in RULES
)


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
    """Sizes of the mesh axes; one may be -1, for all remaining devices."""

    data: AxisSize = -1
    fsdp: AxisSize = 1
    tensor: AxisSize = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Creates the mesh over `devices`, by default all devices.

    Slices of TPUs, which only the network connects, are the outer part of `data`, so that
    parameters are sharded inside a slice.

    Raises:
      UserError: the product of the sizes is not the number of devices, or `data` is no
        multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    try:  # NumPy fills in the -1
        sizes = np.empty(count).reshape(config.data, config.fsdp, config.tensor).shape
    except ValueError as error:
        raise UserError(
            f"mesh {dataclasses.asdict(config)} does not cover {count} devices: the "
            "product of data, fsdp and tensor must be that number (one may be -1)."
        ) from error
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Neighbors in the mesh are neighbors on the torus, also if a mesh axis is only a part
    # of an axis of the torus.
    split = {"allow_split_physical_axes": True}
    if slices == 1 or devices[0].platform == "gpu":
        arranged = create_device_mesh(sizes, devices, **split)
    elif sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} on {slices} slices: it must be a multiple of that, as "
            f"the network between slices is slow; set mesh.data={slices}, mesh.fsdp=-1."
        )
    else:
        inside = (sizes[0] // slices, *sizes[1:])
        between = (slices, 1, 1)
        arranged = create_hybrid_device_mesh(inside, between, devices, **split)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """Checks that the mesh can shard the parameters of a model.

    Raises:
      UserError: a size of the model is not divisible by its mesh axis.
    """
    over_tensor = ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size")
    axes = {"embed_dim": "fsdp", **dict.fromkeys(over_tensor, "tensor")}
    wrong = ", ".join(
        f"{name}={getattr(config, name)} over {axis}={mesh.shape[axis]}"
        for name, axis in axes.items()
        if getattr(config, name) % mesh.shape[axis]
    )
    if wrong:
        raise UserError(f"the model's {wrong}: choose mesh sizes that divide them.")


def num_groups(mesh: Mesh) -> int:
    """Number of shards of the batch: data * fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(mesh: Mesh, rows: int, row_length: int, names: str) -> None:
    """Checks that the mesh can shard a batch of rows.

    Args:
      mesh: the mesh.
      rows: number of rows in the batch.
      row_length: length of a row in tokens.
      names: config keys of both, for the message.

    Raises:
      UserError: the rows or their length are not divisible by the mesh axes.
    """
    groups, tensor = num_groups(mesh), mesh.shape["tensor"]
    if rows % groups or row_length % tensor:
        raise UserError(
            f"{names}: {rows} rows of {row_length} tokens cannot be split over data * "
            f"fsdp = {groups} groups of tensor = {tensor} devices; choose multiples."
        )


def jit(program: Callable, mesh: Mesh, rules: Rules = RULES, **options: Any) -> Wrapped:
    """`jax.jit` with the mesh and the logical axis rules in scope."""

    @functools.wraps(program)
    def traced(*args: Any) -> Any:
        with nn.logical_axis_rules(rules), use_abstract_mesh(mesh.abstract_mesh):
            return program(*args)

    # Without them, logical constraints do nothing, as on a single device.
    return jax.jit(traced if mesh.size > 1 else program, **options)


def to_shardings(specs: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Converts PartitionSpecs of logical axes to NamedShardings on the mesh."""
    return nn.logical_to_mesh_sharding(specs, mesh, rules)


def param_shardings(model: Transformer, mesh: Mesh) -> Any:
    """NamedShardings of the parameters."""
    return to_shardings(logical_axes(model.config), mesh)


def decoding_shardings(specs: Any, mesh: Mesh) -> Any:
    """NamedShardings of the parameters for generation, which gathers no weights."""
    return to_shardings(specs, mesh, DECODING_RULES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of arrays whose axis `leading` is the batch, over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, ("data", "fsdp")))


def row_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of packed rows and the arrays that belong to them, by their shapes.

    B in [M, B, T] and E in [E, ...] are sharded over data and fsdp; arrays whose axis
    is not divisible are replicated.
    """
    groups = num_groups(mesh)

    def one(x: Any) -> NamedSharding:
        axis = 1 if np.ndim(x) == 3 else 0
        divides = np.ndim(x) and np.shape(x)[axis] % groups == 0
        return batch_sharding(mesh, axis) if divides else replicated(mesh)

    return jax.tree.map(one, tree)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Puts arrays that all hosts have in full on the devices, with `row_shardings`.

    Arrays that are on devices already are not moved.
    """

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array):
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, row_shardings(tree, mesh))


def abstract(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    """ShapeDtypeStructs with shardings of a tree of arrays.

    Args:
      tree: tree of arrays or ShapeDtypeStructs.
      shardings: tree of shardings, or one sharding for all arrays.
      dtype: dtype that replaces that of floating-point arrays; None keeps it.
    """

    def one(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        replaced = dtype is not None and jnp.issubdtype(x.dtype, jnp.floating)
        new = dtype if replaced else x.dtype
        return jax.ShapeDtypeStruct(x.shape, new, sharding=sharding)

    return jax.tree.map(one, tree, jax.tree.broadcast(shardings, tree))


def device_bytes(tree: Any) -> int:
    """Bytes per device of a tree of arrays or ShapeDtypeStructs with shardings."""
    parts = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
