"""Fingerprints of the weights, tokenizer and template that a result was made with."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp

from rlt_jax.data.templates import Template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.types import Params


def weights_hash(params: Params) -> str:
    """Hash of all bits of the parameters as float32, sixteen hex digits.

    Uses integer arithmetic modulo 2**32, so it does not depend on the number of devices.
    """

    @jax.jit
    def sums(params: Params) -> list[jax.Array]:
        result = []
        for leaf in jax.tree.leaves(params):
            bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
            position = jnp.zeros(leaf.shape, jnp.uint32)
            for axis in range(leaf.ndim):
                index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
                position = position * jnp.uint32(1_000_003) + index
            mixed = (bits ^ (position * jnp.uint32(2_654_435_761))) * jnp.uint32(40_503)
            result.append(jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32))
        return result

    numbers = [int(value) for value in jax.device_get(sums(params))]
    return _digest(json.dumps(numbers).encode())


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Hash of the tokenizer's files, sixteen hex digits."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    files = [tokenizer.path / name for name in names]
    return _digest(b"\0".join(f.read_bytes() for f in files if f.is_file()))


def template_hash(template: Template) -> str:
    """Hash of the template's fields, sixteen hex digits."""
    return _digest(json.dumps(dataclasses.asdict(template), sort_keys=True).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
