"""Offloading of frozen parameters to host memory."""

from typing import Any

import jax

from rlt_jax.errors import LOG, UserError


def keep(tree: Any, offload: bool, name: str) -> Any:
    """Moves a tree of arrays to pinned host memory if `offload` is set.

    Args:
      tree: arrays on the devices.
      offload: whether to move them.
      name: name of the tree for the log.

    Raises:
      UserError: the backend has no pinned host memory.
    """
    if not offload or not jax.tree.leaves(tree):
        return tree
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    if "pinned_host" not in kinds:
        where = f"loop.offload: {jax.default_backend()}"
        raise UserError(f"{where} has no pinned host memory; set loop.offload=False.")
    saved = sum(x.nbytes for x in jax.tree.leaves(tree))
    LOG.info("offload: moved %s, %.3f GB, to host memory", name, saved / 1e9)
    return _move(tree, "pinned_host")


def fetch(tree: Any) -> Any:
    """The tree in device memory; arrays that are there already are not copied."""
    return _move(tree, "device")


def _move(tree: Any, kind: str) -> Any:
    shardings = jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree)
    return jax.device_put(tree, shardings)
