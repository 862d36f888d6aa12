"""The engine in processes of its own: other devices, other hosts, other widths."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

# Run where eight devices can be made before any backend has started.
EIGHT_DEVICES = """
import json
import jax, numpy as np
from jax.sharding import Mesh
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import make_engine
from rlt_jax.inference.layout import EngineConfig
from rlt_jax.types import Request
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.training.sharding import *

model = Transformer(ModelConfig(
    vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, mlp_dim=24, max_length=64))
shapes = jax.eval_shape(lambda: init_params(model.config, jax.random.key(0)))
rng = np.random.default_rng(0)
params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(x.dtype), shapes)
prompts = [rng.integers(1, 40, n, np.int32) for n in (3, 17, 1, 9)]
requests = [Request(prompts[n // 6], n, 10 + n % 3) for n in range(24)]
one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES)
for mesh in (one, make_mesh(MeshConfig(8)), make_mesh(MeshConfig(2, 2, 2))):
    sizes = EngineConfig(slots=16, page_size=8, steps=4, prefill_chunk=16)
    args = model, None, SamplingConfig(12, stop_ids=(5, 6))
    engine = make_engine(*args, sizes, mesh, 32)
    placed = jax.device_put(params, param_shardings(model, mesh))
    rollout = engine.generate(placed, requests, jax.random.key(3))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if shards > 1:
        try:
            make_engine(*args, EngineConfig(slots=shards + 1), mesh, 32)
        except UserError as error:
            assert f"is no multiple of data * fsdp = {shards}" in str(error), error
        else:
            raise AssertionError("slots that cannot be divided were accepted")
    pairs = zip(rollout.tokens, rollout.log_probs, strict=True)
    print(json.dumps([[x.tolist() for x in pair] for pair in pairs]))
"""

# No accelerator is needed to see that kernels can be split over a mesh.
LOWERING = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
from rlt_jax.inference.engine import make_engine
from rlt_jax.inference.layout import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.scheduler import Scheduler
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.training.sharding import *

model = Transformer(ModelConfig(
    vocab_size=256, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=128, mlp_dim=64, max_length=1024, dtype="bfloat16"))
shapes = jax.eval_shape(lambda: init_params(model.config, jax.random.key(0)))
for sizes in (MeshConfig(8), MeshConfig(4, 1, 2), MeshConfig(2, 2, 2)):
    sampling = SamplingConfig(8, stop_ids=(0,))
    args = sampling, EngineConfig(slots=16), make_mesh(sizes), 1024
    engine = make_engine(model, None, *args)
    refill = Scheduler([], engine.layout, (0,)).plan()[1]
    traced = engine.decode.trace(
        shapes, *jax.eval_shape(engine.new_cache), refill, jax.random.key(0))
    for platform, call in (("tpu", "tpu_custom_call"), ("cuda", "triton")):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert call in text, (sizes, platform)
"""


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert not result.returncode, result.stderr
    return result.stdout


def test_the_kernels_are_part_of_the_programs_for_many_devices() -> None:
    run(LOWERING)


def test_the_devices_do_not_matter() -> None:
    one, *spread = map(json.loads, run(EIGHT_DEVICES).splitlines())
    assert len(spread) == 2
    for completions in spread:
        for (tokens, log_probs), (expected, theirs) in zip(
            completions, one, strict=True
        ):
            assert tokens == expected
            np.testing.assert_allclose(log_probs, theirs, atol=1e-5)


# One of two hosts with two devices each.
TWO_HOSTS = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_disable_most_optimizations", True)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from rlt_jax.inference.engine import make_engine
from rlt_jax.inference.layout import EngineConfig
from rlt_jax.types import Request
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.training.sharding import *

model = Transformer(ModelConfig(
    vocab_size=40, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=8, mlp_dim=24, max_length=64))
mesh = make_mesh(MeshConfig(data=2, fsdp=2))
init = jax.jit(
    lambda: init_params(model.config, jax.random.key(0)),
    out_shardings=param_shardings(model, mesh))
rng = np.random.default_rng(0)
requests = [Request(rng.integers(1, 40, 12, np.int32), n, 9) for n in range(30)]
sizes = EngineConfig(slots=16, page_size=8, steps=4, prefill_chunk=16)
sampling = SamplingConfig(9, stop_ids=(5, 6))
engine = make_engine(model, None, sampling, sizes, mesh, 32)
rollout = engine.generate(init(), requests, jax.random.key(3))
print([tokens.tolist() for tokens in rollout.tokens])
"""


@pytest.mark.slow
def test_every_host_has_all_completions() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_HOSTS, port, str(n)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    outputs = [host.communicate(timeout=300) for host in hosts]
    for host, (_, errors) in zip(hosts, outputs, strict=True):
        assert not host.returncode, errors
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    assert len(first) == 30 and all(first)


# With the optimizations of XLA that other tests disable.
REAL_WIDTHS = """
import jax, numpy as np
from rlt_jax.inference.engine import make_engine
from rlt_jax.inference.layout import EngineConfig
from rlt_jax.types import Request
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.training.sharding import MeshConfig, make_mesh

mesh = make_mesh(MeshConfig())
model = Transformer(ModelConfig(
    vocab_size=2000, embed_dim=384, num_layers=2, num_heads=6, num_kv_heads=2,
    head_dim=64, mlp_dim=1024, max_length=512, qkv_bias=True))
params = jax.jit(lambda: init_params(model.config, jax.random.key(0)))()
rng = np.random.default_rng(0)
prompts = [rng.integers(1, 2000, n, np.int32) for n in (3, 64, 130, 1, 90, 65, 20, 7)]
requests = [Request(prompts[n // 5], n, 1 + (7 * n) % 50) for n in range(40)]

def run(sampling, order, **sizes):
    sizes = EngineConfig(page_size=32, prefill_chunk=64, **sizes)
    engine = make_engine(model, None, sampling, sizes, mesh, 256)
    chosen = [requests[n] for n in order]
    rollout = engine.generate(params, chosen, jax.random.key(1))
    pairs = zip(rollout.tokens, rollout.log_probs, strict=True)
    return dict(zip(order.tolist(), pairs, strict=True))

filters = {"top_k": 50, "top_p": 0.9}
for sampling in (
    SamplingConfig(50, stop_ids=(5,)), SamplingConfig(50, 0.7, stop_ids=(5,), **filters)
):
    first = run(sampling, np.arange(40), slots=16)
    for count, (slots, steps, cache) in enumerate(
        ((4, 8, None), (16, 3, 640), (32, 8, None), (33, 8, 1024), (64, 5, None))
    ):
        order = np.random.default_rng(count).permutation(40)
        other = run(sampling, order, slots=slots, steps=steps, cache_tokens=cache)
        for n in range(40):
            same = map(np.array_equal, first[n], other[n])
            assert all(same), (sampling, slots, steps, cache, n)
    alone = run(sampling, np.array([12]), slots=1)[12]
    assert np.array_equal(first[12][1], alone[1])
"""


@pytest.mark.slow
def test_completions_of_real_widths_are_the_same_to_the_bit() -> None:
    result = subprocess.run(
        [sys.executable, "-c", REAL_WIDTHS], capture_output=True, text=True, check=False
    )
    assert not result.returncode, result.stderr
