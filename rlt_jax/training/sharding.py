"""The mesh, and the one table from logical axes to mesh axes."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlt_jax.errors import UserError
from rlt_jax.models.transformer import Transformer, logical_axes

MESH_AXES = ("data", "fsdp", "tensor")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]
# Logical axis of a parameter or activation -> mesh axis it is split over.
RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
)
# Generation keeps weights whole over data and fsdp.
DECODING_RULES = tuple((axis, None if axis == "embed" else to) for axis, to in RULES)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, "all that is left"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    count = jax.device_count()
    if sizes.count(-1) == 1:
        known = -sizes[0] * sizes[1] * sizes[2]
        sizes[sizes.index(-1)] = count // known if known > 0 else 0
    if min(sizes) < 1 or sizes[0] * sizes[1] * sizes[2] != count:
        raise UserError(
            f"mesh {dataclasses.asdict(config)} does not cover {count} devices: the "
            "product of data, fsdp and tensor must equal them (one may be -1)."
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


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
