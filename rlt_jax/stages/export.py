"""Stage `export`: writes a model in Hugging Face layout, into `<stage>/model/`."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rlt_jax.errors import UserError, check_choice
from rlt_jax.models import convert, peft
from rlt_jax.models.config import DTYPES
from rlt_jax.models.families import family
from rlt_jax.models.weight_files import read_json
from rlt_jax.records import Record
from rlt_jax.settings import build
from rlt_jax.stages import setup
from rlt_jax.training import checkpoint, hosts, sharding
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.types import Params

SECTIONS = {
    "model": checkpoint.ModelSource,
    "model_type": None,  # the family to write it as, "" for the first that can be
    "dtype": None,  # of the weights
    "adapter_base": None,  # "" exports a whole model; else the model of the adapters
    "mesh": sharding.MeshConfig,
}


def run(config: ConfigDict, workdir: Path, seed: int) -> Record:
    """Exports a model with its tokenizer, stop ids and a model card.

    With `adapter_base`, the folder or Hub id of the model that the stage's adapters were
    trained on, it exports the adapters alone, in the layout of PEFT.

    Returns:
      The path and the number of parameters.
    """
    check_choice("export.dtype", config.dtype, DTYPES)
    mesh = setup.load_mesh(config)
    source = build(checkpoint.ModelSource, config.model, "model")
    model, params, tokenizer = checkpoint.load(source, mesh, jax.random.key(seed))
    model_type = config.model_type or convert.model_type_of(model.config)
    target = workdir / "model"
    # Of a run that was cut off between here and done.json.
    hosts.from_first(lambda: shutil.rmtree(target, ignore_errors=True))
    if config.adapter_base:
        params, alpha = _adapters(source)
        if hosts.is_first():
            kind = family(model_type)
            peft.write_adapter(target, params, kind, config.adapter_base, alpha)
            convert.copy_tokenizer(tokenizer.path, target)
    else:
        convert.write_model(
            target,
            model.config,
            params,
            model_type,
            tokenizer.path,
            tokenizer.stop_ids,
            dtype=jnp.dtype(config.dtype),
        )
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    card = _model_card(source, size, str(config.dtype))
    if hosts.is_first():
        checkpoint.write_chat_template(target, tokenizer)
        (target / "README.md").write_text(card, encoding="utf-8")
    return {"path": str(target), "parameters": size}


def _adapters(source: checkpoint.ModelSource) -> tuple[Params, float]:
    """The adapters of a stage that trained them, and their alpha.

    Raises:
      UserError: there are none.
    """
    path = checkpoint.find_model(source.path)
    file = path / "settings.json"
    settings = read_json(file) if file.is_file() else {}
    lora = build(LoRAConfig, settings.get("lora", {}), "lora")
    if not lora.rank:
        raise UserError(
            f"model {path}: it is no stage that trained adapters (lora.rank)."
        )
    return checkpoint.read_item(path, "adapters"), lora.alpha


def _model_card(source: checkpoint.ModelSource, size: int, dtype: str) -> str:
    """What the model was made from, with the settings of every stage on the way."""
    what = f"{size:,} parameters in {dtype}, exported by rlt_jax from `{source.path}`."
    lines = ["# Model card", "", what, ""]
    for folder, settings in _lineage(Path(source.path)):
        text = json.dumps(settings, indent=1)
        lines += [f"## Stage `{folder.name}`", "", "```json", text, "```", ""]
    return "\n".join(lines)


def _lineage(folder: Path) -> list[tuple[Path, Record]]:
    """Settings of the stage in a folder, and of those that its model came from."""
    stages = []
    while (folder / "settings.json").is_file():
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        stages.append((folder, settings))
        before = settings.get("model") or settings.get("teacher") or {}
        folder = Path(before.get("path") or "/none")
    return stages
