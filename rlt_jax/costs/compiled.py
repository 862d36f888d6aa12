"""Costs of a compiled program: memory, HBM traffic and collectives.

All numbers are per device and execution. They are computed from the HLO text, with every
loop multiplied by its trip count. `unknown_trips` has the trip counts of loops whose end
depends on data, see `hlo.total`.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax

from rlt_jax.costs import hlo
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

# Instructions without memory traffic. Of an asynchronous pair, the start reads and the
# done writes.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
    *("call", "conditional", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "async-update"),
}


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


def collectives(text: str, unknown_trips: Sequence[float]) -> dict[str, Traffic]:
    """Traffic of the collectives in a program, by kind.

    In a group of n devices, a device receives (n - 1)/n of the output of an all-gather,
    twice that fraction of the operand of an all-reduce, that fraction of the operand of a
    reduce-scatter or an all-to-all, and the whole operand of a collective-permute.
    """
    program = hlo.parse(text)
    own = functools.partial(_collectives, program)
    found = Counter(hlo.total(program, own, unknown_trips))
    pairs = {k: Traffic(found[f"{k} count"], found[f"{k} bytes"]) for k in _RECEIVED}
    return {kind: traffic for kind, traffic in pairs.items() if traffic.count}


def _collectives(program: Program, body: Computation) -> Counter[str]:
    costs, channels = Counter(), set()
    for owner, line in hlo.inside(program, body):
        kind = line.opcode.removesuffix("-start")
        if kind not in _RECEIVED:
            continue
        # On TPU, several fusions can contain the same collective, to overlap it with
        # compute; they share its channel.
        channel = re.search(r"channel_id=(\d+)", line.rest)
        if owner is not body and channel:
            if channel[1] in channels:
                continue
            channels.add(channel[1])
        size = sum(owner.instructions[name].bytes for name in line.operands)
        if kind == "all-reduce" and _is_scattered(owner, line):
            kind = "reduce-scatter"
        costs[f"{kind} count"] += 1
        costs[f"{kind} bytes"] += _RECEIVED[kind](size, _group_size(program, line.rest))
    return costs


def _is_scattered(fusion: Computation, reduce: Instruction) -> bool:
    """Whether a fusion uses only a slice of an all-reduce, a reduce-scatter on TPU."""
    lines = fusion.instructions.values()
    return reduce.name in [x.operands[0] for x in lines if x.opcode == "dynamic-slice"]


def _group_size(program: Program, attributes: str) -> int:
    """Number of devices in a group of a collective."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[([\d,]+)\]", attributes):
        return int(match[1].split(",")[-1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes):
        # Mesh axes 'x', or parts of axes 'x':(1)2, where 2 is the size of the part.
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return program.devices


def hbm_bytes(text: str, unknown_trips: Sequence[float]) -> float:
    """HBM traffic in bytes, an upper estimate.

    Every instruction outside fusions reads its operands from HBM and writes its results
    to HBM, except for buffers that the compiler placed in on-chip memory. Slices and
    gathers count as the bytes that they access, also in fusions. Custom calls, such as
    Pallas kernels, read every operand once.
    """
    program = hlo.parse(text)

    def own(body: Computation) -> dict[str, float]:
        lines = body.instructions.values()
        return {"bytes": sum(_accessed(program, body, line) for line in lines)}

    return hlo.total(program, own, unknown_trips).get("bytes", 0)


def _accessed(program: Program, body: Computation, line: Instruction) -> float:
    """HBM bytes that an instruction reads and writes."""
    if line.opcode in _FREE or '"AllocateBuffer"' in line.rest:
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
        name = next(x.name for x in parameters if x.literal == str(index))
        return min(whole, _uses(program, inner, name))
    return whole


def _uses(program: Program, fusion: Computation, name: str) -> float:
    """Bytes of an array that the instructions of a fusion read, by its name."""
    read = 0.0
    for line in fusion.instructions.values():
        uses = [i for i, operand in enumerate(line.operands) if operand == name]
        if uses and line.opcode == "bitcast" and line is not fusion.root:
            read += _uses(program, fusion, line.name)
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
