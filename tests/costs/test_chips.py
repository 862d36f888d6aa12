"""The table of chips and their slices."""

import itertools
import os
import subprocess
import sys

import pytest

from rlt_jax.costs.chips import (
    CHIPS,
    chip_of,
    num_chips,
    num_slices,
    one_slice,
    slices,
)
from rlt_jax.costs.roofline import roofline
from rlt_jax.errors import UserError

LIBTPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# Devices of every slice, and the limit that the compiler names when it is exceeded.
TOPOLOGIES = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rlt_jax.costs.chips import CHIPS, num_chips, slices

for chip in CHIPS.values():
    if chip.name.startswith("h"):
        continue
    for topology in slices(chip.name):
        one = {"chips_per_host_bounds": [1, 1, 1]} if num_chips(topology) == 1 else {}
        found = get_topology_desc(platform="tpu", topology_name=topology, **one)
        devices = found.devices
        assert len(devices) == num_chips(topology) * chip.devices, topology
    sharding = NamedSharding(Mesh(np.array(devices[:1]), "x"), PartitionSpec())
    x = jax.ShapeDtypeStruct((2**10, 2**28), jnp.float32, sharding=sharding)
    try:
        jax.jit(jnp.sin).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        limit = float(re.search(r"(?:of|HBM \\()\\s*([\\d.]+)G", str(error))[1])
        assert abs(limit - chip.usable_bytes / 2**30) < 0.01, (chip.name, str(error))
    else:
        raise AssertionError(f"{chip.name} was taken to have 1 TiB")
"""


def test_figures_are_in_their_units() -> None:
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert 10e9 < chip.usable_bytes < 110e9
        assert 100e12 < chip.flops < 3000e12
        assert 0.5e12 < chip.bandwidth < 10e12
        assert chip.bandwidth / 20 < chip.interconnect < chip.bandwidth


def test_slices_grow() -> None:
    for name in CHIPS:
        sizes = [num_chips(topology) for topology in slices(name)]
        assert all(a < b for a, b in itertools.pairwise(sizes))
        assert all(chip_of(topology).name == name for topology in slices(name))
    assert slices("v5e")[:3] == ("v5e:1x1", "v5e:2x2", "v5e:2x4")


def test_chips_of_a_topology() -> None:
    assert (chip_of("v5e:8x8").name, num_chips("v5e:8x8")) == ("v5e", 64)
    assert num_chips("v5p:4x4x8") == 128
    assert num_chips("h100:8") == 8
    several = "2x v5e:16x16"
    assert (chip_of(several).name, num_chips(several)) == ("v5e", 512)
    assert (num_slices(several), one_slice(several)) == (2, "v5e:16x16")
    assert (num_slices("v5e:8x8"), one_slice("v5e:8x8")) == (1, "v5e:8x8")


@pytest.mark.parametrize("topology", ["v3:2x2", "", "V5E:2x2", "0x v5e:2x2", "2x"])
def test_unknown_chips_are_refused_with_the_known(topology: str) -> None:
    with pytest.raises(UserError, match="not one of v4, v5e, v5p"):
        chip_of(topology)


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v5e:2x", "v5e:0x2", "v5e:2*2"])
def test_missing_sizes_are_refused(topology: str) -> None:
    with pytest.raises(UserError, match="add the sizes"):
        num_chips(topology)


def test_the_longest_time_binds() -> None:
    chip = CHIPS["v5e"]
    both = roofline(chip, 197e12, 819e9 / 2, 200e9 / 4)
    assert both == (1.0, 1.0, 0.5, 0.25, 0, "compute")
    assert roofline(chip, 0, 819e9, 0).bound == "memory"
    assert roofline(chip, 0, 0, 200e9)[::5] == (1.0, "interconnect")
    # 6.4 Tbit/s are for 256 chips.
    assert roofline(chip, 0, 0, 0, 6.4e12 / 8 / 256)[::5] == (1.0, "network")
    with pytest.raises(UserError, match="slices of v4 is unknown"):
        roofline(CHIPS["v4"], 0, 0, 0, 1)


def test_a_core_has_its_part_of_a_chip() -> None:
    chip = CHIPS["tpu7x"]
    assert chip.devices == 2
    assert roofline(chip, chip.flops, 0, 0).seconds == 2.0


def test_libtpu_has_the_slices_and_the_memory() -> None:
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs that are not there")
    run = subprocess.run(
        [sys.executable, "-c", TOPOLOGIES],
        env=os.environ | LIBTPU,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
