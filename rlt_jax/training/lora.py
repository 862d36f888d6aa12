"""Low-rank adapters (LoRA, arXiv 2106.09685), with qwix.

A projection with kernel W has adapters A [L, in, rank] and B [L, rank, out] in float32
and computes x W + alpha / rank * x A B. Only A and B are trained.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from rlt_jax.errors import UserError
from rlt_jax.models.transformer import Transformer, boxed_params, boxed_shapes
from rlt_jax.ranges import NOT_EMPTY, Checked, NonNegativeFloat, OneOf, Range
from rlt_jax.training.sharding import param_shardings, to_shardings
from rlt_jax.types import Params

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")
Projection = Annotated[str, OneOf(PROJECTIONS)]
A, B = "_lora_a", "_lora_b"  # suffixes of qwix to the name of a kernel


@dataclasses.dataclass(frozen=True)
class LoRAConfig(Checked):
    """Settings of low-rank adapters.

    Attributes:
      rank: rank of the adapters; 0 trains all parameters without adapters.
      alpha: the product of the adapters is multiplied by alpha / rank.
      modules: projections with adapters, a subset of `PROJECTIONS`.
    """

    rank: Annotated[int, Range(0, 2**16)] = 0
    alpha: NonNegativeFloat = 16.0
    modules: Annotated[Sequence[Projection], NOT_EMPTY] = PROJECTIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank and not self.alpha:
            raise UserError("lora.alpha=0: adapters would have no effect; raise it.")


class Tuning(NamedTuple):
    """The model that is trained, and its frozen parameters.

    Attributes:
      model: model whose parameters are `combine(frozen, trained)`.
      frozen: base parameters of the adapters; None if all parameters are trained.
      merge: trained tree -> merged parameters of the base model.
      item: name of the trained tree in a checkpoint, next to the merged "params".
    """

    model: Transformer
    frozen: Params | None
    merge: Callable[[Params], Params]
    item: str


def make_tuning(
    config: LoRAConfig, model: Transformer, params: Params, mesh: Mesh, key: jax.Array
) -> tuple[Tuning, Params]:
    """Sets up the training of a loaded model; also returns the initial trained tree.

    With adapters, the trained tree has A and B, with B initialized to 0.
    """
    if not config.rank:
        return Tuning(model, None, lambda trained: trained, "params"), params
    import qwix  # imports flax.nnx, which fails on some JAX versions

    path = f"layers/.*/({'|'.join(config.modules)})"
    rule = qwix.LoraRule(module_path=path, rank=config.rank, alpha=config.alpha)
    model = qwix.apply_lora_to_model(model, qwix.LoraProvider([rule]))

    def init(key: jax.Array) -> Params:
        return trained_part(nn.unbox(boxed_params(model, key)))

    axes = nn.get_partition_spec(trained_part(boxed_shapes(model)))
    adapters = jax.jit(init, out_shardings=to_shardings(axes, mesh))(key)
    scaled = functools.partial(merge, config.alpha / config.rank)
    jitted = jax.jit(scaled, out_shardings=param_shardings(model, mesh))
    merged = functools.partial(jitted, params)
    return Tuning(model, params, merged, "adapters"), adapters


def trained_part(params: Params) -> Params:
    """The adapters in a tree of parameters; the whole tree if it has none."""
    flat = flatten_dict(params)
    adapters = {path: x for path, x in flat.items() if path[-1].endswith((A, B))}
    return unflatten_dict(adapters or flat)


def combine(model: Transformer, frozen: Params | None, trained: Params) -> Params:
    """Parameters of the model, with adapters cast to the activation dtype like kernels."""
    if frozen is None:
        return trained
    cast = jax.tree.map(lambda x: x.astype(model.config.activation_dtype), trained)
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(cast))


def merge(scale: float, frozen: Params, adapters: Params) -> Params:
    """Parameters with W + scale * A B, computed in float32, for kernels with adapters."""
    flat, adapters = flatten_dict(frozen), flatten_dict(adapters)
    for (*path, name), W in flat.items():
        if (*path, name + A) in adapters:
            pair = adapters[*path, name + A], adapters[*path, name + B]
            delta = scale * jnp.matmul(*pair, precision="highest").reshape(W.shape)
            flat[*path, name] = (W + delta).astype(W.dtype)
    return unflatten_dict(flat)
