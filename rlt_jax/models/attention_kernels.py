"""The attention kernels that come with JAX, for packed rows.

Both see a row's tokens in order: within a segment, order is position. Tokens of padding
see those of padding before them.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec

Kernel = Callable[..., jax.Array]

# Tokens in a block: the settings of MaxText for the memory limits that XLA starts with.
TPU_BLOCKS = (1024, 512, 256)  # else TPU_TILE
TPU_TILE = 128
TPU_KEYS_AT_ONCE = 512  # of a block
TPU_BLOCK_BYTES = 512 * 1024  # TPU v4 and v5e have 16 MiB for all that a kernel holds
GPU_BLOCK = 64  # tokens; keys and values of two such blocks fit any GPU of today
ROW_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"


def tpu_takes(query: jax.Array) -> bool:
    """Whether `tpu_attention` takes this dtype and head dimension."""
    H = query.shape[-1]
    sized = 32 <= H <= 256 and H % 16 == 0  # 512 is too much for fast memory
    return sized and query.dtype in (jnp.bfloat16, jnp.float32)


def gpu_takes(
    query: jax.Array, softcap: float | None = None, window: int | None = None
) -> bool:
    """Whether `gpu_attention` takes the sizes, and needs neither cap nor window."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return half and softcap is window is None and query.shape[-1] in (32, 64, 128)


def tpu_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    windowed: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention; arguments and result as those of `attention`.

    With `interpret` the kernel runs anywhere, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # not on CPU

    T, N = query.shape[1:3]
    block = tpu_block(T, query.shape[3] * query.dtype.itemsize)
    arrays = (query * scale, key, value)
    q, k, v = (jnp.swapaxes(pad(x, block), 1, 2) for x in arrays)
    ids = pad(segment_ids, block)
    size = q.shape[2]
    at_once = min(block, TPU_KEYS_AT_ONCE)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=at_once,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=at_once,
        block_q_dq=block,
        block_kv_dq=at_once,
    )

    def attend(mask: splash.Mask, *operands: jax.Array) -> jax.Array:
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * N),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        *arrays, ids = operands
        return jax.vmap(kernel)(*arrays, splash.SegmentIds(ids, ids))

    full = functools.partial(attend, splash.CausalMask((size, size)))
    if window is None or window >= T:
        out = full(q, k, v, ids)
    else:
        reach = (window - 1, 0)
        near = functools.partial(attend, splash.LocalMask((size, size), reach, 0))
        out = jax.lax.cond(windowed, near, full, q, k, v, ids)
    return jnp.swapaxes(out, 1, 2)[:, :T]


def tpu_block(length: int, token_bytes: int) -> int:
    """The largest block that makes a row at most an eighth longer, or TPU_TILE."""
    for size in TPU_BLOCKS:
        fits = size * token_bytes <= TPU_BLOCK_BYTES
        if fits and -length % size <= length // 8:
            return size
    return TPU_TILE


def gpu_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    _: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Flash attention in Triton; arguments and result as those of `attention`."""
    from jax.experimental.pallas.ops.gpu import attention as kernel  # not on CPU

    T, groups = query.shape[1], query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    q, k, v, ids = (pad(x, GPU_BLOCK) for x in (query, key, value, segment_ids))
    blocks = kernel.BlockSizes(GPU_BLOCK, GPU_BLOCK, 32, 32, 32, 32)
    # Keywords are not for functions with gradients of their own: causal, blocks, the
    # backward pass, warps, stages, grid, interpret.
    settings = (scale, True, blocks, "triton", None, 2, None, interpret)
    return kernel.mha(q, k, v, ids, *settings)[:, :T]


def on_each_device(kernel: Kernel, query: jax.Array) -> Kernel:
    """The kernel on each device's rows and heads: compilers cannot split it.

    Rows are left whole when the mesh does not divide them.
    """
    split = _split_axes()
    rows = tuple(name for name in ROW_AXES if name in split)
    mesh = jax.sharding.get_abstract_mesh()
    if query.shape[0] % math.prod(mesh.shape[name] for name in rows):
        rows = ()
    heads = HEAD_AXIS if HEAD_AXIS in split else None
    array = Spec(rows or None, None, heads)
    specs = (array, array, array, Spec(rows or None), Spec())
    return split_by_hand(kernel, specs, array)


def split_by_hand(program: Kernel, in_specs: tuple, out_specs: Spec) -> Kernel:
    """The program on each device's part, where compilers cannot split it well."""
    split = _split_axes()
    if not split:
        return program
    return jax.shard_map(
        program,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=split,
        check_vma=False,
    )


def _split_axes() -> set[str]:
    mesh = jax.sharding.get_abstract_mesh()
    return {name for name in mesh.axis_names if name not in mesh.manual_axes}


def pad(x: jax.Array, block: int) -> jax.Array:
    """Rows padded to whole blocks; what is added is padding's segment 0."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)])
