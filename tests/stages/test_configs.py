"""Every setting of the shipped configs can be overridden on the command line."""

import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from rlt_jax.stages import stage_sections
from rlt_jax.stages.score import PARTS, ScoreConfig
from rlt_jax.training.checkpoint import ModelSource

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
# The one of which all stages run.
VARIANTS = {"rlt": ("smollm2_cpu",)}
each_config = pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)

# Parses flags as the command line does, and prints the config.
PARSE = """
import json, sys
from rlt_jax import command_line
command_line.parse_flags(sys.argv)
print(command_line.config.value.to_json_best_effort())
"""


VALUES = (2, 0.5, "text", (1, 2), {"task": "file"})  # in the place of None


def parse(file: Path, *overrides: str) -> ml_collections.ConfigDict:
    """The config after overrides such as "rl.loop.steps=2"."""
    variant = VARIANTS.get(file.stem, ())
    config = runpy.run_path(str(file))["get_config"](*variant)
    argv = ["main", *(f"--config.{override}" for override in overrides)]
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=argv
    )
    values(argv)
    return flag.value


def settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Flag and value of every setting, models within a tuple included."""
    if isinstance(value, ml_collections.ConfigDict):
        for name in value:
            yield from settings(value[name], f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple) and any(
        isinstance(one, ml_collections.ConfigDict) for one in value
    ):
        for i, one in enumerate(value):
            yield from settings(one, f"{path}[{i}]")
    else:
        yield path, value


def owned(section: ml_collections.ConfigDict) -> Iterator[tuple[str, set[str], type]]:
    """Name, keys and owner of everything in a stage's section that a dataclass owns."""
    owners = importlib.import_module(f"rlt_jax.stages.{section.stage}").SECTIONS
    if dataclasses.is_dataclass(owners):
        yield "", set(section) - {"stage", "seed"}, owners
        return
    if section.stage == "score":
        yield "", set(section) - set(PARTS) - {"stage", "seed"}, ScoreConfig
    for key, owner in owners.items():
        if isinstance(owner, tuple):  # of a section or None
            owner = owner[section[key] is None]
        if dataclasses.is_dataclass(owner):
            yield key, set(section[key]), owner
    for i, student in enumerate(section.get("students", ())):
        yield f"students[{i}]", set(student), ModelSource


@each_config
def test_sections_have_all_settings_of_their_owners(file: Path) -> None:
    for name, section in stage_sections(parse(file)).items():
        for key, keys, owner in owned(section):
            fields = {field.name for field in dataclasses.fields(owner)}
            assert keys == fields, f"{name}.{key}"


@each_config
def test_every_setting_can_be_overridden(file: Path) -> None:
    """With its own value, which has its type; None by a number."""
    before = dict(settings(parse(file)))
    after = {path: 3 if value is None else value for path, value in before.items()}
    config = parse(file, *(f"{path}={value}" for path, value in after.items()))
    overridden = dict(settings(config))
    assert overridden == after
    for path, value in before.items():
        if value is not None:
            assert type(overridden[path]) is type(value), path


@each_config
def test_none_is_a_placeholder(file: Path) -> None:
    """A value of any type, or of the placeholder's own, may take its place."""
    before = dict(sections(parse(file)))
    options, numbers = {}, {}
    for where, section in before.items():
        for key in (key for key in section if section[key] is None):
            kind = section.get_type(key)
            fits = [x for x in VALUES if kind is object or isinstance(x, kind)]
            options[f"{where}.{key}" if where else key] = where, key, fits
            numbers.setdefault(key, len(numbers))  # sections can share a part
    for turn in range(2):  # so that neighbours have values of all types
        taken = {
            path: fits[(numbers[key] + 3 * turn) % len(fits)]
            for path, (_, key, fits) in options.items()
        }
        overrides = (f"{path}={value}" for path, value in taken.items())
        changed = dict(sections(parse(file, *overrides)))
        for path, (where, key, _) in options.items():
            assert changed[where].to_dict()[key] == taken[path], path


def sections(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and section, in every depth."""
    if isinstance(value, ml_collections.ConfigDict):
        yield path, value
        for name in value:
            yield from sections(value[name], f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from sections(one, f"{path}[{i}]")


def test_the_command_line_overrides_settings(tmp_path: Path) -> None:
    overrides = {
        "students": "('X', 'Y')",
        "warmup.sft.epochs": "2",
        "warmup.sft.micro_batch_size": "1",
        "collect.teacher.dtype": "bfloat16",
        "rl.rlt_reward.kl_clip": "1.5",
        "rl.rlt_reward.explanation_kl_coef": "auto",
        "rl.optimizer.learning_rate": "2e-5",
        "rl.sampling.stop": "('a', 'b')",
        "distil.held_out": "{'task': 'file', 'path': 'p'}",
        "data": "elsewhere",
    }
    flags_given = [f"--config.{key}={value}" for key, value in overrides.items()]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, "--config=configs/rlt.py:gsm8k", "--workdir=w"]
        + flags_given,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)
    assert config["students"] == ["X", "Y"]
    assert config["warmup"]["sft"]["epochs"] == 2.0
    assert config["warmup"]["sft"]["micro_batch_size"] == 1
    assert config["collect"]["teacher"]["dtype"] == "bfloat16"
    assert config["rl"]["rlt_reward"]["kl_clip"] == 1.5
    assert config["rl"]["rlt_reward"]["explanation_kl_coef"] == "auto"
    assert config["rl"]["optimizer"]["learning_rate"] == 2e-5
    assert config["rl"]["sampling"]["stop"] == ["a", "b"]
    assert config["distil"]["held_out"] == {"task": "file", "path": "p"}
    assert config["data"] == "elsewhere"
