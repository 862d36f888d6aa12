"""Costs of the attention kernels, which the compiler does not look into."""

import json
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from rlt_jax.costs.hlo import Instruction, Program


class Cost(NamedTuple):
    """What one call of a kernel does.

    Attributes:
      flops: floating-point operations of its matrix products.
      reads: index of an operand that it reads several times -> bytes that it reads.
    """

    flops: float
    reads: dict[int, float]


# Of a splash kernel: matrix products for a pair of blocks (scores, their gradient, and what
# is summed from them), and the arrays that are read again for each pair.
_SPLASH = {
    "fwd": (2, ("key", "value")),
    "dq": (3, ("key", "value")),
    "dkv": (4, ("query", "gradient")),
}
_NAMES = ("query", "key", "value", "gradient")


def cost(line: Instruction, operands: Sequence[Instruction]) -> Cost | None:
    """Costs of a splash attention kernel with a causal mask; None for other instructions.

    Blocks that the mask leaves empty are skipped. A block of queries of a windowed layer
    meets as many blocks of keys as the grid, and so the mask in the operands, has room
    for.
    """
    name = re.match(r"splash_mha_(fwd|dq|dkv)", line.proto.name)
    if line.opcode != "custom-call" or not name:
        return None
    products, again = _SPLASH[name[1]]
    index = {what: i for what, i in zip(_NAMES, _activations(operands))}
    *heads, T, H = operands[index["query"]].arrays[0].shape
    suffix = "" if name[1] == "fwd" else f"_{name[1]}"
    sizes = _block_sizes(line)
    block_q, block_kv = sizes[f"block_q{suffix}"], sizes[f"block_kv{suffix}"]
    mask = operands[1].arrays[0].shape
    width = mask[-2] if name[1] == "dkv" else mask[-1]
    pairs = math.prod(heads) * _pairs(T, block_q, block_kv, width, name[1] == "dkv")
    flops = products * 2 * pairs * block_q * block_kv * H
    tokens = {"key": block_kv, "value": block_kv, "query": block_q, "gradient": block_q}
    reads = {}
    for what in again:
        array = operands[index[what]].arrays[0]
        reads[index[what]] = pairs * tokens[what] * H * array.bits / 8
    return Cost(flops, reads)


def uncounted(program: Program) -> set[str]:
    """Names of the kernels in a program whose costs are not known here."""
    calls = (
        (line, [body.instructions[name] for name in line.operands])
        for body in program.computations.values()
        for line in body.instructions.values()
        if line.proto.custom_call_target == "tpu_custom_call"
    )
    names = (line.proto.name for line, operands in calls if not cost(line, operands))
    return {name.rstrip("0123456789.") for name in names}


def _pairs(T: int, block_q: int, block_kv: int, width: int, by_keys: bool) -> int:
    """Pairs of blocks that a causal mask does not leave empty."""
    if by_keys:
        return sum(
            min(T // block_q - start // block_q, width)
            for start in range(0, T, block_kv)
        )
    ends = range(block_q, T + 1, block_q)
    return sum(min(-(-end // block_kv), width) for end in ends)


def _activations(operands: Sequence[Instruction]) -> list[int]:
    """Indices of the operands in bfloat16 or float32 that are as wide as the query."""
    arrays = [operand.arrays[0] for operand in operands]
    floats = [i for i, x in enumerate(arrays) if x.dtype in ("bf16", "f32")]
    H = arrays[floats[0]].shape[-1]
    T = arrays[floats[0]].shape[-2]
    return [i for i in floats if arrays[i].shape[-2:] == (T, H)]


def _block_sizes(line: Instruction) -> dict[str, int]:
    """Block sizes, which the kernel gives to the profiler."""
    attributes = {entry.key: entry.value for entry in line.proto.attributes.map}
    described = json.loads(attributes["kernel_metadata"])
    return json.loads(described["xprof_metadata"])
