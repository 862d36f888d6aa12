"""Roofline model: lower bounds on the execution time of a program."""

from typing import NamedTuple

from rlt_jax.costs.chips import Chip


class Roofline(NamedTuple):
    """Execution times of one device in seconds at the published peak rates.

    Attributes:
      seconds: maximum of the three times below, a lower bound on the execution time.
      compute_seconds: time of the floating-point operations.
      memory_seconds: time of the HBM traffic.
      interconnect_seconds: time of the traffic between chips.
      bound: which of the three is the maximum: "compute", "memory" or "interconnect".
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    interconnect_seconds: float
    bound: str


def roofline(
    chip: Chip, flops: float, hbm_bytes: float, interconnect_bytes: float
) -> Roofline:
    """Roofline of one device for a number of bf16 operations and bytes.

    A chip that is several JAX devices divides its rates among them.
    """
    times = {
        "compute": flops * chip.devices / chip.flops,
        "memory": hbm_bytes * chip.devices / chip.bandwidth,
        "interconnect": interconnect_bytes * chip.devices / chip.interconnect,
    }
    bound = max(times, key=times.get)
    return Roofline(times[bound], *times.values(), bound)
