"""The private parts of JAX that rlt_jax uses exist and do what they are used for."""

import importlib
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rlt_jax.training import private_jax

MEND = f"JAX {jax.__version__} has changed: mend rlt_jax/training/private_jax.py. "
PACKAGE = Path(private_jax.__file__).parents[1]
NAMES = {
    "jax._src.clusters:ClusterEnv": (
        "_cluster_types opt_in_only_method is_env_present get_process_count"
    ),
    "jax._src.distributed:global_state": "client process_id num_processes",
    "jax._src.lib:_jax.DistributedRuntimeClient": (
        "key_value_set blocking_key_value_get key_value_dir_get wait_at_barrier"
    ),
}
# One process, as the service works for any number.
PREEMPTION = """
import sys, time
import jax
from jax.experimental import multihost_utils
from rlt_jax.training import private_jax
jax.distributed.initialize(sys.argv[1], 1, 0)
private_jax.announce_preemption()
private_jax.announce_preemption()
for call in range(1, 300):
    if multihost_utils.reached_preemption_sync_point(call):
        sys.exit()
    time.sleep(0.1)
sys.exit("the notice started nothing")
"""


@pytest.mark.parametrize("path", NAMES)
def test_names_exist(path: str) -> None:
    module, _, attributes = path.partition(":")
    try:
        value = importlib.import_module(module)
        for attribute in attributes.split("."):
            value = getattr(value, attribute)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{MEND}{error}")
    missing = [name for name in NAMES[path].split() if not hasattr(value, name)]
    assert not missing, f"{MEND}{path} has no {missing}"


def test_kubernetes_is_known_by_this_name() -> None:
    names = [cluster.__name__ for cluster in private_jax.ClusterEnv._cluster_types]
    assert "K8sCluster" in names, f"{MEND}Clusters: {names}"


def test_notice_starts_the_preemption_service() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    result = subprocess.run(
        [sys.executable, "-c", PREEMPTION, address],
        cwd=PACKAGE.parent,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, MEND + result.stderr


def test_other_files_use_public_names_only() -> None:
    users = [file for file in PACKAGE.rglob("*.py") if "jax._src" in file.read_text()]
    assert users == [Path(private_jax.__file__)]
