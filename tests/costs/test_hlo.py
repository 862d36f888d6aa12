"""Programs made by hand, in the forms that libtpu uses, and what they cost."""

from typing import Any

import pytest

from rlt_jax.costs import hlo
from rlt_jax.costs.compiled import (
    BETWEEN_SLICES,
    Traffic,
    collectives,
    flops,
    hbm_bytes,
)
from rlt_jax.costs.hlo_proto import Module

TYPES = {"s32": 4, "f32": 11, "bf16": 16, "u32": 8, "s8": 2, "pred": 1}
ON_CHIP = 1
SPLASH = '{"block_q": 512, "block_kv": 512, "block_q_dkv": 512, "block_kv_dkv": 512, "block_q_dq": 512, "block_kv_dq": 256}'


class Builder:
    """Adds computations and instructions to a module; both are named by numbers."""

    def __init__(self) -> None:
        self.module = Module()

    def computation(self) -> int:
        number = len(self.module.computations) + 1
        self.module.computations.add(name=f"c{number}", id=number)
        return number

    def line(
        self,
        to: int,
        opcode: str,
        shape: Any,
        *operands: int,
        space: int = 0,
        **fields: Any,
    ) -> int:
        """Adds an instruction, the root until another follows; returns its id.

        A shape is ("f32", 2, 3), or a list of shapes.
        """
        computation = self.module.computations[to - 1]
        number = 1000 * to + len(computation.instructions)
        added = computation.instructions.add(
            name=fields.pop("name", f"i{number}"),
            opcode=opcode,
            id=number,
            operand_ids=operands,
            called_computation_ids=fields.pop("calls", ()),
        )
        fill(added.shape, shape, space)
        for field, value in fields.items():
            if isinstance(value, dict | list):
                fill_message(added, field, value)
            else:
                setattr(added, field, value)
        computation.root_id = number
        return number

    def program(self, entry: int) -> hlo.Program:
        self.module.entry = entry
        return hlo.parse(self.module.SerializeToString())


def fill(target: Any, shape: Any, space: int) -> None:
    if isinstance(shape, list):
        target.element_type = 13
        for part in shape:
            fill(target.tuple_shapes.add(), part, space)
    else:
        target.element_type = TYPES[shape[0]]
        target.dimensions.extend(shape[1:])
        target.layout.memory_space = space


def fill_message(parent: Any, field: str, value: Any) -> None:
    """Sets a message field from dictionaries and lists of them."""
    target = getattr(parent, field)
    if isinstance(value, list):
        for one in value:
            if isinstance(one, dict):
                added = target.add()
                for key, inner in one.items():
                    set_or_fill(added, key, inner)
            else:
                target.append(one)
    else:
        target.SetInParent()
        for key, inner in value.items():
            set_or_fill(target, key, inner)


def set_or_fill(target: Any, key: str, value: Any) -> None:
    if isinstance(value, dict | list):
        fill_message(target, key, value)
    else:
        setattr(target, key, value)


def mesh_groups(sizes: list[int], axes: list[dict[str, Any]]) -> dict[str, Any]:
    return {"mesh": {"axes": [{"size": size} for size in sizes]}, "axes": axes}


def counted(
    made: Builder, start: int, end: int, step: int, direction: str
) -> hlo.Program:
    """A loop over an index, whose body has a product of 2 * 4 * 4 * 4 operations."""
    body, test, entry = made.computation(), made.computation(), made.computation()
    carry = [("s32",), ("s32",), ("f32", 4, 4)]
    value = made.line(body, "parameter", carry)
    index = made.line(body, "get-tuple-element", ("s32",), value, tuple_index=0)
    last = made.line(body, "get-tuple-element", ("s32",), value, tuple_index=1)
    x = made.line(body, "get-tuple-element", carry[2], value, tuple_index=2)
    by = made.line(body, "constant", ("s32",), literal={"s32s": [step]})
    after = made.line(body, "add", ("s32",), index, by)
    made.line(body, "dot", carry[2], x, x, dot={"lhs_contracting": [1]})
    product = made.module.computations[body - 1].root_id
    made.line(body, "tuple", carry, after, last, product)
    value = made.line(test, "parameter", carry)
    index = made.line(test, "get-tuple-element", ("s32",), value, tuple_index=0)
    last = made.line(test, "get-tuple-element", ("s32",), value, tuple_index=1)
    made.line(test, "compare", ("pred",), index, last, comparison_direction=direction)
    first = made.line(entry, "constant", ("s32",), literal={"s32s": [start]})
    last = made.line(entry, "constant", ("s32",), literal={"s32s": [end]})
    x = made.line(entry, "parameter", carry[2])
    value = made.line(entry, "tuple", carry, first, last, x)
    made.line(entry, "while", carry, value, calls=(body, test))
    return made.program(entry)


@pytest.mark.parametrize(
    ("start", "end", "step", "direction", "count"),
    [
        (0, 6, 1, "LT", 6),
        (0, 6, 2, "LT", 3),  # a loop that the compiler has unrolled once
        (0, 7, 2, "LT", 4),
        (1, 6, 1, "LE", 6),
        (5, 0, -1, "GT", 5),
        (5, 0, -1, "GE", 6),
        (6, 6, 1, "LT", 0),
        (0, 6, 1, "NE", None),
        (0, 6, -1, "LT", None),
    ],
)
def test_trip_counts(
    start: int, end: int, step: int, direction: str, count: int | None
) -> None:
    program = counted(Builder(), start, end, step, direction)
    expected = 7 if count is None else count  # said to turn seven times
    assert flops(program, (7,)) == 2 * 4 * 4 * 4 * expected


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"device_list": {"groups": [{"ids": [0, 2, 4]}, {"ids": [1, 3, 5]}]}}, 3),
        ({"replica_groups": [{"ids": [0, 1]}]}, 2),
        ({"device_list": {"iota": {"devices": 4}}}, 4),
        ({"device_mesh": mesh_groups([2, 4], [{"index": 0}])}, 2),
        ({"device_mesh": mesh_groups([2, 4], [{"index": 0}, {"index": 1}])}, 8),
        ({"device_mesh": mesh_groups([2, 4], [{"index": 1, "part": {"size": 2}}])}, 2),
    ],
)
def test_groups_of_collectives(fields: dict[str, Any], size: int) -> None:
    made = Builder()
    entry = made.computation()
    x = made.line(entry, "parameter", ("f32", 128))
    made.line(entry, "all-gather", ("f32", 128 * size), x, **fields)
    received = Traffic(1, 128 * 4 * (size - 1))
    assert collectives(made.program(entry), ()) == {"all-gather": received}


def test_traffic_between_slices() -> None:
    made = Builder()
    entry = made.computation()
    runtime = {
        "key": "_xla_host_transfer_handler_name",
        "value": "xla_megascale_runtime",
    }
    shape = [("bf16", 32, 8), ("u32",)]
    made.line(entry, "recv", shape, attributes={"map": [runtime]})
    made.line(entry, "recv", shape)  # from the host
    assert collectives(made.program(entry), ()) == {BETWEEN_SLICES: Traffic(1, 512)}


def test_unknown_groups_are_an_error() -> None:
    made = Builder()
    entry = made.computation()
    made.line(entry, "all-reduce", ("f32", 4))
    with pytest.raises(ValueError, match="unknown form of replica groups"):
        collectives(made.program(entry), ())


def test_fusions_with_collectives() -> None:
    """An all-gather spread over two fusions, an asynchronous one, a reduce-scatter."""
    made = Builder()
    half, whole = ("bf16", 128, 64), ("bf16", 512, 64)
    gathers = []
    for channel in (7, 7, 9):
        body = made.computation()
        part = made.line(body, "parameter", half)
        groups = mesh_groups([2, 4], [{"index": 1}])
        made.line(
            body, "all-gather", whole, part, channel_id=channel, device_mesh=groups
        )
        gathers.append(body)
    scatter = made.computation()
    x = made.line(scatter, "parameter", ("f32", 64, 32))
    i = made.line(scatter, "parameter", ("s32",), parameter_number=1)
    groups = {"groups": [{"ids": [*range(8)]}]}
    x = made.line(
        scatter, "all-reduce", ("f32", 64, 32), x, channel_id=8, device_list=groups
    )
    made.line(scatter, "dynamic-slice", ("f32", 8, 32), x, i, i)

    entry = made.computation()
    a = made.line(entry, "parameter", half)
    b = made.line(entry, "parameter", ("f32", 64, 32), parameter_number=1)
    i = made.line(entry, "parameter", ("s32",), parameter_number=2)
    for body in gathers[:2]:
        made.line(entry, "fusion", whole, a, space=ON_CHIP, calls=(body,))
    begun = made.line(
        entry, "call-start", [half, whole], a, space=ON_CHIP, calls=gathers[2:]
    )
    made.line(entry, "call-done", whole, begun, space=ON_CHIP)
    kept = made.line(entry, "fusion", ("f32", 8, 32), b, i, calls=(scatter,))
    made.line(entry, "tuple", [("f32", 8, 32)], kept)
    program = made.program(entry)
    assert collectives(program, ()) == {
        "all-gather": Traffic(2, 2 * 128 * 64 * 2 * 3),
        "reduce-scatter": Traffic(1, 64 * 32 * 4 * 7 / 8),
    }
    # Three gathers read a, and what they make stays on the chip. Of the rest: b and the
    # index, and the slice that is kept.
    assert hbm_bytes(program, ()) == 3 * 128 * 64 * 2 + 64 * 32 * 4 + 4 + 8 * 32 * 4


def test_products_as_convolutions() -> None:
    """libtpu has a batch of four as a dilated axis, whose holes are no operations."""
    made = Builder()
    entry = made.computation()
    left = made.line(entry, "parameter", ("f32", 4, 16, 8))
    right = made.line(entry, "parameter", ("f32", 4, 8, 32), parameter_number=1)
    axis = {"size": 4, "stride": 3, "base_dilation": 4, "window_dilation": 1}
    numbers = {
        "input_spatial": [0],
        "output_spatial": [0],
        "kernel_input_feature": 1,
        "kernel_output_feature": 2,
    }
    made.line(
        entry,
        "convolution",
        ("f32", 4, 16, 32),
        left,
        right,
        window={"dimensions": [axis]},
        convolution=numbers,
    )
    assert flops(made.program(entry), ()) == 4 * 2 * 16 * 8 * 32


@pytest.mark.parametrize(
    ("kernel", "mask", "products", "pairs", "size", "again"),
    [
        # Causal, four blocks: 1 + 2 + 3 + 4 pairs.
        ("fwd", (1, 4, 4), 2, 10, 512 * 512, {"key": 512, "value": 512}),
        ("dkv", (1, 4, 4), 4, 10, 512 * 512, {"query": 512, "gradient": 512}),
        # Blocks of half as many keys: 2 + 4 + 6 + 8.
        ("dq", (1, 4, 8), 3, 20, 512 * 256, {"key": 256, "value": 256}),
        # A window, for which the grid has two blocks of keys: 1 + 2 + 2 + 2.
        ("fwd", (1, 4, 2), 2, 7, 512 * 512, {"key": 512, "value": 512}),
        ("dkv", (1, 2, 4), 4, 7, 512 * 512, {"query": 512, "gradient": 512}),
    ],
)
def test_kernels_in_loops(
    kernel: str,
    mask: tuple,
    products: int,
    pairs: int,
    size: int,
    again: dict[str, int],
) -> None:
    """Attention of 6 heads in three layers, with what is on the lines after a kernel."""
    made, N, T, H = Builder(), 6, 2048, 128
    body, test, entry = made.computation(), made.computation(), made.computation()
    carry = [("s32",), ("bf16", N, T, H), ("bf16", 2, T, H), ("f32", 64, 64)]
    value = made.line(body, "parameter", carry)
    index, q, k, x = (
        made.line(body, "get-tuple-element", shape, value, tuple_index=i)
        for i, shape in enumerate(carry)
    )
    m = made.line(body, "constant", ("s8", *mask), space=ON_CHIP)
    ids = made.line(body, "constant", ("s32", 8, T), space=ON_CHIP)
    inputs = [q, k, k, ids] + [q] * (kernel != "fwd")
    attributes = {"key": "kernel_metadata", "value": json_of(SPLASH)}
    out = made.line(
        body,
        "custom-call",
        carry[1],
        m,
        m,
        *inputs,
        space=ON_CHIP,
        name=f"splash_mha_{kernel}_segmented.3",
        custom_call_target="tpu_custom_call",
        attributes={"map": [attributes]},
    )
    one = made.line(body, "constant", ("s32",), literal={"s32s": [1]})
    after = made.line(body, "add", ("s32",), index, one)
    x = made.line(body, "dot", carry[3], x, x, dot={"lhs_contracting": [1]})
    made.line(body, "tuple", carry, after, out, k, x)
    value = made.line(test, "parameter", carry)
    index = made.line(test, "get-tuple-element", ("s32",), value, tuple_index=0)
    end = made.line(test, "constant", ("s32",), literal={"s32s": [3]})
    made.line(test, "compare", ("pred",), index, end, comparison_direction="LT")
    zero = made.line(entry, "constant", ("s32",), literal={"s32s": [0]})
    others = [
        made.line(entry, "parameter", shape, parameter_number=i)
        for i, shape in enumerate(carry[1:])
    ]
    value = made.line(entry, "tuple", carry, zero, *others)
    made.line(entry, "while", carry, value, calls=(body, test))
    program = made.program(entry)
    heads = N * pairs * products * 2 * size * H
    assert flops(program, ()) == 3 * (heads + 2 * 64**3)

    query, keys = N * T * H * 2, 2 * T * H * 2
    read = {"query": query, "key": keys, "value": keys}
    read |= {"gradient": query} if kernel != "fwd" else {}
    read |= {name: N * pairs * tokens * H * 2 for name, tokens in again.items()}
    scalars = 2 * 4 + 4  # the index and one are read, the sum is written
    product = 3 * 64 * 64 * 4
    measured = hbm_bytes(program, ())
    assert measured == pytest.approx(
        3 * (sum(read.values()) + product + scalars), abs=64
    )


def json_of(metadata: str) -> str:
    """As kernels give it to the profiler, over several lines."""
    escaped = metadata.replace('"', '\\"')
    return f'{{\n"xprof_metadata":"{escaped}"\n}}'
