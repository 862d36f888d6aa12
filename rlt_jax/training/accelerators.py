"""Accelerators that a machine has and JAX does not use."""

import os
import shutil
import subprocess
from pathlib import Path

import jax

from rlt_jax.errors import LOG

# The first driver for CUDA 13; docs.nvidia.com/deploy/cuda-compatibility
CUDA_13_DRIVER = 580
# Set on Cloud TPU, GKE and Colab.
TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "COLAB_TPU_ADDR")
_QUERY = ["--query-gpu=name,driver_version", "--format=csv,noheader"]


def warn_of_unused() -> None:
    """Logs what `unused` finds."""
    if told := unused():
        LOG.warning(told)


def unused(devices: Path = Path("/dev")) -> str:
    """What the system has while JAX uses the CPU and was not told to, "" for nothing.

    Args:
      devices: folder of the device files.

    Returns:
      A sentence that names the accelerator and the extra of rlt_jax to install.
    """
    if jax.config.jax_platforms == "cpu" or jax.default_backend() != "cpu":
        return ""
    what, extra = _gpu()
    if any(devices.glob("accel*")) or any(map(os.environ.get, TPU_VARIABLES)):
        what, extra = "a TPU", "tpu"
    if not what:
        return ""
    return (
        f"this machine has {what}, but JAX {jax.__version__} uses the CPU: install "
        f"'rlt_jax[{extra}]', or set JAX_PLATFORMS=cpu."
    )


def _gpu() -> tuple[str, str]:
    """Name of the first GPU and the extra for its driver; "" for none."""
    program = shutil.which("nvidia-smi")
    if not program:
        return "", ""
    # It can hang where a driver is broken.
    try:
        told = subprocess.check_output([program, *_QUERY], text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):  # a tool without a GPU
        return "", ""
    name, _, driver = told.partition("\n")[0].partition(",")
    major = driver.strip().partition(".")[0]
    is_new = major.isdecimal() and int(major) >= CUDA_13_DRIVER
    return name.strip(), "cuda13" if is_new else "cuda12"
