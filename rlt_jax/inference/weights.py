"""Weights for decoding: as trained, in bfloat16, or with int8 kernels by qwix."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlt_jax.models.transformer import Transformer, boxed_shapes, logical_axes
from rlt_jax.types import Array, Params

DecodeWeights = tuple[Transformer, Callable[[Params], Params], Any]


def decode_weights(model: Transformer, weights: str) -> DecodeWeights:
    """The model for decoding, the conversion of its parameters, and their logical axes.

    Args:
      model: the trained model.
      weights: "int8", "bfloat16", or the dtype of the parameters for any other value.
    """
    axes = logical_axes(model.config)
    if weights == "int8":
        return _int8(model)
    if weights == "bfloat16":
        return model, lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), axes
    return model, lambda params: params, axes


def _int8(model: Transformer) -> DecodeWeights:
    """int8 kernels in the layers with one scale per output channel; the rest unchanged."""
    import qwix  # imports flax.nnx, which fails on some JAX versions

    rule = qwix.QuantizationRule(module_path="layers/.*", weight_qtype=jnp.int8)
    quantized = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    boxed = boxed_shapes(quantized)

    def convert(target: Any, x: Array) -> Any:
        if isinstance(target, nn.Partitioned):
            return x
        # qwix's axes are those of one layer; x is stacked on L.
        axes = [0, *(axis + 1 for axis in target.how.channelwise_axes)]
        return target.replace(array=qwix.quantize(x, jnp.int8, channelwise_axes=axes))

    def is_leaf(x: Any) -> bool:
        return isinstance(x, nn.Partitioned) or hasattr(x, "how")

    to_int8 = functools.partial(jax.tree.map, convert, boxed, is_leaf=is_leaf)
    return quantized, to_int8, nn.get_partition_spec(boxed)
