"""Host memory of importing a checkpoint of a billion parameters.

    python benchmarks/import_memory.py

Writes a random checkpoint of the shape of Llama 3.2 1B (1,235,814,400 parameters,
bfloat16, six shards) to a temporary folder and imports it in a process of its own, on one
CPU device and sharded over eight, as bfloat16 and as float32. On CPU devices the imported
arrays are host memory, too, so the peak is compared with their size.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}
LAYERS_PER_SHARD = 4


def write_checkpoint(folder: Path) -> None:
    """Random weights in Hugging Face layout, one shard in memory at a time."""
    import ml_dtypes
    from safetensors.numpy import save_file

    D, F = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    KH = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    def layer(number: int) -> dict[str, np.ndarray]:
        shapes = {
            "self_attn.q_proj": (D, D),
            "self_attn.k_proj": (KH, D),
            "self_attn.v_proj": (KH, D),
            "self_attn.o_proj": (D, D),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
        }
        prefix = f"model.layers.{number}."
        return {f"{prefix}{n}.weight": random(*shape) for n, shape in shapes.items()}

    def shards():
        yield {"model.embed_tokens.weight": random(CONFIG["vocab_size"], D)}
        for first in range(0, CONFIG["num_hidden_layers"], LAYERS_PER_SHARD):
            numbers = range(first, first + LAYERS_PER_SHARD)
            yield {k: v for number in numbers for k, v in layer(number).items()}
        yield {"model.norm.weight": random(D)}

    weight_map = {}
    for number, tensors in enumerate(shards(), 1):
        name = f"model-{number:05}-of-00006.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def import_it(folder: Path, devices: int, dtype: str) -> None:
    """Imports the checkpoint and prints size and peak in GB."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    import jax.numpy as jnp

    from rlt_jax.models.convert import read_config, read_params
    from rlt_jax.models.transformer import Transformer
    from rlt_jax.training.sharding import MeshConfig, make_mesh, param_shardings

    model = Transformer(read_config(folder))
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    shardings = param_shardings(model, mesh)
    params = read_params(folder, model.config, shardings, jnp.dtype(dtype))
    leaves = jax.block_until_ready(jax.tree.leaves(params))
    size = sum(leaf.nbytes for leaf in leaves) / 1e9
    count = sum(leaf.size for leaf in leaves)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"{count:,} parameters, {devices} device(s), {dtype}: size {size:.2f} GB, "
        f"peak {peak:.2f} GB, over its size {peak - size:.2f} GB"
    )


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--dtype")
    arguments = parser.parse_args()
    if arguments.folder:
        import_it(arguments.folder, arguments.devices, arguments.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        for dtype in ("bfloat16", "float32"):
            for devices in (1, 8):
                flags = [f"--devices={devices}", f"--dtype={dtype}"]
                command = [sys.executable, __file__, f"--folder={folder}", *flags]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
