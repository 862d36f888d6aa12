"""Frozen parameters in the memory of the host between their uses."""

import logging
from typing import Any

import jax

from rlt_jax.errors import UserError

_LOG = logging.getLogger("rlt_jax")


def keep(tree: Any, offload: bool, name: str) -> Any:
    """Moves a tree of arrays to pinned host memory, if asked; logs the bytes saved.

    Raises:
      UserError: the backend has no pinned host memory.
    """
    if not offload or not jax.tree.leaves(tree):
        return tree
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    if "pinned_host" not in kinds:
        raise UserError(
            f"loop.offload: {jax.default_backend()} has no pinned host memory; set it to "
            "False."
        )
    saved = sum(x.nbytes for x in jax.tree.leaves(tree))
    _LOG.info(
        "offload: %s, %.3f GB, leaves the devices between uses", name, saved / 1e9
    )
    return _move(tree, "pinned_host")


def fetch(tree: Any) -> Any:
    """The tree on the devices; what is there already is not copied."""
    return _move(tree, "device")


def put_back(tree: Any, like: Any) -> Any:
    """A new tree in the memory that an old one came from."""
    return jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), tree, like)


def _move(tree: Any, kind: str) -> Any:
    return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree
    )
