"""Costs of a compiled program: memory, flops, HBM traffic and collectives.

All numbers are per device and execution, with every loop multiplied by its trip count.
`unknown_trips` has the trip counts of loops whose end depends on data, see `hlo.total`.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlt_jax.costs import hlo, kernels
from rlt_jax.costs.hlo import Computation, Instruction, Program


class Traffic(NamedTuple):
    """Number of executions of a collective, and bytes received per device."""

    count: float
    bytes: float


# Received bytes from the operand size and the group size, for bandwidth-optimal algorithms.
_RECEIVED = {
    "all-gather": lambda size, n: size * (n - 1),
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}

BETWEEN_SLICES = "between-slices"

# Instructions without memory traffic. Of an asynchronous pair, the start reads and the
# done writes.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
    *("call", "conditional", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "async-update"),
}
_FREE_CALLS = {"AllocateBuffer", "AsyncCollectiveStart", "ConcatBitcast"}


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Memory of a program in bytes per device.

    Returns:
      Sizes of the `arguments`, donated ones included; of the `outputs`, those that reuse
      donated arguments included; of the `temporaries`; of the outputs that reuse the memory
      of donated arguments, `aliased`; of the executable, `code`; and `peak`, arguments +
      outputs + temporaries - aliased + code. The peak that XLA reports is not comparable: on
      CPU it excludes temporaries, on TPU it includes on-chip memory.
    """
    sizes = compiled.memory_analysis()
    names = ("argument", "output", "temp", "alias", "generated_code")
    values = [getattr(sizes, f"{name}_size_in_bytes") for name in names]
    ours = ("arguments", "outputs", "temporaries", "aliased", "code", "peak")
    return dict(zip(ours, [*values, sum(values) - 2 * values[3]], strict=True))


def flops(program: Program, unknown_trips: Sequence[float]) -> float:
    """Floating-point operations that a program executes: products and known kernels.

    A product of [m, k] and [k, n] is 2mkn operations. Masked scores count where a kernel
    or a product computes them.
    """

    def own(body: Computation) -> dict[str, float]:
        return {"flops": sum(_flops(*found) for found in hlo.inside(program, body))}

    return hlo.total(program, own, unknown_trips)["flops"]


def _flops(body: Computation, line: Instruction) -> float:
    if cost := kernels.cost(line, _operands(body, line)):
        return cost.flops
    if line.opcode not in ("dot", "convolution"):
        return 0
    left, right = (array.shape for x in _operands(body, line)[:2] for array in x.arrays)
    out = line.arrays[0].shape
    if line.opcode == "dot":
        axes = line.proto.dot.lhs_contracting
        return 2 * math.prod(out) * math.prod(left[axis] for axis in axes)
    numbers = line.proto.convolution
    spatial = zip(
        line.proto.window.dimensions,
        (left[axis] for axis in numbers.input_spatial),
        (out[axis] for axis in numbers.output_spatial),
        strict=True,
    )
    outer = math.prod(out) // math.prod(out[axis] for axis in numbers.output_spatial)
    meetings = math.prod(_meetings(*one) for one in spatial)
    return 2 * outer * right[numbers.kernel_input_feature] * meetings


def _meetings(window: Any, size: int, out: int) -> int:
    """Pairs of an output and a window position that meet an input, along one axis."""
    dilation, hole = window.base_dilation, window.window_dilation
    starts = np.arange(out)[:, None] * window.stride - window.padding_low
    at = starts + np.arange(window.size) * hole
    return int(((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)).sum())


def _operands(body: Computation, line: Instruction) -> list[Instruction]:
    return [body.instructions[name] for name in line.operands]


def collectives(program: Program, unknown_trips: Sequence[float]) -> dict[str, Traffic]:
    """Traffic of the collectives in a program, by kind.

    In a group of n devices, a device receives (n - 1)/n of the output of an all-gather,
    twice that fraction of the operand of an all-reduce, that fraction of the operand of a
    reduce-scatter or an all-to-all, and the whole operand of a collective-permute.
    `BETWEEN_SLICES` is what a device receives from other slices of TPUs, over the network
    of the data center; collectives over several slices are compiled into one part inside
    the slices and that one.
    """
    own = functools.partial(_collectives, program)
    found = Counter(hlo.total(program, own, unknown_trips))
    kinds = (*_RECEIVED, BETWEEN_SLICES)
    pairs = {k: Traffic(found[f"{k} count"], found[f"{k} bytes"]) for k in kinds}
    return {kind: traffic for kind, traffic in pairs.items() if traffic.count}


def _collectives(program: Program, body: Computation) -> Counter[str]:
    costs, channels = Counter(), set()

    def add(kind: str, size: float) -> None:
        costs[f"{kind} count"] += 1
        costs[f"{kind} bytes"] += size

    for owner, line in hlo.inside(program, body):
        if line.opcode == "recv" and _is_between_slices(line):
            add(BETWEEN_SLICES, line.arrays[0].bytes)
        kind = line.opcode.removesuffix("-start")
        if kind not in _RECEIVED:
            continue
        # On TPU, several fusions can contain the same collective, to overlap it with
        # compute; they share its channel.
        channel = line.proto.channel_id
        if owner is not body and channel:
            if channel in channels:
                continue
            channels.add(channel)
        size = sum(operand.bytes for operand in _operands(owner, line))
        if kind == "all-reduce" and _is_scattered(owner, line):
            kind = "reduce-scatter"
        add(kind, _RECEIVED[kind](size, hlo.group_size(line)))
    return costs


def _is_between_slices(line: Instruction) -> bool:
    """Whether a host transfer is one of Megascale, which connects slices."""
    return any("megascale" in entry.value for entry in line.proto.attributes.map)


def _is_scattered(fusion: Computation, reduce: Instruction) -> bool:
    """Whether a fusion uses only a slice of an all-reduce, a reduce-scatter on TPU."""
    lines = fusion.instructions.values()
    name = reduce.proto.id
    return name in [x.operands[0] for x in lines if x.opcode == "dynamic-slice"]


def hbm_bytes(program: Program, unknown_trips: Sequence[float]) -> float:
    """HBM traffic in bytes, an upper estimate.

    Every instruction outside fusions reads its operands from HBM and writes its results
    to HBM, except for buffers that the compiler placed in on-chip memory. Slices and
    gathers count as the bytes that they access, also in fusions. A kernel of attention
    reads keys and values again for every block of queries; other kernels read every
    operand once.
    """

    def own(body: Computation) -> dict[str, float]:
        lines = body.instructions.values()
        return {"bytes": sum(_accessed(program, body, line) for line in lines)}

    return hlo.total(program, own, unknown_trips).get("bytes", 0)


def _accessed(program: Program, body: Computation, line: Instruction) -> float:
    """HBM bytes that an instruction reads and writes."""
    if line.opcode in _FREE or line.proto.custom_call_target in _FREE_CALLS:
        return 0
    if line.opcode.endswith("-done"):
        return line.hbm_bytes
    indices = range(len(line.operands))
    stored = [index for index in indices if body.operand(line, index).hbm_bytes]
    reads = sum(_read(program, body, line, index) for index in stored)
    if line.opcode.endswith("-start"):
        return reads
    writes = zip(line.arrays, _written(program, body, line), strict=True)
    return reads + sum(size for array, size in writes if not array.space)


def _read(program: Program, body: Computation, line: Instruction, index: int) -> float:
    """Bytes of an operand that an instruction reads."""
    whole = body.operand(line, index).bytes
    if cost := kernels.cost(line, _operands(body, line)):
        return cost.reads.get(index, whole)
    kind = line.opcode.removesuffix("-start")
    if kind == "tuple" or (kind == "dynamic-update-slice" and index == 0):
        return 0
    if kind in ("slice", "dynamic-slice", "gather") and index == 0:
        # The result of an asynchronous start is a tuple of operands and result.
        result = 0 if kind == line.opcode else len(line.operands)
        return min(whole, line.arrays[result].bytes)
    if kind == "scatter" and index < len(line.operands) // 2:
        return body.operand(line, -1).bytes
    if inner := hlo.fused(program, line):
        parameters = (x for x in inner.instructions.values() if x.opcode == "parameter")
        found = next(x for x in parameters if x.proto.parameter_number == index)
        return min(whole, _uses(program, inner, found.proto.id))
    return whole


def _uses(program: Program, fusion: Computation, name: int) -> float:
    """Bytes of an array that the instructions of a fusion read, by its id."""
    read = 0.0
    for line in fusion.instructions.values():
        uses = [i for i, operand in enumerate(line.operands) if operand == name]
        if uses and line.opcode == "bitcast" and line is not fusion.root:
            read += _uses(program, fusion, line.proto.id)
        else:
            read += sum(_read(program, fusion, line, index) for index in uses)
    return read


def _written(program: Program, body: Computation, line: Instruction) -> list[float]:
    """Bytes that an instruction writes to each of its arrays."""
    if line.opcode == "tuple":
        parts = [body.instructions[name] for name in line.operands]
        return [size for part in parts for size in _written(program, body, part)]
    if line.opcode == "bitcast":
        return _written(program, body, body.operand(line, 0))
    if line.opcode == "parameter":
        return [0.0] * len(line.arrays)
    if line.opcode == "dynamic-update-slice":
        return [body.operand(line, 1).bytes]
    if line.opcode == "scatter":
        updates = len(line.operands) // 2 + 1
        return [body.instructions[name].bytes for name in line.operands[updates:]]
    if inner := hlo.fused(program, line):
        return _written(program, inner, inner.root)
    return [array.bytes for array in line.arrays]
