"""A TPU to compile for."""

import importlib.util
import os

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from rlt_jax.training.sharding import MESH_AXES


@pytest.fixture(scope="session")
def tpus() -> Mesh:
    """Four devices of a TPU that is not there: fsdp 2, tensor 2."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the compiler for TPU, is not installed")
    # No device is touched, so other processes need not wait for this one.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    shape = np.array(devices).reshape(1, 2, 2)
    return Mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
