"""The attention kernels that ship with JAX, for packed rows.

Both mask by the order of the tokens in a row, which within a segment is the order of the
positions. Padding tokens attend to earlier padding tokens.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec

from rlt_jax.types import Array

Kernel = Callable[..., Array]

# Block sizes in tokens: MaxText's settings under XLA's default memory limits.
TPU_BLOCKS = (1024, 512, 256)  # TPU_TILE where none of these is suitable
TPU_TILE = 128
TPU_KEYS_AT_ONCE = 512  # keys of a block that are computed at once
TPU_BLOCK_BYTES = 512 * 1024  # a kernel has 16 MiB of VMEM on TPU v4 and v5e
GPU_BLOCK = 64  # tokens; keys and values of two blocks fit in shared memory
ROW_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"


class Settings(NamedTuple):
    """Static settings of attention.

    Attributes:
      scale: multiplies the queries.
      softcap: scores become softcap * tanh(score / softcap).
      window: number of tokens that a query attends to in a windowed layer, itself
        included.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


def tpu_takes(query: Array) -> bool:
    """Whether `tpu_attention` supports the dtype and head dimension."""
    H = query.shape[-1]
    supported = 32 <= H <= 256 and H % 16 == 0  # 512 does not fit in VMEM
    return supported and query.dtype in (jnp.bfloat16, jnp.float32)


def gpu_takes(query: Array, settings: Settings) -> bool:
    """Whether `gpu_attention` supports the dtype, the head dimension and the settings."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    plain = settings.softcap is settings.window is None
    return half and plain and query.shape[-1] in (32, 64, 128)


def tpu_attention(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    windowed: Array,
    settings: Settings,
    interpret: bool = False,
) -> Array:
    """Splash attention; see `attention.attention` for shapes.

    With `interpret` the kernel runs, slowly, on any backend.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # not on CPU

    T, N = query.shape[1:3]
    block = tpu_block(T, query.shape[3] * query.dtype.itemsize)
    arrays = (query * settings.scale, key, value)
    q, k, v = (jnp.swapaxes(pad(x, block), 1, 2) for x in arrays)
    ids = pad(segment_ids, block)
    shape = (q.shape[2], q.shape[2])
    at_once = min(block, TPU_KEYS_AT_ONCE)
    whole = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq")
    parts = ("block_kv_compute", "block_kv_dkv_compute", "block_kv_dq")
    sizes = dict.fromkeys(whole, block) | dict.fromkeys(parts, at_once)
    options = {"head_shards": 1, "q_seq_shards": 1, "interpret": interpret}
    options |= {"attn_logits_soft_cap": settings.softcap}

    def attend(mask: splash.Mask) -> Array:
        masks, blocks = splash.MultiHeadMask([mask] * N), splash.BlockSizes(**sizes)
        kernel = splash.make_splash_mha(masks, block_sizes=blocks, **options)
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(ids, ids))

    causal = functools.partial(attend, splash.CausalMask(shape))
    if settings.window is None or settings.window >= T:
        out = causal()
    else:
        mask = splash.LocalMask(shape, (settings.window - 1, 0), 0)
        out = jax.lax.cond(windowed, functools.partial(attend, mask), causal)
    return jnp.swapaxes(out, 1, 2)[:, :T]


def tpu_block(length: int, token_bytes: int) -> int:
    """The largest block that pads a row by at most an eighth, else TPU_TILE."""
    for size in TPU_BLOCKS:
        if size * token_bytes <= TPU_BLOCK_BYTES and -length % size <= length // 8:
            return size
    return TPU_TILE


def gpu_attention(
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array,
    _: Array,
    settings: Settings,
    interpret: bool = False,
) -> Array:
    """Flash attention in Triton; see `attention.attention` for shapes."""
    from jax.experimental.pallas.ops.gpu import attention as kernel  # not on CPU

    T, groups = query.shape[1], query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    q, k, v, ids = (pad(x, GPU_BLOCK) for x in (query, key, value, segment_ids))
    blocks = kernel.BlockSizes(GPU_BLOCK, GPU_BLOCK, 32, 32, 32, 32)
    # A custom_vjp function takes positional arguments only: scale, causal, block sizes,
    # backward pass, warps, stages, grid, interpret.
    options = (settings.scale, True, blocks, "triton", None, 2, None, interpret)
    return kernel.mha(q, k, v, ids, *options)[:, :T]


def on_each_device(kernel: Kernel, query: Array) -> Kernel:
    """Runs the kernel on each device's rows and heads: the compiler cannot shard it.

    Rows are replicated when the mesh does not divide their number.
    """
    axes = _auto_axes()
    rows = tuple(name for name in ROW_AXES if name in axes)
    mesh = jax.sharding.get_abstract_mesh()
    if query.shape[0] % math.prod(mesh.shape[name] for name in rows):
        rows = ()
    array = Spec(rows or None, None, HEAD_AXIS if HEAD_AXIS in axes else None)
    specs = (array, array, array, Spec(rows or None), Spec())
    return split_by_hand(kernel, specs, array)


def split_by_hand(
    program: Kernel, in_specs: tuple, out_specs: Any, axes: set[str] | None = None
) -> Kernel:
    """`jax.shard_map` over mesh axes, by default those in scope that are not manual yet."""
    axes = _auto_axes() if axes is None else axes
    if not axes:
        return program
    options = {"axis_names": axes, "check_vma": False}
    return jax.shard_map(program, in_specs=in_specs, out_specs=out_specs, **options)


def _auto_axes() -> set[str]:
    mesh = jax.sharding.get_abstract_mesh()
    return {name for name in mesh.axis_names if name not in mesh.manual_axes}


def pad(x: Array, block: int) -> Array:
    """Pads axis 1 with zeros, the segment of padding, to a multiple of `block`."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)])
