"""Rotary position embeddings (RoPE, arXiv 2104.09864) and their scalings."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rlt_jax.models.config import ModelConfig, RopeScaling
from rlt_jax.types import Array


class Rope(NamedTuple):
    """Rotary frequencies of one layer, or of all layers with a leading axis L.

    Attributes:
      frequency: [H / 2] float32, in radians per position.
      amplitude: [] float32, factor on the rotated head.
    """

    frequency: Array | np.ndarray
    amplitude: Array | np.ndarray | float = 1.0


def rotate(x: Array, positions: Array, rope: Rope) -> Array:
    """Rotates pairs of head dimensions by angles proportional to the position.

    The first half of the head is paired with the second half, as in Llama and Qwen.

    Args:
      x: queries [B, T, N, H] or keys [B, T, K, H].
      positions: [B, T] int32.
      rope: frequencies of the layer.

    Returns:
      Rotated heads in the shape and dtype of x; angles are float32.
    """
    angle = positions[..., None, None].astype(jnp.float32) * rope.frequency
    sin, cos = jnp.sin(angle) * rope.amplitude, jnp.cos(angle) * rope.amplitude
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def layer_ropes(config: ModelConfig) -> Rope:
    """The rotary frequencies [L, H / 2] and amplitudes [L] of all layers."""
    full = _rope(config.head_dim, config.rope_theta, config.rope_scaling)
    ropes = [full] * config.num_layers
    if config.local_rope_theta is not None and config.windowed_layers:
        local = _rope(config.head_dim, config.local_rope_theta, None)
        ropes = [local if windowed else full for windowed in config.windowed_layers]
    return Rope(*(np.stack(x).astype(np.float32) for x in zip(*ropes, strict=True)))


def _rope(head_dim: int, theta: float, scaling: RopeScaling | None) -> Rope:
    """Rotary frequencies of a layer, rounded as in transformers before any scaling."""
    half = head_dim // 2
    frequency = 1 / np.float32(theta ** (np.arange(half) / half))
    if scaling is None:
        return Rope(frequency)
    if scaling.kind == "linear":
        return Rope(frequency / scaling.factor)
    if scaling.kind == "llama3":
        # Rotations of each pair over the original context.
        rotations = scaling.original_length * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((rotations - low) / (high - low), 0, 1)
        return Rope(_interpolate(frequency, scaling.factor, kept))
    return _yarn(frequency, theta, scaling)


def _yarn(frequency: np.ndarray, theta: float, scaling: RopeScaling) -> Rope:
    half = len(frequency)

    def pair_with(rotations: float) -> float:
        wavelength = scaling.original_length / rotations
        return half * math.log(wavelength / (2 * math.pi)) / math.log(theta)

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), 2 * half - 1)
    amplitude = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    kept = 1 - np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    return Rope(_interpolate(frequency, scaling.factor, kept), amplitude)


def _interpolate(frequency: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    """Frequencies divided by factor where `kept` is 0, unchanged where it is 1."""
    return frequency * (kept + (1 - kept) / factor)
