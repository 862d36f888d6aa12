"""Fingerprints change with every bit and with nothing else."""

import jax
import jax.numpy as jnp

from rlt_jax.training.provenance import weights_hash
from rlt_jax.types import Params


def test_weights_hash(params: Params) -> None:
    first = weights_hash(params)
    assert len(first) == 16
    assert weights_hash(jax.tree.map(jnp.copy, params)) == first
    leaves, tree = jax.tree.flatten(params)
    flipped = leaves[0].at[(0,) * leaves[0].ndim].multiply(1 + 2e-7)
    assert weights_hash(jax.tree.unflatten(tree, [flipped, *leaves[1:]])) != first
    swapped = jnp.flip(leaves[0], axis=-1)
    assert weights_hash(jax.tree.unflatten(tree, [swapped, *leaves[1:]])) != first
