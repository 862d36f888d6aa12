"""Configuration of a decoder-only transformer."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax.numpy as jnp

from rlt_jax import ranges
from rlt_jax.errors import UserError
from rlt_jax.settings import build

REMAT_POLICIES = ("none", "full", "dots")
DTYPES = ("float32", "bfloat16")
EVEN = ranges.Condition("even", lambda x: x % 2 == 0)
# The base of angles: above 1, or all pairs of a head would turn alike.
Theta = Annotated[float, ranges.Range(1, 1e15, above=True)]


@dataclasses.dataclass(frozen=True)
class RopeScaling(ranges.Checked):
    """Scaling of the rotary frequencies for sequences beyond the original context.

    Attributes:
      kind: "linear" divides every frequency by factor; "llama3" divides the low
        frequencies and interpolates to the high ones, which it keeps; "yarn" (arXiv
        2309.00071) interpolates along the head and scales the attention.
      factor: ratio of the extended to the original context length.
      original_length: original context length in tokens; for llama3 and yarn.
      low_freq_factor: llama3 divides frequencies with fewer rotations in the original
        context.
      high_freq_factor: llama3 keeps frequencies with more rotations in the original
        context.
      beta_fast: yarn keeps frequencies with more rotations in the original context.
      beta_slow: yarn divides frequencies with fewer rotations in the original context.
      attention_factor: yarn multiplies queries and keys by it; None means
        0.1 * log(factor) + 1.
    """

    kind: Annotated[str, ranges.OneOf(("linear", "llama3", "yarn"))]
    factor: ranges.PositiveFloat
    original_length: ranges.PositiveInt | None = None
    low_freq_factor: ranges.PositiveFloat = 1.0
    high_freq_factor: ranges.PositiveFloat = 4.0
    beta_fast: ranges.PositiveFloat = 32.0
    beta_slow: ranges.PositiveFloat = 1.0
    attention_factor: ranges.PositiveFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "linear" and not self.original_length:
            raise UserError(f"rope_scaling: set original_length for {self.kind}.")
        ordered = {"low_freq_factor": "high_freq_factor", "beta_slow": "beta_fast"}
        for low, high in ordered.items():
            if getattr(self, low) >= getattr(self, high):
                raise UserError(f"rope_scaling: set {low} below {high}.")


@dataclasses.dataclass(frozen=True)
class ModelConfig(ranges.Checked):
    """Shape and numerics of a decoder-only transformer.

    Attributes:
      vocab_size: V, size of the vocabulary.
      embed_dim: D, width of the residual stream.
      num_layers: L, number of layers.
      num_heads: N, number of query heads.
      num_kv_heads: K, number of key/value heads; divides N.
      head_dim: H, dimension of a head; even, as RoPE turns pairs.
      mlp_dim: F, width of the gated MLP.
      max_length: maximum sequence length in tokens that the model is meant for.
      rope_theta: base of the rotary position angles.
      norm_eps: epsilon of RMSNorm, added to the mean square.
      tie_embeddings: whether the embedding is also the output head.
      qkv_bias: whether the query, key and value projections have biases.
      qk_norm: whether query and key heads have an RMSNorm.
      dtype: dtype of the activations, "float32" or "bfloat16".
      remat: what the backward pass recomputes: "none", "full" (every layer) or "dots"
        (everything but the matrix products).
      out_bias: whether the output projection of attention has a bias.
      mlp_bias: whether the MLP has biases.
      activation: activation of the MLP's gate, "silu" or "gelu_tanh".
      norm_plus_one: whether norms multiply by 1 + scale, with scale initialized to 0.
      post_norms: whether the outputs of attention and MLP have norms too.
      scale_embeddings: whether embeddings are multiplied by sqrt(D), rounded to the
        activation dtype.
      query_scale_dim: queries are multiplied by query_scale_dim**-0.5; None means H.
      attention_softcap: attention scores become cap * tanh(score / cap); None disables.
      final_softcap: the same for the logits.
      sliding_window: number of tokens that a query attends to in a windowed layer, itself
        included.
      windowed_layers: for each layer whether it is windowed; () if none is.
      local_rope_theta: base of the angles in windowed layers, which then have no RoPE
        scaling; None treats all layers the same.
      rope_scaling: scaling of the rotary frequencies, or None.
    """

    vocab_size: Annotated[int, ranges.Range(1, 2**24)]
    embed_dim: ranges.Size
    num_layers: Annotated[int, ranges.Range(1, 10_000)]
    num_heads: ranges.Size
    num_kv_heads: ranges.Size
    head_dim: Annotated[int, ranges.Range(1, 4096), EVEN]
    mlp_dim: ranges.Size
    max_length: ranges.PositiveInt
    rope_theta: Theta = 10_000.0
    norm_eps: Annotated[float, ranges.Range(1e-15, 1)] = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    dtype: Annotated[str, ranges.OneOf(DTYPES)] = "float32"
    remat: Annotated[str, ranges.OneOf(REMAT_POLICIES)] = "none"
    out_bias: bool = False
    mlp_bias: bool = False
    activation: Annotated[str, ranges.OneOf(("silu", "gelu_tanh"))] = "silu"
    norm_plus_one: bool = False
    post_norms: bool = False
    scale_embeddings: bool = False
    query_scale_dim: ranges.PositiveFloat | None = None
    attention_softcap: ranges.PositiveFloat | None = None
    final_softcap: ranges.PositiveFloat | None = None
    sliding_window: ranges.PositiveInt | None = None
    windowed_layers: tuple[bool, ...] = ()
    local_rope_theta: Theta | None = None
    rope_scaling: RopeScaling | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rope_scaling, RopeScaling | None):
            scaling = build(RopeScaling, self.rope_scaling, "rope_scaling")
            object.__setattr__(self, "rope_scaling", scaling)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if len(self.windowed_layers) not in (0, self.num_layers):
            raise UserError(
                f"windowed_layers has {len(self.windowed_layers)} values; give one for "
                f"each of num_layers={self.num_layers}."
            )
        if any(self.windowed_layers) != bool(self.sliding_window):
            raise UserError("set sliding_window and windowed_layers together.")

    @property
    def activation_dtype(self) -> jnp.dtype:
        """The dtype of activations as a jnp dtype."""
        return jnp.dtype(self.dtype)
