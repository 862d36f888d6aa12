"""What JAX has no public name for: cluster detection and the coordination service.

No other file imports `jax._src`. tests/training/test_private_jax.py names this file when
a release of JAX changes something that it uses.
"""

import datetime
import os

import jax
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state

# The key under which JAX's preemption service announces a SIGTERM to all processes.
PREEMPTION_NOTICE = "RECEIVED_PREEMPTION_NOTICE"


def process_id() -> int:
    """`jax.process_index()`, but without starting the devices."""
    return global_state.process_id


def num_processes() -> int:
    """`jax.process_count()`, but without starting the devices."""
    return global_state.num_processes


def cluster_process_count() -> int:
    """Number of processes that `jax.distributed.initialize()` would detect; 1 if none.

    Raises:
      OSError, RuntimeError, LookupError or ValueError: there is a cluster (TPU pod, GKE,
        Slurm, Open MPI), but its settings or its metadata server cannot be read.
    """
    # JAX can number the pods of Kubernetes only if they belong to an indexed job.
    ignored = () if "JOB_COMPLETION_INDEX" in os.environ else ("K8sCluster",)
    for cluster in ClusterEnv._cluster_types:
        is_ignored = cluster.opt_in_only_method or cluster.__name__ in ignored
        if not is_ignored and cluster.is_env_present():
            return cluster.get_process_count()
    return 1


def send(key: str, value: str, overwrite: bool = False) -> None:
    """Stores a string in the coordination service, where every process can read it.

    Raises:
      jax.errors.JaxRuntimeError: process 0 is dead, or the key has a value.
    """
    global_state.client.key_value_set(key, value, allow_overwrite=overwrite)


def receive(key: str) -> str:
    """The string that some process stores under the key; waits for it without a limit.

    Raises:
      jax.errors.JaxRuntimeError: process 0 is dead.
    """
    while True:
        try:
            return global_state.client.blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def received(directory: str) -> dict[int, str]:
    """Process -> the string that it has stored under `directory`, a slash and its index.

    Raises:
      jax.errors.JaxRuntimeError: process 0 is dead.
    """
    found = global_state.client.key_value_dir_get(directory)
    return {int(key.rpartition("/")[2]): value for key, value in found}


def wait_at_barrier(name: str, timeout: int) -> None:
    """Returns when all processes are here; a name can be used once.

    Raises:
      jax.errors.JaxRuntimeError: some did not come within `timeout` seconds.
    """
    global_state.client.wait_at_barrier(name, timeout * 1000)


def announce_preemption() -> None:
    """Starts what SIGTERM starts in JAX's preemption service; repeating it is harmless.

    All processes then agree on the call of
    `multihost_utils.reached_preemption_sync_point` that returns True.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat()
    send(PREEMPTION_NOTICE, now, overwrite=True)
