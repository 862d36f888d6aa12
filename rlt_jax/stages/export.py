"""Stage `export`: writes a model in Hugging Face layout, into `<stage>/model/`."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rlt_jax.errors import LOG, UserError
from rlt_jax.files import read_json, write_whole
from rlt_jax.models import convert, peft
from rlt_jax.models.config import DTYPES
from rlt_jax.models.config_json import config_to_json
from rlt_jax.models.families import FAMILIES, Family, family
from rlt_jax.ranges import OneOf
from rlt_jax.records import Record
from rlt_jax.settings import build
from rlt_jax.stages import setup
from rlt_jax.stages.preflight import MODELS
from rlt_jax.training import checkpoint, hosts, sharding
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.types import Params

SECTIONS = {
    "model": checkpoint.ModelSource,
    # The family to write it as, "" for the first that can be.
    "model_type": Annotated[str, OneOf(("", *FAMILIES))],
    "dtype": Annotated[str, OneOf(DTYPES)],  # of the weights
    "adapter_base": str,  # "" exports a whole model; else the model of the adapters
    "mesh": sharding.MeshConfig,
}


def run(config: ConfigDict, workdir: Path, seed: int) -> Record:
    """Exports a model with its tokenizer, stop ids and a model card.

    With `adapter_base`, the folder or Hub id of the model that the stage's adapters were
    trained on, it exports the adapters alone, in the layout of PEFT.

    Returns:
      The path and the number of parameters.
    """
    mesh = setup.load_mesh(config)
    (model, _, tokenizer), model_type = prepare(config, seed)
    source = build(checkpoint.ModelSource, config.model, "model")
    target, dtype = workdir / "model", str(config.dtype)
    # Of a run that was cut off between here and done.json.
    hosts.from_first(lambda: shutil.rmtree(target, ignore_errors=True))
    if config.adapter_base:
        args = Path(source.path), config.adapter_base, family(model_type)
        params, dtype = _write_adapter(target, *args), "float32"
        hosts.from_first(lambda: convert.copy_tokenizer(tokenizer.path, target))
    else:
        params = checkpoint.load_params(source, model, mesh, jax.random.key(seed))
        files = (tokenizer.path, tokenizer.stop_ids, jnp.dtype(dtype))
        convert.write_model(target, model.config, params, model_type, *files)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    card = _model_card(source, size, dtype)
    if hosts.is_first():
        checkpoint.write_chat_template(target, tokenizer)
        write_whole(target / "README.md", card)
    return {"path": str(target), "parameters": size}


def prepare(config: ConfigDict, seed: int) -> tuple[checkpoint.LoadedModel, str]:
    """The model without its weights, and the name of the family to write it as.

    Raises:
      UserError: there is no such model, or it is not of that family; or PEFT cannot put
        adapters on `adapter_base`.
    """
    opened = checkpoint.open_model(build(checkpoint.ModelSource, config.model, "model"))
    if base := config.adapter_base:
        file = checkpoint.find_model(base) / convert.CONFIG
        kind = read_json(file, {}).get("model_type")
        # PEFT has other names for layers of multimodal models.
        if not kind or family(kind).skipped:
            what = f"adapter_base={base!r} is no text model in Hugging Face format"
            raise UserError(f"{what}; export it.")
    else:
        kind = config.model_type or convert.model_type_of(opened.model.config)
        config_to_json(opened.model.config, kind)  # raises UserError
    return opened, kind


def _write_adapter(target: Path, path: Path, base: str, kind: Family) -> Params:
    """Writes the adapters of a stage in float32, and returns them.

    Raises:
      UserError: the stage has none.
    """
    _, settings, began = next(iter(_lineage(path)), (path, {}, ""))
    lora = build(LoRAConfig, settings.get("lora", {}), "lora")
    if not lora.rank:
        raise UserError(f"model {path} is no stage that trained adapters (lora.rank).")
    if began != base:
        LOG.warning("adapter_base=%s has to have the weights of %r", base, began)
    adapters = checkpoint.read_item(path, "adapters")
    if hosts.is_first():
        peft.write_adapter(target, adapters, kind, base, lora.alpha)
    return adapters


def _model_card(source: checkpoint.ModelSource, size: int, dtype: str) -> str:
    """What the model was made from, with the settings of every stage on the way."""
    what = f"{size:,} parameters in {dtype}, exported by rlt_jax from `{source.path}`."
    lines = ["# Model card", "", what, ""]
    for folder, settings, _ in _lineage(Path(source.path)):
        text = json.dumps(settings, indent=1)
        lines += [f"## Stage `{folder.name}`", "", "```json", text, "```", ""]
    return "\n".join(lines)


def _lineage(folder: Path) -> list[tuple[Path, Record, str]]:
    """The stage in a folder and those its model came from: settings, path of the model."""
    stages = []
    while (folder / "settings.json").is_file():
        settings = read_json(folder / "settings.json")
        began = next(filter(None, map(settings.get, MODELS)), {}).get("path") or ""
        stages.append((folder, settings, began))
        folder = Path(began or "/none")
    return stages
