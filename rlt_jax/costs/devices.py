"""Presets for machines: how models are run where memory is what it is."""

from typing import NamedTuple

import jax

from rlt_jax.errors import UserError


class Device(NamedTuple):
    """How to use a kind of device.

    Attributes:
      memory: of one, as its vendor counts it, in GB.
      dtype: of activations, and of parameters that are not trained.
      tokens: in the rows of a micro-batch on each device.
      slots: completions decoded at once on each device.
      remat: what the backward pass recomputes, see `ModelConfig`.
      offload: whether reference and students stay in the host's memory between uses.
    """

    memory: float
    dtype: str = "bfloat16"
    tokens: int = 4096
    slots: int = 32
    remat: str = "full"
    offload: bool = False


DEVICES = {
    "cpu": Device(0, "float32", tokens=512, slots=16, remat="dots"),
    "t4": Device(16, tokens=2048, slots=16, offload=True),
    "l4": Device(24, tokens=2048, slots=32, offload=True),
    "a100-40": Device(40, slots=64),
    "a100": Device(80, tokens=8192, slots=128),
    "h100": Device(80, tokens=8192, slots=128),
    "h200": Device(141, tokens=16384, slots=256),
    "v4": Device(32, slots=64),
    "v5e": Device(16, tokens=2048, slots=32, offload=True),
    "v5p": Device(95, tokens=8192, slots=128),
    "v6e": Device(32, slots=64),
}
# Part of a JAX device kind, in lower case -> name; the first that is found counts.
_KINDS = {
    "cpu": "cpu",
    "t4": "t4",
    "l4": "l4",
    "a100-sxm4-40": "a100-40",
    "a100-pcie-40": "a100-40",
    "a100": "a100",
    "h100": "h100",
    "h200": "h200",
    "v4": "v4",
    "v5 lite": "v5e",
    "v5e": "v5e",
    "v5": "v5p",
    "v6": "v6e",
}


def find_device(name: str) -> tuple[Device, int]:
    """The preset for a name such as "h100" or "v5e-8", and the number of devices.

    "auto" stands for the devices that JAX has found; this starts its backend.

    Raises:
      UserError: there is no such preset.
    """
    if name == "auto":
        kind = jax.devices()[0].device_kind.lower()
        found = next((known for part, known in _KINDS.items() if part in kind), kind)
        name = f"{found}-{jax.device_count()}"
    kind, _, count = name.rpartition("-")
    if name in DEVICES or not count.isdecimal() or int(count) < 1:
        kind, count = name, "1"
    if kind not in DEVICES:
        raise UserError(
            f"device={name!r}: no such preset; choose one of {', '.join(DEVICES)}, with "
            'the number of devices where there are several, as in "v5e-8".'
        )
    return DEVICES[kind], int(count)
