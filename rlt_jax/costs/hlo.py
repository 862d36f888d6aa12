"""Text of a compiled XLA program: computations, instructions, and how often they run."""

import functools
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(
    r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*\n((?:.*\n)*?)\}", re.MULTILINE
)
_NAME = re.compile(r"%([\w.\-]+)")
_BRANCHES = ("branch_computations", "true_computation", "false_computation")


class Array(NamedTuple):
    """One array that an instruction makes.

    Attributes:
      dtype: XLA's name, "bf16".
      shape: sizes on one device.
      space: 0 for the device's main memory; TPUs have others, on chip and on the host.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Size without the padding of tiles."""
        bits = re.search(r"\d+", self.dtype)
        width = int(bits[0]) if bits else 8 * (self.dtype == "pred")
        return math.prod(self.shape) * width // 8

    @property
    def hbm_bytes(self) -> int:
        """The same, but 0 for what is not in main memory."""
        return 0 if self.space else self.bytes


class Instruction(NamedTuple):
    """One line.

    Attributes:
      name: unique in its computation.
      opcode: "fusion".
      arrays: what it makes, tuples flattened.
      operands: names of instructions.
      literal: what is in the parentheses.
      rest: the attributes, as text.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    rest: str

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations of attributes such as `calls`."""
        names = "|".join(attributes)
        found = re.findall(rf"\b(?:{names})=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
        return _NAME.findall(" ".join(found))

    @property
    def bytes(self) -> int:
        """Of all arrays it makes."""
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        """Of those in main memory."""
        return sum(array.hbm_bytes for array in self.arrays)


class Computation(NamedTuple):
    """Instructions by name, and the one whose value is the result."""

    instructions: dict[str, Instruction]
    root: Instruction

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that makes an operand."""
        return self.instructions[instruction.operands[index]]


class Program(NamedTuple):
    """Computations by name, the name of the entry, and the number of devices."""

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
    """From "bf16[8]{0} add(%a, %b), attributes"; the type may be a tuple of types."""
    end = _closing(text, 0) if text[0] == "(" else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    end = _closing(text, start)
    literal = text[start + 1 : end - 1]
    arrays = tuple(_array(*found) for found in _ARRAY.findall(kind))
    operands = tuple(_NAME.findall(literal))
    return Instruction(name, text[:start], arrays, operands, literal, text[end:])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` has been closed."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _array(dtype: str, sizes: str, layout: str) -> Array:
    space = re.search(r"S\((\d+)\)", layout)
    shape = tuple(int(size) for size in sizes.split(",") if size)
    return Array(dtype, shape, int(space[1]) if space else 0)


def fused(program: Program, instruction: Instruction) -> Computation | None:
    """The computation of a fusion, or of what runs asynchronously."""
    if instruction.opcode not in ("fusion", "async-start", "call-start"):
        return None
    names = instruction.called("calls", "to_apply")
    return program.computations[names[0]] if names else None


def inside(
    program: Program, computation: Computation
) -> Iterator[tuple[Computation, Instruction]]:
    """Instructions of a computation and of the fusions in it, with where they are."""
    for instruction in computation.instructions.values():
        yield computation, instruction
        if inner := fused(program, instruction):
            yield from inside(program, inner)


def total(
    program: Program,
    own: Callable[[Computation], dict[str, float]],
    trips: Sequence[float],
) -> dict[str, float]:
    """Sum of `own` over computations, each as often as it runs.

    `own` looks into fusions itself. Of a conditional the most of any branch counts.

    Args:
      program: from `parse`.
      own: costs of one execution of a computation without loops, calls and branches.
      trips: iterations of loops whose end depends on data, by how many such loops are
        around a loop; 1 where there is none.
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
            elif line.opcode == "call":
                costs.update(visit(line.called("to_apply")[0], depth))
            elif line.opcode == "conditional":
                branches = [visit(name, depth) for name in line.called(*_BRANCHES)]
                costs.update(functools.reduce(operator.or_, branches))
        return costs

    return dict(visit(program.entry, 0))


def trip_count(program: Program, around: Computation, loop: Instruction) -> int | None:
    """Iterations of a while loop, or None if they depend on data.

    From what the compiler noted, else from a condition `i < constant`, where i goes up
    by one, as in every loop of JAX that has a condition of this form.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(noted[1])
    condition = program.computations[loop.called("condition")[0]]
    test = condition.root
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    index = condition.operand(test, 0)
    end = _constant(condition, test.operands[1])
    found = re.search(r"\bindex=(\d+)", index.rest)
    if end is None or index.opcode != "get-tuple-element" or not found:
        return None
    carry, start = around.operand(loop, 0), None
    if carry.opcode == "tuple":
        start = _constant(around, carry.operands[int(found[1])])
    return max(0, end - (start or 0))


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation.operand(instruction, 0)
    if instruction.opcode != "constant":
        return None
    return int(instruction.literal)
