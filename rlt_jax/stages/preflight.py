"""What can be known of all stages of a run before the first one works."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rlt_jax.records import Record
from rlt_jax.report.files import check_stages
from rlt_jax.settings import Section

FILES = ("data", "held_out", "predictions", "adapter_base")  # sections that name some
MODELS = ("model", "policy", "teacher")  # sections of the model that a stage works with


def module_of(stage: str) -> Any:
    """The module of a kind of stage."""
    return importlib.import_module(f"rlt_jax.stages.{stage}")


def check(stages: Sequence[Record], to_make: Section, root: str | Path) -> None:
    """Opens the models and the data of stages, without any weights.

    Where a stage of the run makes the model, the one that it starts from is opened instead;
    where it makes the data, the stage that reads them is left out; the results that an
    evaluation is compared with then are.

    Args:
      stages: settings of the stages to check, with their seeds.
      to_make: name -> settings of the stages that the run has yet to work on.
      root: the workdir.

    Raises:
      UserError: bad input in a stage.
    """
    checked = []
    for settings in stages:
        stage = module_of(settings["stage"])
        values = with_origins(settings, to_make, root)
        files = [values.get(name) for name in FILES]
        files.append((values.get("teaching") or {}) | {"teacher": None})
        reads_files = to_make.keys() & {*stages_read(files, root)}
        if to_make.keys() & {*stages_read(values.get("evaluate"), root)}:
            values["evaluate"] = values["evaluate"] | {"compare_with": ""}
        if settings["stage"] == "report":
            check_stages(values, Path(root), to_make)
        if hasattr(stage, "prepare") and not reads_files and values not in checked:
            checked.append(values)
            stage.prepare(ConfigDict(values), values["seed"])


def with_models(settings: Section, change: Callable[[Section], Section]) -> Record:
    """Settings with every model in them changed."""
    values = dict(settings)
    for key in values.keys() & {*MODELS}:
        if isinstance(values[key], Mapping):
            values[key] = change(values[key])
    if students := values.get("students"):
        values["students"] = [change(one) for one in students]
    if teaching := values.get("teaching"):
        values["teaching"] = with_models(teaching, change)
    return values


def with_origins(settings: Section, stages: Section, root: str | Path) -> Record:
    """Settings with `origin_of` of every model in them."""
    return with_models(settings, lambda model: origin_of(model, stages, root))


def origin_of(model: Section, stages: Section, root: str | Path) -> Section:
    """The model that the stages of a run start from to make a model.

    Args:
      model: section whose path can be the folder of a stage.
      stages: name -> settings of the stages that make models.
      root: the workdir.
    """
    left = dict(stages)  # each is followed once
    while made := [n for n in stages_read(model.get("path"), root) if n in left]:
        stage = left.pop(made[0])
        model = next((stage[key] for key in MODELS if key in stage), model)
    return model


def stages_read(values: Any, root: str | Path) -> list[str]:
    """Names in the workdir `root` that paths anywhere in the values begin with."""
    texts = [x for x in jax.tree.leaves(values) if isinstance(x, str) and x]
    paths = [os.path.relpath(text, root) for text in texts]
    return [path.partition("/")[0] for path in paths if not path.startswith(".")]
