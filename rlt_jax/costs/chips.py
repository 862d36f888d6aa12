"""Specifications of accelerators and their available topologies."""

import math
import re
from typing import NamedTuple

from rlt_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """Specifications of one chip, as published by its vendor.

    Attributes:
      name: name in libtpu's topologies; lower case for GPUs.
      usable_bytes: memory of a device in bytes that a program may use. On TPU, the limit
        that the compiler of libtpu 0.0.42 reports when a program exceeds it; on GPU, the
        fraction that JAX preallocates by default
        (docs.jax.dev/en/latest/gpu_memory_allocation.html).
      flops: peak dense bf16 floating-point operations per second.
      bandwidth: HBM bandwidth in bytes per second.
      interconnect: bandwidth in bytes per second and direction of all links of a chip
        together (ICI, NVLink). A collective over one axis of the torus uses only the
        links of that axis.
      devices: number of JAX devices per chip.
      network: bandwidth in bytes per second of the data center network that connects
        slices, for each chip; 0 where it is not published.
      sizes: sizes of the available slices, smallest first.
    """

    name: str
    usable_bytes: int
    flops: float
    bandwidth: float
    interconnect: float
    devices: int
    network: float
    sizes: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_NODE = ("1", "2", "4", "8")
# Memory that a program can use in GiB, bf16 operations per second in 1e12, HBM and
# interconnect in 1e9 bytes per second, devices, network in Gbit/s, slices. From docs.cloud.google.com/tpu/docs/<name>
# and www.nvidia.com/en-us/data-center/<name>/ (SXM).
_FIGURES = {
    # Interconnect: from the published 1.1 PB/s of all-reduce for 4,096 chips; the same
    # ratio gives the published figures of v5e and v6e. A v4 chip is one device at run
    # time and two in the topologies of libtpu.
    "v4": (15.25, 275, 1200, 1.1e6 / 4096, 2, 0, _CUBES),
    # Published interconnect bandwidths are for both directions together.
    "v5e": (15.75, 197, 819, 400 / 2, 1, 6400 / 256, _FLAT),
    # The compiler reports 95.74 GiB, more than the published 95.
    "v5p": (95.735, 459, 2765, 1200 / 2, 1, 50, _CUBES),
    "v6e": (31.25, 918, 1600, 800 / 2, 1, 25_600 / 256, _FLAT),
    "tpu7x": (94.75, 2307, 7380, 1200 / 2, 2, 100, _CUBES),
    # 1,979 TFLOP/s are with sparsity, which doubles them.
    "h100": (0.75 * 80e9 / GIB, 1979 / 2, 3350, 900 / 2, 1, 0, _NODE),
    "h200": (0.75 * 141e9 / GIB, 1979 / 2, 4800, 900 / 2, 1, 0, _NODE),
}
CHIPS = {
    name: Chip(
        *(name, int(gib * GIB), flops * 1e12, hbm * 1e9, links * 1e9, devices),
        *(network * 1e9 / 8, sizes),
    )
    for name, (gib, flops, hbm, links, devices, network, sizes) in _FIGURES.items()
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:8x8" or "2x v5e:8x8", two slices.

    Raises:
      UserError: an unknown chip.
    """
    name = one_slice(topology).partition(":")[0]
    if name not in CHIPS:
        raise UserError(
            f"topology={topology!r}: chip {name!r} is not one of {', '.join(CHIPS)}."
        )
    return CHIPS[name]


def num_slices(topology: str) -> int:
    """Number of slices in a topology: 2 in "2x v5e:8x8", 1 in "v5e:8x8"."""
    count = re.match(r"([1-9]\d*)x +", topology)
    return int(count[1]) if count else 1


def one_slice(topology: str) -> str:
    """The topology of one slice: "v5e:8x8" for "2x v5e:8x8"."""
    return re.sub(r"^[1-9]\d*x +", "", topology)


def num_chips(topology: str) -> int:
    """Number of chips in a topology: 64 in "v5e:8x8", 128 in "2x v5e:8x8".

    Raises:
      UserError: the topology has no valid sizes.
    """
    sizes = one_slice(topology).partition(":")[2]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"topology={topology!r}: add the sizes, as in v5e:8x8.")
    in_slice = math.prod(int(size) for size in sizes.split("x"))
    return num_slices(topology) * in_slice


def slices(chip_name: str) -> tuple[str, ...]:
    """The available topologies of a chip, smallest first, such as "v5e:1x1".

    These are names for libtpu's `get_topology_desc`, which for a single chip also needs
    `chips_per_host_bounds=[1, 1, 1]`. For GPUs the size is their number, up to one node.

    Raises:
      UserError: an unknown chip.
    """
    return tuple(f"{chip_name}:{sizes}" for sizes in chip_of(chip_name).sizes)
