"""What a compiled program needs: memory, traffic between and within devices.

All numbers are of one device and one execution. They are read off the program that XLA
made, with every loop counted as often as it turns. `unknown_trips` says how often loops
turn whose end depends on data, see `hlo.total`.
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


class Memory(NamedTuple):
    """Bytes on a device.

    Attributes:
      arguments: inputs, those that are donated too.
      outputs: results, those in place of a donated input too.
      temporaries: what lives only within the program.
      aliased: results that are in place of inputs.
      code: the program.
      peak: arguments + outputs + temporaries - aliased + code. The compiler's own peak
        is no use: on CPU it leaves out temporaries, on TPU it counts on-chip memory.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int
    peak: int


class Traffic(NamedTuple):
    """How often a collective is executed, and the bytes that a device receives."""

    count: float
    bytes: float


# From the bytes of the operand and the devices of a group, as the best algorithms move.
_MOVED = {
    "all-gather": lambda size, n: size * (n - 1),
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}

# Neither read nor write; of asynchronous pairs the start reads and the end writes.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
    *("call", "conditional", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "async-update"),
}


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Memory of a `jax.stages.Compiled`."""
    sizes = compiled.memory_analysis()
    names = ("argument", "output", "temp", "alias", "generated_code")
    values = [getattr(sizes, f"{name}_size_in_bytes") for name in names]
    arguments, outputs, temporaries, aliased, code = values
    peak = arguments + outputs + temporaries - aliased + code
    return Memory(*values, peak)


def collectives(text: str, unknown_trips: Sequence[float]) -> dict[str, Traffic]:
    """Traffic between devices by kind, for the kinds that occur.

    With n devices in a group a device receives (n - 1)/n of what an all-gather makes,
    twice that part of what an all-reduce reduces, that part of what goes into a
    reduce-scatter or an all-to-all, and all of what a collective-permute is given.
    """
    program = hlo.parse(text)
    own = functools.partial(_collectives, program)
    found = Counter(hlo.total(program, own, unknown_trips))
    pairs = {k: Traffic(found[f"{k} count"], found[f"{k} bytes"]) for k in _MOVED}
    return {kind: traffic for kind, traffic in pairs.items() if traffic.count}


def _collectives(program: Program, body: Computation) -> Counter[str]:
    costs, channels = Counter(), set()
    for owner, line in hlo.inside(program, body):
        kind = line.opcode.removesuffix("-start")
        if kind not in _MOVED:
            continue
        # TPUs spread a collective over fusions that compute meanwhile; each of them
        # names it, with its channel.
        channel = re.search(r"channel_id=(\d+)", line.rest)
        if owner is not body and channel:
            if channel[1] in channels:
                continue
            channels.add(channel[1])
        size = sum(owner.instructions[name].bytes for name in line.operands)
        if kind == "all-reduce" and _is_scattered(owner, line):
            kind = "reduce-scatter"
        costs[f"{kind} count"] += 1
        costs[f"{kind} bytes"] += _MOVED[kind](size, _group_size(program, line.rest))
    return costs


def _is_scattered(fusion: Computation, reduce: Instruction) -> bool:
    """Whether a fusion keeps only a slice of an all-reduce, as TPUs reduce-scatter."""
    return any(
        line.opcode == "dynamic-slice" and line.operands[0] == reduce.name
        for line in fusion.instructions.values()
    )


def _group_size(program: Program, attributes: str) -> int:
    """Devices that take part in a collective together."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[([\d,]+)\]", attributes):
        return int(found[1].split(",")[-1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes):
        # The axes of a mesh, or parts of them: 'x' or 'x':(1)2, where 2 is the size.
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return program.devices


def hbm_bytes(text: str, unknown_trips: Sequence[float]) -> float:
    """Bytes from and to main memory, an upper estimate.

    Every instruction outside fusions reads its operands and writes its results, as if
    nothing stayed on the chip but what the compiler placed there. Slices and gathers
    count as the part that they touch, in fusions too. Custom calls, such as Pallas
    kernels, count as if they read every operand once.
    """
    program = hlo.parse(text)

    def own(body: Computation) -> dict[str, float]:
        lines = body.instructions.values()
        return {"bytes": sum(_touched(program, body, line) for line in lines)}

    return hlo.total(program, own, unknown_trips).get("bytes", 0)


def _touched(program: Program, body: Computation, line: Instruction) -> float:
    """Bytes that an instruction reads and writes."""
    if line.opcode in _FREE or '"AllocateBuffer"' in line.rest:
        return 0
    if line.opcode.endswith("-done"):
        return line.hbm_bytes
    indices = range(len(line.operands))
    stored = [index for index in indices if body.operand(line, index).hbm_bytes]
    reads = sum(_read(program, body, line, index) for index in stored)
    if line.opcode.endswith("-start"):
        return reads
    written = zip(line.arrays, _written(program, body, line), strict=True)
    return reads + sum(size for array, size in written if not array.space)


def _read(program: Program, body: Computation, line: Instruction, index: int) -> float:
    """Bytes that an instruction reads of an operand."""
    whole = body.operand(line, index).bytes
    kind = line.opcode.removesuffix("-start")
    if kind == "tuple" or (kind == "dynamic-update-slice" and index == 0):
        return 0
    if kind in ("slice", "dynamic-slice", "gather") and index == 0:
        # What starts a slice makes a tuple of its operands and its result.
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
    """Bytes of an array that the instructions of a fusion read."""
    read = 0.0
    for line in fusion.instructions.values():
        for index, operand in enumerate(line.operands):
            if operand != name:
                continue
            if line.opcode == "bitcast" and line is not fusion.root:
                read += _uses(program, fusion, line.name)
            else:
                read += _read(program, fusion, line, index)
    return read


def _written(program: Program, body: Computation, line: Instruction) -> list[float]:
    """Bytes that an instruction writes of each of its arrays."""
    if line.opcode == "tuple":
        made = [body.instructions[name] for name in line.operands]
        return [size for each in made for size in _written(program, body, each)]
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
