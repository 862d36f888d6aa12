"""The weights that decoding reads: as trained, in bfloat16, or kernels in int8 by qwix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlt_jax.models.transformer import Transformer, boxed_params, logical_axes
from rlt_jax.types import Params

DecodeWeights = tuple[Transformer, Callable[[Params], Params], Any]


def decode_weights(model: Transformer, weights: str) -> DecodeWeights:
    """The model to decode with, what makes its parameters, and their logical axes."""
    axes = logical_axes(model.config)
    if weights == "int8":
        return _int8(model)
    if weights == "bfloat16":
        return model, lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p), axes
    return model, lambda params: params, axes


def _int8(model: Transformer) -> DecodeWeights:
    """Every kernel of a layer with a scale for each output; all else as it is."""
    import qwix  # with it comes the part of Flax that not every JAX can import

    rule = qwix.QuantizationRule(module_path="layers/.*", weight_qtype=jnp.int8)
    quantised = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    boxed = jax.eval_shape(lambda: boxed_params(quantised, jax.random.key(0)))

    def convert(target: Any, x: jax.Array) -> Any:
        if isinstance(target, nn.Partitioned):
            return x
        # What qwix knows is about one layer, x is stacked on L.
        axes = [0, *(axis + 1 for axis in target.how.channelwise_axes)]
        return target.replace(array=qwix.quantize(x, jnp.int8, channelwise_axes=axes))

    def to_int8(params: Params) -> Params:
        return jax.tree.map(
            convert,
            boxed,
            params,
            is_leaf=lambda x: isinstance(x, nn.Partitioned) or hasattr(x, "how"),
        )

    return quantised, to_int8, nn.get_partition_spec(boxed)
