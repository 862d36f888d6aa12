"""Accelerators to compile for that are not there."""

import importlib.util
import os

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from rlt_jax.training.sharding import MESH_AXES


@pytest.fixture(scope="session")
def tpus() -> Mesh:
    """Four devices of a TPU: fsdp 2, tensor 2."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the compiler for TPU, is not installed")
    # No device is touched, so other processes need not wait for this one.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    shape = np.array(devices).reshape(1, 2, 2)
    return Mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture
def gpu() -> AbstractMesh:
    """One GPU, to lower for; JAX 0.11 asks which."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    auto = (AxisType.Auto,) * 3
    return AbstractMesh((1, 1, 1), MESH_AXES, axis_types=auto, abstract_device=device)
