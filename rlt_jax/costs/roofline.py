"""The least time that a program can take on a chip: three limits that overlap."""

from typing import NamedTuple

from rlt_jax.costs.chips import Chip


class Roofline(NamedTuple):
    """Times of one device in seconds, each as if it ran at its published peak.

    Attributes:
      seconds: the longest of the three, which is a lower bound: nothing runs at its
        peak, and the three never overlap perfectly.
      compute_seconds: for the floating-point operations.
      memory_seconds: for what goes from and to HBM.
      interconnect_seconds: for what goes between chips.
      bound: which of them is longest: "compute", "memory" or "interconnect".
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    interconnect_seconds: float
    bound: str


def roofline(
    chip: Chip, flops: float, hbm_bytes: float, interconnect_bytes: float
) -> Roofline:
    """Time of one device for so many bf16 operations and bytes.

    A device has its part of the chip: all of it, but for chips that JAX sees as several
    devices.
    """
    times = {
        "compute": flops * chip.devices / chip.flops,
        "memory": hbm_bytes * chip.devices / chip.bandwidth,
        "interconnect": interconnect_bytes * chip.devices / chip.interconnect,
    }
    bound = max(times, key=times.get)
    return Roofline(times[bound], *times.values(), bound)
