"""Stage `export`: writes a model in Hugging Face layout, into `<stage>/model/`."""

import shutil
from pathlib import Path
from typing import Any

import jax
import ml_collections

from rlt_jax.models import convert
from rlt_jax.settings import build
from rlt_jax.training import checkpoint, sharding

SECTIONS = {
    "model": checkpoint.ModelSource,
    "model_type": None,
    "dtype": None,
    "mesh": sharding.MeshConfig,
}


def run(config: ml_collections.ConfigDict, workdir: Path, seed: int) -> dict[str, Any]:
    """Exports a model.

    Args:
      config: section `model`; `model_type` (family to write it as) and `dtype` of the
        weights; section `mesh`.
      workdir: folder of the stage.
      seed: not used, all stages have it.

    Returns:
      The path and the number of parameters.
    """
    mesh = sharding.make_mesh(build(sharding.MeshConfig, config.mesh, "mesh"))
    source = build(checkpoint.ModelSource, config.model, "model")
    model, params, tokenizer = checkpoint.load(source, mesh, jax.random.key(seed))
    target = workdir / "model"
    if target.exists():  # of a run that was cut off between here and done.json
        shutil.rmtree(target)
    convert.write_model(
        target,
        model.config,
        params,
        config.model_type,
        tokenizer.path,
        tokenizer.stop_ids,
        dtype=config.dtype,
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"path": str(target), "parameters": size}
