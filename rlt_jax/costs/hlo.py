"""Parser for the HLO text of compiled programs, with trip counts of loops."""

import functools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](?:\{[^}]*S\((\d+)\))?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(?m)^(ENTRY )?%?([\w.\-]+) \(.*\{\s*\n((?:.*\n)*?)\}")
_NAME = re.compile(r"%([\w.\-]+)")
_BRANCHES = ("branch_computations", "true_computation", "false_computation")


class Array(NamedTuple):
    """An array in the result of an instruction.

    Attributes:
      dtype: dtype by its name in XLA, such as "bf16".
      shape: shape on one device.
      space: memory space; 0 is HBM, others are on chip or on the host.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Size in bytes, without padding to tiles."""
        bits = re.search(r"\d+", self.dtype)
        width = int(bits[0]) if bits else 8 * (self.dtype == "pred")
        return math.prod(self.shape) * width // 8


class Instruction(NamedTuple):
    """An HLO instruction, one line of text.

    Attributes:
      name: name, unique in the computation.
      opcode: operation, such as "fusion".
      arrays: arrays in the result, with tuples flattened.
      operands: names of the instructions that compute the operands.
      literal: text in the parentheses after the opcode.
      rest: text after the parentheses, the attributes.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    rest: str

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations in attributes such as `calls`."""
        names = "|".join(attributes)
        values = re.findall(rf"\b(?:{names})=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
        return _NAME.findall(" ".join(values))

    @property
    def bytes(self) -> int:
        """Size of the result in bytes."""
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        """Size of the part of the result in HBM, in bytes."""
        return sum(array.bytes for array in self.arrays if not array.space)


class Computation(NamedTuple):
    """Instructions by name, and the root, which computes the result."""

    instructions: dict[str, Instruction]
    root: Instruction

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that computes an operand."""
        return self.instructions[instruction.operands[index]]


class Program(NamedTuple):
    """Computations by name, name of the entry computation, and number of devices."""

    computations: dict[str, Computation]
    entry: str
    devices: int


@functools.lru_cache(maxsize=2)
def parse(text: str) -> Program:
    """A program from `compiled.as_text()`."""
    computations, entry = {}, ""
    for is_entry, name, body in _COMPUTATION.findall(text):
        lines = [found for line in body.splitlines() if (found := _LINE.match(line))]
        instructions = {line[2]: _instruction(line[2], line[3]) for line in lines}
        roots = [line[2] for line in lines if line[1]] or [lines[-1][2]]
        computations[name] = Computation(instructions, instructions[roots[0]])
        entry = name if is_entry else entry
    head = text.partition("\n")[0]
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", head)
    return Program(computations, entry, math.prod(int(count) for count in counts))


def _instruction(name: str, text: str) -> Instruction:
    """Parses "bf16[8]{0} add(%a, %b), attributes"; the type may be a tuple."""
    end = _closing(text, 0) if text[0] == "(" else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    end = _closing(text, start)
    literal = text[start + 1 : end - 1]
    arrays = tuple(_array(*groups) for groups in _ARRAY.findall(kind))
    operands = tuple(_NAME.findall(literal))
    return Instruction(name, text[:start], arrays, operands, literal, text[end:])


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _array(dtype: str, sizes: str, space: str) -> Array:
    shape = tuple(int(size) for size in sizes.split(",") if size)
    return Array(dtype, shape, int(space or 0))


def fused(program: Program, instruction: Instruction) -> Computation | None:
    """The computation of a fusion or an asynchronous call; None for other instructions."""
    if instruction.opcode not in ("fusion", "async-start", "call-start"):
        return None
    names = instruction.called("calls", "to_apply")
    return program.computations[names[0]] if names else None


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
      program: program from `parse`.
      own: returns the costs of one execution of a computation, with its fusions but
        without its loops, calls and conditionals.
      trips: trip counts of loops whose end depends on data, by the number of such loops
        around the loop; 1 for deeper loops.
    """

    def visit(name: str, depth: int) -> Counter[str]:
        computation = program.computations[name]
        costs = Counter(own(computation))
        for line in computation.instructions.values():
            if line.opcode == "while":
                count = trip_count(program, computation, line)
                body = visit(line.called("body")[0], depth + (count is None))
                if count is None:
                    count = trips[depth] if depth < len(trips) else 1
                costs.update({key: count * cost for key, cost in body.items()})
            elif line.opcode in ("call", "conditional"):
                names = line.called("to_apply", *_BRANCHES)
                branches = [visit(name, depth) for name in names]
                costs.update(functools.reduce(operator.or_, branches))
        return costs

    return dict(visit(program.entry, 0))


def trip_count(program: Program, around: Computation, loop: Instruction) -> int | None:
    """Trip count of a while loop, or None if it depends on data.

    Uses the count that the compiler reports, or a condition `i < constant`, where JAX
    always increments i by one.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = program.computations[loop.called("condition")[0]]
    test = condition.root
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    index = condition.operand(test, 0)
    end = _constant(condition, test.operands[1])
    position = re.search(r"\bindex=(\d+)", index.rest)
    if end is None or index.opcode != "get-tuple-element" or not position:
        return None
    carry, start = around.operand(loop, 0), None
    if carry.opcode == "tuple":
        start = _constant(around, carry.operands[int(position[1])])
    return max(0, end - (start or 0))


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation.operand(instruction, 0)
    return int(instruction.literal) if instruction.opcode == "constant" else None
