"""Conversion between the layouts of stored tensors and parameters, slice by slice.

A layout names axes by the letters of this package, with commas between the axes of the
stored tensor: "NH,D" is a matrix with heads and head dim merged in its first axis.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from rlt_jax.models.config import ModelConfig

Index = tuple[slice, ...]


class Tensor(NamedTuple):
    """Name and layouts of a stored tensor, or of one tensor per layer.

    Attributes:
      name: name in the file: "lm_head.weight" or "model.layers.{}.mlp.up_proj.weight",
        where {} stands for the index of the layer.
      stored: layout in the file, such as "NH,D".
      ours: layout of the parameter, such as "DNH", without the axis L.
    """

    name: str
    stored: str
    ours: str

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor per layer."""
        return "{}" in self.name

    def names(self, num_layers: int) -> list[str]:
        """Names in the file: one, or one per layer."""
        return [self.name.format(i) for i in range(num_layers if self.stacked else 1)]


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """Size of every axis, by its letter."""
    c = config
    sizes = {"V": c.vocab_size, "D": c.embed_dim, "F": c.mlp_dim}
    return sizes | {"N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim}


def stored_shape(tensor: Tensor, sizes: dict[str, int]) -> list[int]:
    """Shape of the tensor in the file."""
    axes = tensor.stored.split(",")
    return [math.prod(sizes[letter] for letter in axis) for axis in axes]


def read_part(
    stored: Any, tensor: Tensor, sizes: dict[str, int], dtype: Any, index: Index
) -> np.ndarray:
    """Reads a slice of a parameter from a stored tensor.

    Args:
      stored: tensor in the stored layout; its slices are NumPy arrays.
      tensor: layouts of the tensor.
      sizes: sizes of the axes, from `axis_sizes`.
      dtype: dtype of the result.
      index: one slice for each axis of the parameter.

    Returns:
      The slice of the parameter, contiguous.
    """
    slices = dict(zip(tensor.ours, index, strict=True))
    outer, shape, inner = [], [], []
    for first, *others in tensor.stored.split(","):
        # A slice of a merged axis is contiguous only along its first letter.
        step = math.prod(sizes[letter] for letter in others)
        start, stop, _ = slices[first].indices(sizes[first])
        outer.append(slice(start * step, stop * step))
        shape += [stop - start, *(sizes[letter] for letter in others)]
        inner += [slice(None), *(slices[letter] for letter in others)]
    part = stored[tuple(outer)].reshape(shape)[tuple(inner)]
    letters = tensor.stored.replace(",", "")
    order = [letters.index(letter) for letter in tensor.ours]
    return np.ascontiguousarray(part.transpose(order), np.dtype(dtype))


def to_stored(
    value: np.ndarray, tensor: Tensor, sizes: dict[str, int], dtype: Any
) -> np.ndarray:
    """A parameter (of one layer) in the stored layout, contiguous."""
    order = [tensor.ours.index(letter) for letter in tensor.stored.replace(",", "")]
    value = value.transpose(order).reshape(stored_shape(tensor, sizes))
    return np.ascontiguousarray(value, np.dtype(dtype))
