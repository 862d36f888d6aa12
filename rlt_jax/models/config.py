"""Shape of a decoder-only transformer, as frozen dataclasses."""

import dataclasses

import jax.numpy as jnp

from rlt_jax.errors import UserError, check_choice

REMAT_POLICIES = ("none", "full", "dots")
ACTIVATIONS = ("silu", "gelu_tanh")
DTYPES = ("float32", "bfloat16")
ROPE_SCALINGS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change so that rows may outgrow the original context.

    Attributes:
      kind: "linear" divides every frequency by factor; "llama3" divides the slow ones
        and blends over to the fast ones; "yarn" (arXiv 2309.00071) does so along a ramp
        over the head and sharpens the attention.
      factor: how much longer rows may get.
      original_length: context of the unscaled model; llama3 and yarn.
      low_freq_factor: llama3 divides what turns less often in the original context.
      high_freq_factor: llama3 keeps what turns more often in the original context.
      beta_fast: yarn keeps what turns more often in the original context.
      beta_slow: yarn divides what turns less often in the original context.
      attention_factor: yarn multiplies queries and keys by it; None is
        0.1 * log(factor) + 1.
    """

    kind: str
    factor: float
    original_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check_choice("rope_scaling.kind", self.kind, ROPE_SCALINGS)
        if self.kind != "linear" and not self.original_length:
            raise UserError(f"rope_scaling: {self.kind} needs original_length.")


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
      out_bias: bias on the projection out of attention.
      mlp_bias: biases in the MLP.
      activation: of the MLP's gate, "silu" or "gelu_tanh".
      norm_plus_one: norms multiply by 1 + scale, and scale starts at 0.
      post_norms: norms on the outputs of attention and MLP too.
      scale_embeddings: multiply embeddings by sqrt(D), rounded to the activation dtype.
      query_scale_dim: queries are multiplied by its -0.5th power; None is H.
      attention_softcap: scores become cap * tanh(score / cap); None leaves them.
      final_softcap: the same for the logits.
      sliding_window: how many tokens, its own included, a query sees in a windowed
        layer.
      windowed_layers: for each layer whether it is windowed; () if none is.
      local_rope_theta: base of the angles in windowed layers, which then have no
        scaling; None treats all layers alike.
      rope_scaling: change of the rotary frequencies, or None.
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
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    norm_plus_one: bool = False
    post_norms: bool = False
    scale_embeddings: bool = False
    query_scale_dim: int | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None
    windowed_layers: tuple[bool, ...] = ()
    local_rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        # JSON has lists and dicts only; a config stays hashable.
        object.__setattr__(self, "windowed_layers", tuple(self.windowed_layers))
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; RoPE needs pairs.")
        if len(self.windowed_layers) not in (0, self.num_layers):
            raise UserError(
                f"windowed_layers says {len(self.windowed_layers)} layers, num_layers "
                f"{self.num_layers}."
            )
        if any(self.windowed_layers) != bool(self.sliding_window):
            raise UserError("sliding_window goes with layers that are windowed.")
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("remat", self.remat, REMAT_POLICIES)
        check_choice("dtype", self.dtype, DTYPES)

    @property
    def activation_dtype(self) -> jnp.dtype:
        """The dtype of activations as a jnp dtype."""
        return jnp.dtype(self.dtype)
