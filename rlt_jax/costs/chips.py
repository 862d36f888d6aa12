"""Published figures of accelerators, and the slices that they come in."""

import math
import re
from typing import NamedTuple

from rlt_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """What one chip has, by its maker.

    Attributes:
      name: as in the topologies of libtpu, and in lower case for GPUs.
      usable_bytes: of a device, what one program may use. On TPU it is the limit that
        the compiler of libtpu 0.0.42 names when a program needs too much; on GPU the
        share that JAX takes unless it is told otherwise
        (docs.jax.dev/en/latest/gpu_memory_allocation.html).
      flops: bf16 operations per second, dense, at the published peak.
      bandwidth: bytes per second from and to HBM.
      interconnect: bytes per second that leave a chip over all its links together (ICI,
        NVLink); the same may arrive meanwhile. A collective over one axis of the torus
        has only that axis's links.
      devices: what JAX sees of a chip when it compiles for a topology.
    """

    name: str
    usable_bytes: int
    flops: float
    bandwidth: float
    interconnect: float
    devices: int


# Memory that a program can use in GiB, bf16 operations per second in 1e12, HBM and
# interconnect in 1e9 bytes per second, devices. From docs.cloud.google.com/tpu/docs/<name>
# and www.nvidia.com/en-us/data-center/<name>/ (SXM).
_FIGURES = {
    # The page has no interconnect per chip but 1.1 PB/s of all-reduce for 4,096 of them, a
    # ratio that gives the published figures of v5e and v6e. A running v4 shows one device
    # a chip; its topologies show both cores.
    "v4": (15.25, 275, 1200, 1.1e6 / 4096, 2),
    # Interconnects are published as both directions together.
    "v5e": (15.75, 197, 819, 400 / 2, 1),
    # The compiler names 95.74 GiB, more than the 95 that are published.
    "v5p": (95.735, 459, 2765, 1200 / 2, 1),
    "v6e": (31.25, 918, 1600, 800 / 2, 1),
    "tpu7x": (94.75, 2307, 7380, 1200 / 2, 2),
    # 1,979 TFLOP/s are with sparsity, which doubles them.
    "h100": (0.75 * 80e9 / GIB, 1979 / 2, 3350, 900 / 2, 1),
    "h200": (0.75 * 141e9 / GIB, 1979 / 2, 4800, 900 / 2, 1),
}
CHIPS = {
    name: Chip(name, int(gib * GIB), flops * 1e12, hbm * 1e9, links * 1e9, devices)
    for name, (gib, flops, hbm, links, devices) in _FIGURES.items()
}

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_NODE = ("1", "2", "4", "8")
_SLICES = {
    **dict.fromkeys(("v5e", "v6e"), _FLAT),
    **dict.fromkeys(("v4", "v5p", "tpu7x"), _CUBES),
    **dict.fromkeys(("h100", "h200"), _NODE),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:8x8".

    Raises:
      UserError: the chip is not in the table.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise UserError(
            f"topology={topology!r}: chip {name!r} is not one of {', '.join(CHIPS)}."
        )
    return CHIPS[name]


def num_chips(topology: str) -> int:
    """Chips of a topology: 64 in "v5e:8x8".

    Raises:
      UserError: the sizes are missing or no numbers.
    """
    sizes = topology.partition(":")[2]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"topology={topology!r} has no sizes, as v5e:8x8 has.")
    return math.prod(int(size) for size in sizes.split("x"))


def slices(chip_name: str) -> tuple[str, ...]:
    """The topologies of a chip that can be had, smallest first, as "v5e:1x1".

    libtpu's `get_topology_desc` takes them as they are, but for a single chip, which
    needs `chips_per_host_bounds=[1, 1, 1]`. GPUs are counted, up to a node.

    Raises:
      UserError: the chip is not in the table.
    """
    chip = chip_of(chip_name)
    return tuple(f"{chip.name}:{sizes}" for sizes in _SLICES[chip.name])
