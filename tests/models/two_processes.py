"""One of two processes that read a model over their devices and write it again.

python two_processes.py PROCESS_ID PORT MODEL OUT
"""

import sys

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")

from rlt_jax.models.convert import read_config, read_params, write_model
from rlt_jax.models.transformer import Transformer
from rlt_jax.training.sharding import MeshConfig, make_mesh, param_shardings


def main(process_id: str, port: str, path: str, out: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process_id))
    config = read_config(path)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = param_shardings(Transformer(config), mesh)
    params = read_params(path, config, shardings)
    whole = read_params(path, config)

    def check(
        array: jax.Array, sharding: jax.sharding.Sharding, full: jax.Array
    ) -> None:
        assert array.sharding == sharding, (array.sharding, sharding)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(full)[shard.index])

    jax.tree.map(check, params, shardings, whole)
    split = params["layers"]["mlp"]["gate"]["kernel"].addressable_shards[0].data
    assert split.size * 4 == whole["layers"]["mlp"]["gate"]["kernel"].size
    write_model(out, config, params, "qwen2")


if __name__ == "__main__":
    main(*sys.argv[1:])
