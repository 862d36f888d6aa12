"""Presets for machines: how models are run where memory is what it is."""

from typing import NamedTuple

import jax

from rlt_jax.errors import UserError


class Device(NamedTuple):
    """How to use a kind of device.

    Attributes:
      kind: part of its name in JAX, in lower case.
      memory: of one, as its vendor counts it, in GB; 0 for that of the host.
      tokens: in the rows of a micro-batch on each device.
      slots: completions decoded at once on each device.
      dtype: of activations, and of parameters that are not trained.
      remat: what the backward pass recomputes, see `ModelConfig`.
      offload: whether reference and students stay in the host's memory between uses.
    """

    kind: str
    memory: float
    tokens: int
    slots: int
    dtype: str = "bfloat16"
    remat: str = "full"
    offload: bool = False


# The first whose kind is found counts. On CPU "dots" saves
# memory for activations at next to no cost.
DEVICES = {
    "cpu": Device("cpu", 0, 512, 16, "float32", "dots"),
    "t4": Device("t4", 16, 2048, 16, offload=True),
    "l4": Device("l4", 24, 2048, 32, offload=True),
    "a100-40": Device("-40gb", 40, 4096, 64),
    "a100": Device("a100", 80, 8192, 128),
    "h100": Device("h100", 80, 8192, 128),
    "h200": Device("h200", 141, 16384, 256),
    "v4": Device("v4", 32, 4096, 64),
    "v5e": Device("v5 lite", 16, 2048, 32, offload=True),
    "v5p": Device("v5", 95, 8192, 128),
    "v6e": Device("v6 lite", 32, 4096, 64),
}


def find_device(name: str) -> tuple[Device, int]:
    """The preset for a name such as "h100" or "v5e-8", and the number of devices.

    "auto" stands for the devices that JAX has found; this starts its backend.

    Raises:
      UserError: there is no such preset.
    """
    if name == "auto":
        kind = jax.devices()[0].device_kind.lower()
        found = (name for name, device in DEVICES.items() if device.kind in kind)
        name = f"{next(found, kind)}-{jax.device_count()}"
    kind, _, count = name.rpartition("-")
    if name in DEVICES or not count.isdecimal() or int(count) < 1:
        kind, count = name, "1"
    if kind not in DEVICES:
        raise UserError(
            f"device={name!r}: no such preset; choose one of {', '.join(DEVICES)}, with "
            'the number of devices where there are several, as in "v5e-8".'
        )
    return DEVICES[kind], int(count)
