"""Shape of a decoder-only transformer, as a frozen dataclass."""

import dataclasses

import jax.numpy as jnp

REMAT_POLICIES = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a decoder-only transformer.

    Attributes:
      vocab_size: V, rows of the embedding.
      embed_dim: D, width of the residual stream.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; divides N.
      head_dim: H.
      mlp_dim: F, width of the gated MLP.
      max_length: longest row the model is meant for, in tokens.
      rope_theta: base of the rotary position angles.
      norm_eps: added to the mean square in RMSNorm.
      tie_embeddings: use the embedding as the output head.
      qkv_bias: biases on the query, key and value projections.
      qk_norm: RMSNorm on every query and key head.
      dtype: of activations, "float32" or "bfloat16".
      remat: what the backward pass computes again: "none", "full" (every layer) or
        "dots" (all but the matrix products).
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_length: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE needs pairs.")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r} is not one of {REMAT_POLICIES}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is not float32 or bfloat16.")

    @property
    def activation_dtype(self) -> jnp.dtype:
        """The dtype of activations as a jnp dtype."""
        return jnp.dtype(self.dtype)
