"""Stage `plan`: compiles a recipe for a TPU slice on a machine that has none.

Every device program of the recipe's stages is compiled by libtpu for the named slice.
What comes out tells whether it fits, what moves between the chips, and the least time it
can take; `plan.json` has it for programs, a table for people.
"""

import dataclasses
import inspect
import json
import logging
import os
import re
import runpy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies
from jax.sharding import Mesh

from rlt_jax.costs import compiled as costs
from rlt_jax.costs.chips import Chip, chip_of, num_chips, slices
from rlt_jax.costs.roofline import roofline
from rlt_jax.costs.table import render
from rlt_jax.errors import UserError
from rlt_jax.settings import build
from rlt_jax.stages.plan_programs import PROGRAMS, Program
from rlt_jax.stages.plan_shapes import Lengths
from rlt_jax.training import hosts, sharding
from rlt_jax.training.compilation import programs_not_kept

_LOG = logging.getLogger("rlt_jax")

# How libtpu says that a program, or the temporaries alone, need more than there is.
_TOO_MUCH = r"(?:Used |temporaries \()([\d.]+)([GM])\)? (?:of|exceeds)"


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What is planned.

    Attributes:
      recipe: config file; its `get_config` is given the slice if it takes an argument,
        after what stands behind the file: "32b:v5e:8x8" for "distil.py:32b".
      topology: slice, such as "v5e:8x8"; a chip alone, "v5e", finds its smallest slice
        on which the recipe fits.
      stages: names of the recipe's stages; () is all of a kind that can be planned.
      changes: "key=value" to set in the recipe, such as "rl.loop.group_size=32".
      prompt_tokens: mean length that times are estimated for.
      completion_tokens: likewise.
      headroom: share of the memory that has to stay free.
      efficiency: share of the roofline's speed that estimated hours take for granted.
    """

    recipe: str
    topology: str
    stages: Sequence[str] = ()
    changes: Sequence[str] = ()
    prompt_tokens: int = 2048
    completion_tokens: int = 4096
    headroom: float = 0.05
    efficiency: float = 0.4

    def __post_init__(self) -> None:
        chip_of(self.topology)
        if not 0 <= self.headroom < 1 or not 0 < self.efficiency <= 1:
            raise UserError("plan.headroom and plan.efficiency are shares of 1.")


SECTIONS = {"plan": PlanConfig}


def run(config: ml_collections.ConfigDict, workdir: Path, seed: int) -> dict[str, Any]:
    """Plans a recipe; writes `plan.json` and `plan.txt` beside the stage's folder.

    Returns:
      What plan.json holds, without its programs.

    Raises:
      UserError: the recipe does not fit, or cannot be planned.
    """
    c = build(PlanConfig, config.plan, "plan")
    found = plan(c)
    root = workdir.parent
    (root / "plan.json").write_text(json.dumps(found, indent=1) + "\n")
    table = render(found)
    (root / "plan.txt").write_text(table)
    print(table)
    if not found["fits"]:
        advice = " ".join(found["recipe"]["advice"])
        raise UserError(f"{c.recipe} does not fit on {found['topology']}. {advice}")
    return {name: value for name, value in found.items() if name != "programs"}


def plan(c: PlanConfig) -> dict[str, Any]:
    """The plan of a slice, or of the smallest of a chip that fits."""
    if ":" in c.topology:
        return _plan_slice(c, c.topology, read_recipe(c, c.topology))
    tried = []
    for topology in slices(c.topology):
        try:
            found = _plan_slice(c, topology, read_recipe(c, topology), give_up=True)
            reason = "" if found["fits"] else found["recipe"]["advice"][0]
        except UserError as error:  # a mesh that cannot be, on so few chips
            found, reason = None, str(error)
        fits = bool(found and found["fits"])
        tried.append({"topology": topology, "fits": fits, "reason": reason})
        _LOG.info(
            "plan: %s %s %s", topology, "fits" if fits else "is too small", reason
        )
        if fits:
            return found | {"searched": tried}
    raise UserError(f"{c.recipe} fits on no slice of {c.topology}: {reason}")


def read_recipe(c: PlanConfig, topology: str) -> dict[str, Any]:
    """The recipe for a slice, as plain values."""
    file, _, choice = c.recipe.partition(":")
    try:
        get_config = runpy.run_path(file)["get_config"]
    except (OSError, KeyError) as error:
        raise UserError(
            f"plan.recipe={c.recipe!r}: no config file with get_config ({error})."
        ) from error
    takes_slice = bool(inspect.signature(get_config).parameters)
    argument = f"{choice}:{topology}" if choice else topology
    config = get_config(argument) if takes_slice else get_config()
    for change in c.changes:
        key, _, value = change.partition("=")
        try:
            with config.unlocked():
                config.update_from_flattened_dict({key: json.loads(value)})
        except (KeyError, ValueError) as error:
            raise UserError(f"plan.changes: {change!r}: {error}") from error
    values = config.to_dict()
    if "stage" in values:
        values = {values["stage"]: values, "pipeline": (values["stage"],)}
    names = c.stages or [
        name for name in values["pipeline"] if values[name]["stage"] in PROGRAMS
    ]
    if unknown := [name for name in names if name not in values["pipeline"]]:
        raise UserError(f"plan.stages: the recipe has no stage {unknown[0]!r}.")
    return values | {"pipeline": tuple(names)}


def slice_mesh(topology: str, section: Mapping[str, Any]) -> Mesh:
    """The mesh of a stage over the devices of a slice that need not exist."""
    # No metadata server describes that slice, and no other process has its chips.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    single = {} if num_chips(topology) > 1 else {"chips_per_host_bounds": [1, 1, 1]}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **single
        )
    except Exception as error:  # what libtpu raises has no class of its own
        raise UserError(
            f"plan.topology={topology!r} cannot be compiled for: "
            f"{str(error).splitlines()[0]}. Programs for TPU need libtpu (pip install "
            "'rlt_jax[plan]'); GPUs can only be planned by their shapes."
        ) from error
    sizes = build(sharding.MeshConfig, section, "mesh")
    return sharding.make_mesh(sizes, described.devices)


def _plan_slice(
    c: PlanConfig, topology: str, recipe: dict[str, Any], give_up: bool = False
) -> dict[str, Any]:
    """Compiles all programs; `give_up` stops at the first that does not fit."""
    chip, lengths = chip_of(topology), Lengths(c.prompt_tokens, c.completion_tokens)
    programs, steps, meshes, stages = [], {}, {}, {}
    for name in recipe["pipeline"]:
        section = recipe[name]
        mesh = slice_mesh(topology, section["mesh"])
        meshes[name] = dict(mesh.shape)
        loop = section.get("loop") or section.get("sft") or {}
        steps[name] = loop.get("steps", 1)
        stage = PROGRAMS[section["stage"]]
        stages[name] = mesh, stage(section, recipe, mesh, lengths)
    # Only now, as compiling takes long and settings may be wrong.
    for name, (mesh, lowered) in stages.items():
        # The largest are the first to fail.
        for program in reversed(lowered):
            hosts.stop_if_asked()
            programs.append(_assess(c, name, program, chip, mesh))
            if give_up and not programs[-1]["fits"]:
                return _found(c, topology, meshes, steps, programs)
    return _found(c, topology, meshes, steps, programs)


def _assess(
    c: PlanConfig, stage: str, program: Program, chip: Chip, mesh: Mesh
) -> dict[str, Any]:
    """Compiles a program and says what it needs on each device."""
    began = time.monotonic()
    resident = sharding.device_bytes(program.resident)
    limit = chip.usable_bytes
    result = {"stage": stage, "name": f"{stage}/{program.name}"}
    result |= {"runs_per_step": program.runs, "model_flops": program.flops}
    arguments = [x for x in jax.tree.leaves(program.args) if hasattr(x, "sharding")]
    least = resident + sharding.device_bytes(arguments)
    if least > limit:
        return result | _too_large(resident, least, limit, began)
    try:
        made = compile_program(program)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(_TOO_MUCH, str(error))
        if not needed:
            raise
        total = float(needed[1]) * 2 ** {"G": 30, "M": 20}[needed[2]] + resident
        return result | _too_large(resident, total, limit, began)
    text, memory = made.as_text(), costs.memory(made)
    total = memory.peak + resident
    moved = costs.collectives(text, program.trips)
    hbm = program.hbm_bytes or costs.hbm_bytes(text, program.trips)
    between = sum(traffic.bytes for traffic in moved.values())
    limits = roofline(chip, program.flops / mesh.size, hbm, between)
    room = _room(resident, total, limit)
    _LOG.info("plan: %s compiled, %.0f%% free", result["name"], 100 * room["headroom"])
    return result | {
        "fits": room["headroom"] >= c.headroom,
        "bytes": memory._asdict() | room,
        "collectives": {kind: one._asdict() for kind, one in moved.items()},
        "hbm_bytes": hbm,
        "roofline": limits._asdict(),
        "compile_seconds": time.monotonic() - began,
    }


def compile_program(program: Program) -> Any:
    """The program for the devices of its arguments, which need not exist."""
    with programs_not_kept():
        return program.jitted.lower(*program.args).compile()


def _too_large(resident: int, total: float, limit: int, began: float) -> dict[str, Any]:
    """A program that was refused: total is the least that it needs."""
    seconds = time.monotonic() - began
    room = _room(resident, total, limit)
    return {"fits": False, "bytes": room, "compile_seconds": seconds}


def _room(resident: int, total: float, limit: int) -> dict[str, float]:
    """Bytes that stay beside a program, those of all, those there are; the free share."""
    room = {"resident": resident, "total": total, "limit": limit}
    return room | {"headroom": 1 - total / limit}


def _found(
    c: PlanConfig,
    topology: str,
    meshes: Mapping[str, Any],
    steps: Mapping[str, int],
    programs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The plan, with estimates for the whole recipe and what to change."""
    seconds = dict.fromkeys(meshes, 0.0)
    for program in programs:
        if "roofline" in program:
            once = program["roofline"]["seconds"] / c.efficiency
            seconds[program["stage"]] += once * program["runs_per_step"]
    hours = sum(seconds[name] * steps[name] for name in meshes) / 3600
    stages = {
        name: {"mesh": mesh, "steps": steps[name], "step_seconds": seconds[name]}
        for name, mesh in meshes.items()
    }
    recipe = {
        "name": c.recipe,
        "stages": stages,
        "hours": hours,
        "chip_hours": hours * num_chips(topology),
        "prompt_tokens": c.prompt_tokens,
        "completion_tokens": c.completion_tokens,
        "efficiency": c.efficiency,
        "advice": [_advice(program) for program in programs if not program["fits"]],
    }
    return {
        "fits": all(program["fits"] for program in programs),
        "topology": topology,
        "programs": programs,
        "recipe": recipe,
    }


_REMEDIES = {
    "weights": "engine.weights='int8', or a larger mesh.tensor",
    "prefill": "fewer engine.slots or engine.cache_tokens, a smaller prefill_chunk",
    "decode": "fewer engine.slots or engine.cache_tokens, engine.weights='int8'",
    "log_probs": "fewer rows.micro_batch_size, loop.offload, a larger mesh.fsdp",
    "reward": "fewer completions, a larger mesh.fsdp",
    "update": "remat='full', fewer rows at once, optimizer.state_dtype='bfloat16', a "
    "larger mesh.fsdp or mesh.tensor",
    "mix": "a larger mesh.fsdp, loop.offload",
}


def _advice(program: Mapping[str, Any]) -> str:
    room = program["bytes"]
    name = re.sub(r".*/|student_(\d+_)?", "", program["name"])
    needed, limit, held = (room[x] / 2**30 for x in ("total", "limit", "resident"))
    return (
        f"{program['name']} needs {needed:.1f} of {limit:.1f} GiB a device, {held:.1f} "
        f"of it held by other arrays; try {_REMEDIES[name]}, or a larger slice."
    )
