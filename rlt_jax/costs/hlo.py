"""Compiled programs as the compiler describes them, with trip counts of loops."""

import functools
import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from rlt_jax.costs.hlo_proto import Module

# Bits of an element by its number in XLA's PrimitiveType; types without bits are tokens,
# tuples and opaque values.
_BITS = {1: 8, 2: 8, 3: 16, 4: 32, 5: 64, 6: 8, 7: 16, 8: 32, 9: 64, 10: 16, 11: 32}
_BITS |= {12: 64, 15: 64, 16: 16, 18: 128, 19: 8, 20: 8, 21: 4, 22: 4, 23: 8, 24: 8}
_BITS |= {25: 8, 26: 2, 27: 2, 28: 8, 29: 8, 30: 1, 31: 1, 32: 4, 33: 8}
_DTYPES = {1: "pred", 4: "s32", 11: "f32", 16: "bf16"}
_TUPLE = 13
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "opt-barrier")


class Array(NamedTuple):
    """An array in the result of an instruction.

    Attributes:
      dtype: dtype by its name in XLA, such as "bf16"; its number for rare ones.
      bits: bits of an element.
      shape: shape on one device.
      space: memory space; 0 is HBM, others are on chip or on the host.
    """

    dtype: str
    bits: int
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Size in bytes, without padding to tiles."""
        return math.prod(self.shape) * self.bits // 8


class Instruction(NamedTuple):
    """An HLO instruction.

    Attributes:
      opcode: operation, such as "fusion".
      arrays: arrays in the result, with tuples flattened.
      operands: ids of the instructions that compute the operands.
      called: ids of the computations that it calls; of a loop the body, the condition.
      proto: all that the compiler says, see `hlo_proto`.
    """

    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[int, ...]
    called: tuple[int, ...]
    proto: Any

    @property
    def bytes(self) -> int:
        """Size of the result in bytes."""
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        """Size of the part of the result in HBM, in bytes."""
        return sum(array.bytes for array in self.arrays if not array.space)


class Computation(NamedTuple):
    """Instructions by id, and the root, which computes the result."""

    instructions: dict[int, Instruction]
    root: Instruction

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that computes an operand."""
        return self.instructions[instruction.operands[index]]


class Program(NamedTuple):
    """Computations by id, and the id of the entry computation."""

    computations: dict[int, Computation]
    entry: int


def read(compiled: jax.stages.Compiled) -> Program:
    """The program of one device."""
    (module,) = compiled.runtime_executable().hlo_modules()
    return parse(module.as_serialized_hlo_module_proto())


def parse(module: bytes) -> Program:
    """A program from a serialized `HloModuleProto`."""
    made, computations = Module.FromString(module), {}
    for one in made.computations:
        lines = {line.id: _instruction(line) for line in one.instructions}
        computations[one.id] = Computation(lines, lines[one.root_id])
    return Program(computations, made.entry)


def _instruction(proto: Any) -> Instruction:
    operands, called = tuple(proto.operand_ids), tuple(proto.called_computation_ids)
    return Instruction(proto.opcode, _arrays(proto.shape), operands, called, proto)


def _arrays(shape: Any) -> tuple[Array, ...]:
    kind = shape.element_type
    if kind == _TUPLE:
        return tuple(array for part in shape.tuple_shapes for array in _arrays(part))
    dtype, space = _DTYPES.get(kind, str(kind)), shape.layout.memory_space
    return (Array(dtype, _BITS.get(kind, 0), tuple(shape.dimensions), space),)


def fused(program: Program, instruction: Instruction) -> Computation | None:
    """The computation of a fusion or an asynchronous call; None for other instructions."""
    if instruction.opcode not in ("fusion", "async-start", "call-start"):
        return None
    return program.computations[instruction.called[0]] if instruction.called else None


def inside(
    program: Program, computation: Computation
) -> Iterator[tuple[Computation, Instruction]]:
    """Yields instructions with their computations, including those in fusions."""
    for instruction in computation.instructions.values():
        yield computation, instruction
        if inner := fused(program, instruction):
            yield from inside(program, inner)


def total(
    program: Program,
    own: Callable[[Computation], dict[str, float]],
    trips: Sequence[float],
) -> dict[str, float]:
    """Sums costs over all computations, multiplied by their numbers of executions.

    A conditional costs as much as its most expensive branch.

    Args:
      program: program from `read`.
      own: returns the costs of one execution of a computation, with its fusions but
        without its loops, calls and conditionals.
      trips: trip counts of loops whose end depends on data, by the number of such loops
        around the loop; 1 for deeper loops.
    """

    def visit(computation: Computation, values: tuple, depth: int) -> Counter[str]:
        costs = Counter(own(computation))
        for line in computation.instructions.values():
            if line.opcode == "while":
                count, inner = loop(program, computation, line, values)
                body = program.computations[line.called[0]]
                costs_inside = visit(body, (inner,), depth + (count is None))
                if count is None:
                    count = trips[depth] if depth < len(trips) else 1
                costs.update({key: count * x for key, x in costs_inside.items()})
            elif line.opcode in ("call", "conditional"):
                branches = []
                for index, called in enumerate(line.called):
                    part = line.operands if line.opcode == "call" else ()
                    part = part or line.operands[index + 1 : index + 2]
                    given = [_value(program, computation, x, values) for x in part]
                    inner = program.computations[called]
                    branches.append(visit(inner, tuple(given), depth))
                costs.update(functools.reduce(operator.or_, branches))
        return costs

    return dict(visit(program.computations[program.entry], (), 0))


class _Carried(NamedTuple):
    """The element of a loop's carry at `index`, plus a constant."""

    index: int
    plus: int = 0


class _Compared(NamedTuple):
    left: Any
    right: Any
    direction: str


def loop(
    program: Program, around: Computation, line: Instruction, values: tuple
) -> tuple[int | None, tuple]:
    """Trip count of a while loop, and what its body is given.

    Args:
      program: the program.
      around: the computation with the loop.
      line: the loop.
      values: what is known of the arguments of that computation.

    Returns:
      The count that the compiler reports, or that follows from the condition; None if it
      depends on data. Of the elements of the carry the integers that no iteration
      changes; None for the others.
    """
    body, condition = (program.computations[called] for called in line.called)
    size = len(line.proto.shape.tuple_shapes)
    carry = tuple(_Carried(index) for index in range(size))
    start = _value(program, around, line.operands[0], values) or (None,) * size
    after = _value(program, body, body.root.proto.id, (carry,)) or (None,) * size
    kept = tuple(start[i] if after[i] == carry[i] else None for i in range(size))
    config = line.proto.backend_config
    known = json.loads(config).get("known_trip_count") if config else None
    if known:
        return int(known["n"]), kept
    given = tuple(carry[i] if kept[i] is None else kept[i] for i in range(size))
    test = _value(program, condition, condition.root.proto.id, (given,))
    return _count(test, start, after), kept


def _count(test: Any, start: Sequence[Any], after: Sequence[Any]) -> int | None:
    """Iterations until `test` fails, for an index that changes by a constant."""
    if not isinstance(test, _Compared) or not isinstance(test.left, _Carried):
        return None
    index, plus = test.left
    first, end, last = start[index], test.right, after[index]
    if not isinstance(last, _Carried) or last.index != index or last.plus == 0:
        return None
    if not (isinstance(first, int) and isinstance(end, int)):
        return None
    sign = {"L": 1, "G": -1}.get(test.direction[0], 0)
    if sign * last.plus <= 0:
        return None
    end += sign * (test.direction[1] == "E")
    return max(0, math.ceil((end - first - plus) / last.plus))


def _value(program: Program, body: Computation, name: int, values: tuple) -> Any:
    """What is known of a result: an integer, a tuple, a part of a carry; None if nothing."""
    line = body.instructions[name]

    def operand(index: int) -> Any:
        return _value(program, body, line.operands[index], values)

    match line.opcode:
        case "parameter":
            number = line.proto.parameter_number
            return values[number] if number < len(values) else None
        case "constant":
            literal = line.proto.literal
            found = [*literal.s32s, *literal.s64s, *literal.u32s, *literal.u64s]
            return found[0] if len(found) == 1 else None
        case "tuple":
            return tuple(operand(index) for index in range(len(line.operands)))
        case "get-tuple-element":
            whole = operand(0)
            return whole[line.proto.tuple_index] if isinstance(whole, tuple) else None
        case "add" | "subtract":
            sign = 1 if line.opcode == "add" else -1
            return _sum(operand(0), operand(1), sign)
        case "compare":
            return _Compared(operand(0), operand(1), line.proto.comparison_direction)
        case "fusion":
            inner = program.computations[line.called[0]]
            given = tuple(operand(index) for index in range(len(line.operands)))
            return _value(program, inner, inner.root.proto.id, given)
        case same if same in _SAME:
            return operand(0)
    return None


def _sum(left: Any, right: Any, sign: int) -> Any:
    if isinstance(left, int) and isinstance(right, _Carried) and sign == 1:
        left, right = right, left
    if not isinstance(right, int):
        return None
    if isinstance(left, int):
        return left + sign * right
    if isinstance(left, _Carried):
        return left._replace(plus=left.plus + sign * right)
    return None


def group_size(line: Instruction) -> int:
    """Number of devices in a group that a collective connects.

    Raises:
      ValueError: the compiler describes the groups in an unknown form.
    """
    proto = line.proto
    if proto.pairs:
        return 2
    if listed := proto.device_list.groups or proto.replica_groups:
        return len(listed[0].ids)
    if proto.device_list.HasField("iota"):
        return proto.device_list.iota.devices
    if not proto.HasField("device_mesh"):
        raise ValueError(f"{proto.name}: unknown form of replica groups")
    # Axes of a mesh, or parts of axes.
    sizes = [axis.size for axis in proto.device_mesh.mesh.axes]
    axes = proto.device_mesh.axes
    return math.prod(axis.part.size or sizes[axis.index] for axis in axes)
