"""How a stored tensor's axes become a parameter's, for parts of it too.

A layout is written in the axis letters of this package, with a comma between two axes
of the stored tensor: "NH,D" is a matrix whose rows are heads times head dim.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from rlt_jax.models.config import ModelConfig

Index = tuple[slice, ...]


class Tensor(NamedTuple):
    """One stored tensor, or one a layer where the name has a place for its number.

    Attributes:
      name: such as "lm_head.weight" or "model.layers.{}.mlp.up_proj.weight".
      stored: its layout, such as "NH,D".
      ours: the parameter's, such as "DNH", without the axis that stacks layers.
    """

    name: str
    stored: str
    ours: str

    @property
    def stacked(self) -> bool:
        """Whether there is one of it in every layer."""
        return "{}" in self.name

    def names(self, num_layers: int) -> list[str]:
        """Its name, or its names from the first layer to the last."""
        if not self.stacked:
            return [self.name]
        return [self.name.format(layer) for layer in range(num_layers)]


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Axis letter -> size."""
    return {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.mlp_dim,
    }


def stored_shape(tensor: Tensor, sizes: dict[str, int]) -> list[int]:
    """Shape of a tensor in the file."""
    axes = tensor.stored.split(",")
    return [math.prod(sizes[letter] for letter in axis) for axis in axes]


def read_part(
    stored: Any, tensor: Tensor, sizes: dict[str, int], dtype: Any, index: Index
) -> np.ndarray:
    """Reads the part of a stored tensor that `index` of the parameter names.

    Args:
      stored: anything that slices to NumPy arrays, in the stored layout.
      tensor: its layouts.
      sizes: from `axis_sizes`.
      dtype: of the result.
      index: one slice for each axis of the parameter.

    Returns:
      That part of the parameter, contiguous.
    """
    wanted = dict(zip(tensor.ours, index, strict=True))
    outer, shape, inner = [], [], []
    for first, *others in tensor.stored.split(","):
        # Only along its first letter is a part of a merged axis one run of rows.
        step = math.prod(sizes[letter] for letter in others)
        start, stop, _ = wanted[first].indices(sizes[first])
        outer.append(slice(start * step, stop * step))
        shape += [stop - start, *(sizes[letter] for letter in others)]
        inner += [slice(None), *(wanted[letter] for letter in others)]
    part = stored[tuple(outer)].reshape(shape)[tuple(inner)]
    letters = tensor.stored.replace(",", "")
    order = [letters.index(letter) for letter in tensor.ours]
    return np.ascontiguousarray(part.transpose(order), np.dtype(dtype))


def to_stored(
    value: np.ndarray, tensor: Tensor, sizes: dict[str, int], dtype: Any
) -> np.ndarray:
    """A whole parameter (of one layer) in the stored layout, contiguous."""
    order = [tensor.ours.index(letter) for letter in tensor.stored.replace(",", "")]
    value = value.transpose(order).reshape(stored_shape(tensor, sizes))
    return np.ascontiguousarray(value, np.dtype(dtype))
