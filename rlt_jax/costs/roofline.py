"""Roofline model: lower bounds on the execution time of a program."""

from typing import NamedTuple

from rlt_jax.costs.chips import Chip
from rlt_jax.errors import UserError


class Roofline(NamedTuple):
    """Execution times of one device in seconds at the published peak rates.

    Attributes:
      seconds: maximum of the times below, a lower bound on the execution time.
      compute_seconds: time of the floating-point operations.
      memory_seconds: time of the HBM traffic.
      interconnect_seconds: time of the traffic between chips.
      network_seconds: time of the traffic between slices.
      bound: which is the maximum: "compute", "memory", "interconnect" or "network".
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    interconnect_seconds: float
    network_seconds: float
    bound: str


def roofline(
    chip: Chip,
    flops: float,
    hbm_bytes: float,
    interconnect_bytes: float,
    network_bytes: float = 0,
) -> Roofline:
    """Roofline of one device for a number of bf16 operations and bytes.

    A chip that is several JAX devices divides its rates among them.

    Raises:
      UserError: there is traffic over a network whose bandwidth is not known.
    """
    if network_bytes and not chip.network:
        raise UserError(
            f"the network bandwidth between slices of {chip.name} is unknown."
        )
    times = {
        "compute": flops * chip.devices / chip.flops,
        "memory": hbm_bytes * chip.devices / chip.bandwidth,
        "interconnect": interconnect_bytes * chip.devices / chip.interconnect,
        "network": network_bytes and network_bytes * chip.devices / chip.network,
    }
    bound = max(times, key=times.get)
    return Roofline(times[bound], *times.values(), bound)
