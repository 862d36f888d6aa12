"""A decoder-only transformer in Flax Linen.

Layers are scanned (parameters stacked on L) and optionally rematerialized. The KV cache
is an argument and a result. The output head is a separate function, so that
log-probabilities never need all logits at once.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlt_jax.models.attention import Settings, Tokens, attention, soft_cap
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.paged_cache import paged_attention, write
from rlt_jax.models.rope import Rope, layer_ropes, rotate
from rlt_jax.types import Array, PagedCache, Params

Axes = tuple[str | None, ...]
Carry = tuple[Array, PagedCache | None]  # activations, and the cache of keys and values

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}  # gelu by tanh


class Layer(NamedTuple):
    """Inputs of a layer that differ between layers; stacked on L.

    Attributes:
      index: [] int32, index of the layer.
      windowed: [] bool, whether the layer has a sliding window.
      rope: rotary frequencies.
    """

    index: Array
    windowed: Array
    rope: Rope


def _kernel_init(axes: Axes, fan_in: int) -> Any:
    init = nn.initializers.truncated_normal(stddev=fan_in**-0.5)
    return nn.with_logical_partitioning(init, axes)


def _constrain(x: Array, *axes: str | None) -> Array:
    return nn.with_logical_constraint(x, axes)


def _all_lengths(x: Array) -> Array:
    """Activations [B, T, D] that are not sharded over the length and the width."""
    return _constrain(x, "batch", None, None)


class RMSNorm(nn.Module):
    """Root-mean-square norm, statistics in float32, over the last axis."""

    eps: float
    plus_one: bool
    axis_name: str = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        init = nn.with_logical_partitioning(init, (self.axis_name,))
        scale = self.param("scale", init, (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * (scale + 1.0 if self.plus_one else scale)).astype(x.dtype)


def _dot(x: Array, kernel: Array, contracted: int) -> Array:
    """Contracts the last `contracted` axes of x with the first ones of the kernel."""
    axes = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
    return jax.lax.dot_general(x, kernel, (axes, ((), ())))


# With a gradient of its own: autodiff transposes the gradient of the kernel, which on CPU
# takes several times as long as the product.
_product = jax.custom_vjp(_dot, nondiff_argnums=(2,))


def _product_backward(contracted: int, saved: tuple, dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - contracted))
    outs = tuple(range(len(rows), dy.ndim)), tuple(range(contracted, kernel.ndim))
    dx = jax.lax.dot_general(dy, kernel, (outs, ((), ())))
    return dx, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())))


_product.defvjp(lambda x, w, n: (_dot(x, w, n), (x, w)), _product_backward)


class Projection(nn.Module):
    """Dense layer from the trailing axes `in_shape` to `out_shape`, with logical `axes`."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: Axes
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = _kernel_init(self.axes, math.prod(self.in_shape))
        kernel = self.param("kernel", init, self.in_shape + self.out_shape)
        product = _dot if self._uses_qwix(kernel) else _product
        kernel = jnp.asarray(kernel, x.dtype)
        y = product(x, kernel, len(self.in_shape)).astype(x.dtype)
        if self.use_bias:
            axes = self.axes[len(self.in_shape) :]
            init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
            y = y + self.param("bias", init, self.out_shape).astype(x.dtype)
        return y

    def _uses_qwix(self, kernel: Any) -> bool:
        """Whether the kernel is int8, or has adapters or may be given some.

        Then the product has to use the functions of JAX that qwix intercepts.
        """
        adapted = set(self.variables["params"]) - {"kernel", "bias"}
        return bool(adapted or self.is_initializing()) or not isinstance(kernel, Array)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values, rotary positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, carry: Carry, layer: Layer, positions: Array, segment_ids: Array | None
    ) -> Carry:
        c = self.config
        x, kv_cache = carry
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        q_axes = ("embed", "heads", "head_dim")
        kv_axes = ("embed", "kv_heads", "head_dim")
        query = Projection((D,), (N, H), q_axes, c.qkv_bias, name="query")(x)
        key = Projection((D,), (K, H), kv_axes, c.qkv_bias, name="key")(x)
        value = Projection((D,), (K, H), kv_axes, c.qkv_bias, name="value")(x)
        if c.qk_norm:
            norm = functools.partial(RMSNorm, c.norm_eps, c.norm_plus_one, "head_dim")
            query, key = norm(name="query_norm")(query), norm(name="key_norm")(key)
        query, key = (rotate(x, positions, layer.rope) for x in (query, key))
        query = _constrain(query, "batch", None, "heads", "head_dim")
        key = _constrain(key, "batch", None, "kv_heads", "head_dim")
        value = _constrain(value, "batch", None, "kv_heads", "head_dim")
        scale = (c.query_scale_dim or H) ** -0.5
        settings = Settings(scale, c.attention_softcap, c.sliding_window)
        if kv_cache is None:
            tokens = Tokens(positions, segment_ids, layer.windowed)
            y = attention(query, key, value, tokens, settings)
        else:
            kv_cache = write(kv_cache, layer.index, positions, key, value)
            args = (query, kv_cache, layer.index, positions, layer.windowed)
            y = paged_attention(*args, settings)
        o_axes = ("heads", "head_dim", "embed")
        return Projection((N, H), (D,), o_axes, c.out_bias, name="out")(y), kv_cache


class MLP(nn.Module):
    """Gated MLP: down(activation(gate(x)) * up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        D, F, bias = c.embed_dim, c.mlp_dim, c.mlp_bias
        gate = Projection((D,), (F,), ("embed", "mlp"), bias, name="gate")(x)
        up = Projection((D,), (F,), ("embed", "mlp"), bias, name="up")(x)
        y = _constrain(ACTIVATIONS[c.activation](gate) * up, "batch", None, "mlp")
        return Projection((F,), (D,), ("mlp", "embed"), bias, name="down")(y)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, carry: Carry, layer: Layer, positions: Array, segment_ids: Array | None
    ) -> tuple[Carry, None]:
        c = self.config
        norm = functools.partial(RMSNorm, c.norm_eps, c.norm_plus_one)
        x, kv_cache = carry
        y = _all_lengths(norm(name="attention_norm")(x))
        args = ((y, kv_cache), layer, positions, segment_ids)
        y, kv_cache = Attention(c, name="attention")(*args)
        x = x + (norm(name="attention_post_norm")(y) if c.post_norms else y)
        y = MLP(c, name="mlp")(_all_lengths(norm(name="mlp_norm")(x)))
        x = x + (norm(name="mlp_post_norm")(y) if c.post_norms else y)
        return (_constrain(x, "batch", "length", "embed"), kv_cache), None


def _remat(block: Any, policy: str) -> Any:
    if policy == "none":
        return block
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    saved = dots if policy == "dots" else None
    return nn.remat(block, policy=saved, prevent_cse=False)


class Transformer(nn.Module):
    """Decoder-only transformer; `logits` computes logits from hidden states."""

    config: ModelConfig

    def setup(self) -> None:
        c, init = self.config, nn.initializers.normal(stddev=0.02)
        init = nn.with_logical_partitioning(init, ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.embed_dim))
        self.layers = nn.scan(
            _remat(Block, c.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.final_norm = RMSNorm(c.norm_eps, c.norm_plus_one)
        if not c.tie_embeddings:
            init = _kernel_init(("embed", "vocab"), c.embed_dim)
            self.output = self.param("output", init, (c.embed_dim, c.vocab_size))

    def __call__(
        self,
        tokens: Array,
        positions: Array,
        segment_ids: Array | None = None,
        kv_cache: PagedCache | None = None,
    ) -> Carry:
        """Computes the hidden states after the final norm.

        Without a cache, rows may be packed: attention is causal within segments. With a
        cache, every row is one segment: keys and values are written to the pages of the
        row, and tokens attend to all positions up to their own.

        Args:
          tokens: [B, T] int32.
          positions: [B, T] int32, counted from 0 within each segment.
          segment_ids: [B, T] int32, 0 for padding; required without a cache.
          kv_cache: page pool with the page table of the B rows, or None.

        Returns:
          Hidden states [B, T, D] in the activation dtype, and the updated cache.
        """
        c = self.config
        if kv_cache is None and segment_ids is None:
            raise ValueError("segment_ids and kv_cache are both None: pass one.")
        x = self.embedding[tokens].astype(c.activation_dtype)
        if c.scale_embeddings:
            x = x * jnp.asarray(c.embed_dim**0.5, x.dtype)
        windowed = jnp.array(c.windowed_layers or (False,) * c.num_layers)
        ropes = jax.tree.map(jnp.array, layer_ropes(c))
        layers = Layer(jnp.arange(c.num_layers), windowed, ropes)
        carry = _constrain(x, "batch", "length", "embed"), kv_cache
        (x, kv_cache), _ = self.layers(carry, layers, positions, segment_ids)
        return _all_lengths(self.final_norm(x)), kv_cache


def kernel_of(config: ModelConfig, params: Params) -> Array:
    """Weights of the head: [V, D] where embeddings are tied, else [D, V]."""
    return params["embedding" if config.tie_embeddings else "output"]


def head_logits(config: ModelConfig, kernel: Array, hidden: Array) -> Array:
    """Hidden states [..., D] -> float32 logits [..., V]."""
    return soft_cap(raw_logits(config, kernel, hidden), config.final_softcap)


def raw_logits(config: ModelConfig, kernel: Array, hidden: Array) -> Array:
    """The logits before their cap."""
    kernel = (kernel.T if config.tie_embeddings else kernel).astype(hidden.dtype)
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random parameters in float32, plain arrays without axis names."""
    return nn.meta.unbox(boxed_params(Transformer(config), key))


def logical_axes(config: ModelConfig) -> Any:
    """PartitionSpecs of logical axes, in a tree like the parameters."""
    return nn.get_partition_spec(boxed_shapes(Transformer(config)))


def boxed_params(model: Transformer, key: Array) -> Any:
    """Random parameters, boxed with their logical axis names."""
    return model.init(key, *[jnp.zeros((1, 2), jnp.int32)] * 3)["params"]


def boxed_shapes(model: Transformer) -> Any:
    """Shapes and dtypes of the parameters, boxed with their logical axis names."""
    return jax.eval_shape(lambda: boxed_params(model, jax.random.key(0)))


def hidden_states(
    model: Transformer,
    params: Params,
    tokens: Array,
    positions: Array,
    segment_ids: Array | None = None,
    kv_cache: PagedCache | None = None,
) -> Carry:
    """`Transformer.__call__` as a pure function of parameters and inputs."""
    return model.apply({"params": params}, tokens, positions, segment_ids, kv_cache)


def logits(model: Transformer, params: Params, hidden: Array) -> Array:
    """Hidden states [..., D] -> float32 logits [..., V]."""
    return head_logits(model.config, kernel_of(model.config, params), hidden)
