"""Meshes, and a model spread over eight devices against one on a single device."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from rlt_jax.errors import UserError
from rlt_jax.inference.head import token_log_probs
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, init_params, logical_axes
from rlt_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlt_jax.training.sharding import (
    DECODING_RULES,
    RULES,
    MeshConfig,
    Rules,
    batch_sharding,
    check_model,
    check_rows,
    make_mesh,
    param_shardings,
    replicated,
    to_shardings,
)
from rlt_jax.training.state import state_shardings

CONFIG = ModelConfig(
    vocab_size=40,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    max_length=32,
)
TOKENS = np.random.default_rng(0).integers(1, 40, (8, 9), np.int32)

# Run where eight devices can be made before any backend has started.
EIGHT_DEVICES = """
import json, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from rlt_jax.inference.head import token_log_probs
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.training.sharding import *

config, tokens, target = json.loads(sys.argv[1])
mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}, mesh
for bad in (MeshConfig(data=3), MeshConfig(data=-1, fsdp=3), MeshConfig(-1, 16)):
    try:
        make_mesh(bad)
    except ValueError as error:
        assert "does not cover 8 devices" in str(error), error
    else:
        raise AssertionError(f"{bad} was taken")

model = Transformer(ModelConfig(**config))
shapes = jax.eval_shape(lambda: init_params(model.config, jax.random.key(0)))
rng = np.random.default_rng(0)
params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), shapes)
params = jax.device_put(params, param_shardings(model, mesh))
tokens = jax.device_put(np.array(tokens, np.int32), batch_sharding(mesh))
score = jax.jit(lambda params, tokens: token_log_probs(model, params, tokens))
log_probs = np.asarray(score(params, tokens))
shards = {
    jax.tree_util.keystr(path, simple=True, separator="/"): {
        "whole": leaf.shape, "part": leaf.addressable_shards[0].data.shape
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
}
rows = tokens.addressable_shards[0].data.shape[0]
result = {"log_probs": log_probs.tolist(), "shards": shards, "rows": rows}
with open(target, "w") as file:
    json.dump(result, file)
"""


def test_the_mesh_covers_all_devices(mesh: Mesh) -> None:
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.size == jax.device_count()


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=-1, fsdp=2),
        MeshConfig(data=-1, fsdp=-1),
        MeshConfig(data=-1, fsdp=0),
        MeshConfig(data=1, fsdp=1, tensor=0),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(
    config: MeshConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(UserError, match="does not cover 1 devices"):
        make_mesh(config)


def test_rows_are_split_over_data_and_fsdp(mesh: Mesh) -> None:
    rows = ("data", "fsdp")
    assert batch_sharding(mesh).spec == PartitionSpec(rows)
    assert batch_sharding(mesh, leading=1).spec == PartitionSpec(None, rows)
    assert replicated(mesh).spec == PartitionSpec()


def test_moments_are_sharded_as_their_parameters(mesh: Mesh) -> None:
    model = Transformer(CONFIG)
    tx = make_optimizer(OptimizerConfig(0.1), 10)
    state = state_shardings(model, tx, mesh)
    params = param_shardings(model, mesh)
    assert state.params == params
    trees = jax.tree.leaves(
        state.opt_state, is_leaf=lambda x: hasattr(x, "mu") and hasattr(x, "nu")
    )
    (adam,) = (tree for tree in trees if hasattr(tree, "mu"))
    assert adam.mu == adam.nu == params
    assert params["embedding"].spec == PartitionSpec("tensor", "fsdp")


def test_eight_devices_compute_what_one_does(tmp_path: Path) -> None:
    config = {
        name: getattr(CONFIG, name)
        for name in (
            "vocab_size",
            "embed_dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "max_length",
        )
    }
    target = tmp_path / "result.json"
    arguments = json.dumps([config, TOKENS.tolist(), str(target)])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", EIGHT_DEVICES, arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(target.read_text())

    model = Transformer(CONFIG)
    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), shapes)
    alone = jax.jit(lambda params: token_log_probs(model, params, TOKENS))(params)
    np.testing.assert_allclose(result["log_probs"], alone, atol=1e-5)

    assert result["rows"] == 2  # of 8, over data * fsdp = 4
    shards = result["shards"]
    assert shards["embedding"] == {"whole": [40, 16], "part": [20, 8]}
    kernel = "layers/mlp/up/kernel"
    assert shards[kernel] == {"whole": [2, 16, 24], "part": [2, 8, 12]}
    query = "layers/attention/query/kernel"
    assert shards[query] == {"whole": [2, 16, 4, 8], "part": [2, 8, 2, 8]}
    for name, shard in shards.items():
        parts = np.array(shard["whole"]) // np.array(shard["part"])
        assert parts.prod() == (2 if "norm" in name else 4), name


@pytest.mark.parametrize("rules", [RULES, DECODING_RULES])
def test_no_array_is_split_twice_over_one_axis(rules: Rules, mesh: Mesh) -> None:
    """Parameters use every mesh axis that their rules name, each at most once."""
    table = dict(rules)
    assert len(table) == len(rules)
    for spec in jax.tree.leaves(
        logical_axes(CONFIG), is_leaf=lambda x: isinstance(x, PartitionSpec)
    ):
        wanted = [table[name] for name in spec if table[name]]
        assert len(set(wanted)) == len(wanted), spec
        split = [axis for axis in to_shardings(spec, mesh, rules).spec if axis]
        assert split == wanted, spec


def fake_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return types.SimpleNamespace(shape=shape)


def test_models_that_cannot_be_split_are_refused() -> None:
    check_model(CONFIG, fake_mesh(5, 4, 2))
    with pytest.raises(UserError, match="num_heads=4 over tensor=3, num_kv_heads=2"):
        check_model(CONFIG, fake_mesh(1, 1, 3))
    with pytest.raises(UserError, match="embed_dim=16 over fsdp=5"):
        check_model(CONFIG, fake_mesh(1, 5, 1))


def test_rows_that_cannot_be_split_are_refused() -> None:
    check_rows(fake_mesh(2, 2, 2), 8, 64, "a, b")
    with pytest.raises(UserError, match="a, b: 6 rows of 64 tokens .* 4 groups"):
        check_rows(fake_mesh(2, 2, 2), 6, 64, "a, b")
    with pytest.raises(UserError, match="63 tokens .* tensor = 2"):
        check_rows(fake_mesh(2, 2, 2), 8, 63, "a, b")
