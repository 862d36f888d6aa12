"""Stage `plan`: compiles a recipe for a TPU slice on a machine that has none.

Every device program of the recipe's stages is compiled by libtpu for the named slice.
What comes out tells whether it fits, what moves between the chips, and the least time it
can take; `plan.json` has it for programs, a table for people.
"""

import dataclasses
import inspect
import json
import math
import os
import re
import runpy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlt_jax.costs import compiled as costs
from rlt_jax.costs import hlo, kernels
from rlt_jax.costs.chips import chip_of, num_chips, num_slices, one_slice, slices
from rlt_jax.costs.roofline import roofline
from rlt_jax.costs.table import render
from rlt_jax.errors import LOG, UserError, as_user_error
from rlt_jax.files import write_json, write_whole
from rlt_jax.ranges import Checked, NonNegativeInt, PositiveInt, Range, Size
from rlt_jax.records import Record
from rlt_jax.settings import Section, build, resolve
from rlt_jax.stages import plan_shapes, setup
from rlt_jax.stages.plan_programs import PROGRAMS, Program
from rlt_jax.stages.preflight import module_of
from rlt_jax.training import compilation, hosts, sharding
from rlt_jax.training.metrics import read_jsonl

# How libtpu says that a program, or the temporaries alone, need more than there is.
_TOO_MUCH = r"(?:Used |temporaries \()([\d.]+)([TGMK])\)? (?:of|exceeds)"
_LAST_STEPS = 20  # of a run, that have the lengths of its later ones
_UNITS = {"T": 2**40, "G": 2**30, "M": 2**20, "K": 2**10}


@dataclasses.dataclass(frozen=True)
class PlanConfig(Checked):
    """What is planned.

    Attributes:
      recipe: config file; its `get_config` is given the slice if it takes an argument,
        after what stands behind the file: "32b:v5e:8x8" for "distil.py:32b".
      topology: slice, such as "v5e:8x8", or several, "2x v5e:8x8"; a chip alone, "v5e",
        finds its smallest slice on which the recipe fits.
      stages: names of the recipe's stages; () is all of a kind that can be planned.
      changes: "key=value" to set in the recipe, such as "rl.loop.group_size=32".
      prompt_tokens: mean length that times are estimated for.
      completion_tokens: likewise.
      completion_p95: length that 5% of the completions exceed; 0 if all have the mean
        length. Slots that wait for the longest completions cost time.
      lengths: metrics.jsonl of an RL run, whose last steps have the mean and the 95th
        percentile for both; "" for the values above.
      traces: sequences in a pass over the data; the steps of stages that count `epochs`
        are estimated from it, for full rows of sequences of the mean length.
      headroom: share of the memory that has to stay free.
      efficiency: share of the roofline's speed that estimated hours take for granted.
    """

    recipe: str
    topology: str
    stages: Sequence[str] = ()
    changes: Sequence[str] = ()
    prompt_tokens: Size = 2048
    completion_tokens: Size = 4096
    completion_p95: NonNegativeInt = 0
    lengths: str = ""
    traces: PositiveInt = 17_000
    headroom: Annotated[float, Range(0, 1, below=True)] = 0.05
    efficiency: Annotated[float, Range(0, 1, above=True)] = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        chip_of(self.topology)


SECTIONS = {"plan": PlanConfig}


def run(config: ConfigDict, workdir: Path, seed: int) -> Record:
    """Plans a recipe; writes `plan.json` and `plan.txt` beside the stage's folder.

    Returns:
      What plan.json holds, without its programs.

    Raises:
      UserError: the recipe does not fit, or cannot be planned.
    """
    c = build(PlanConfig, config.plan, "plan")
    result = plan(c)
    table = render(result)
    write_json(workdir.parent / "plan.json", result)
    write_whole(workdir.parent / "plan.txt", table)
    print(table)
    if not result["fits"]:
        advice = " ".join(result["recipe"]["advice"])
        raise UserError(f"{c.recipe} does not fit on {result['topology']}. {advice}")
    return {name: value for name, value in result.items() if name != "programs"}


def plan(c: PlanConfig) -> Record:
    """The plan of a slice, or of the smallest of a chip that fits."""
    if ":" in c.topology:
        return _plan_slice(c, c.topology)
    tried = []
    for topology in slices(c.topology):
        try:
            result = _plan_slice(c, topology, stop_early=True)
            fits, reason = result["fits"], "".join(result["recipe"]["advice"][:1])
        except UserError as error:  # the mesh does not fit so few chips
            fits, reason = False, str(error)
        tried.append({"topology": topology, "fits": fits, "reason": reason})
        LOG.info("plan: %s, fits: %s. %s", topology, fits, reason)
        if fits:
            return result | {"searched": tried}
    raise UserError(f"{c.recipe} fits on no slice of {c.topology}: {reason}")


def read_recipe(c: PlanConfig, topology: str) -> Record:
    """The recipe for a slice, as plain values."""
    file, _, choice = c.recipe.partition(":")
    what = f"plan.recipe={c.recipe!r}: no config file with get_config"
    with as_user_error(what, ImportError, KeyError, OSError, SyntaxError):
        get_config = runpy.run_path(file)["get_config"]
    argument = f"{choice}:{topology}" if choice else topology
    takes_slice = inspect.signature(get_config).parameters
    config = get_config(argument) if takes_slice else get_config()
    for change in c.changes:
        key, _, value = change.partition("=")
        what = f"plan.changes: {change!r}"
        config.unlock()
        with as_user_error(what, KeyError, TypeError, ValueError, end=""):
            if key.partition(".")[0] not in config:
                raise KeyError("the recipe has no such key")
            config.update_from_flattened_dict({key: json.loads(value)})
    resolve(config)
    values = config.to_dict()
    if "stage" in values:
        values = {values["stage"]: values, "pipeline": (values["stage"],)}
    known = [n for n in values["pipeline"] if values[n]["stage"] in PROGRAMS]
    names = c.stages or known
    if not names or {*names} - {*known}:
        what = f"the recipe has {', '.join(known) or 'none'} that can be planned"
        raise UserError(f"plan.stages={names}: {what}.")
    for name in names:
        section = values[name]
        keys = {"stage", "seed", *module_of(section["stage"]).SECTIONS}
        if unknown := sorted(section.keys() - keys):
            raise UserError(f"the recipe's {name!r}: unknown key {unknown[0]!r}.")
        if section.get("teaching") or section.get("lora", {}).get("rank"):
            what = "lora.rank > 0 or `teaching` cannot be planned yet"
            raise UserError(f"the recipe's {name!r}: stages with {what}.")
    return values | {"pipeline": tuple(names)}


def slice_mesh(topology: str, section: Section) -> Mesh:
    """The mesh of a stage over the devices of a slice that need not exist."""
    # No metadata server describes that slice, and no other process has its chips.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {"num_slices": num_slices(topology)}
    if num_chips(one_slice(topology)) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        name = one_slice(topology)
        described = topologies.get_topology_desc(name, "tpu", **options)
    except Exception as error:  # what libtpu raises has no class of its own
        raise UserError(
            f"plan.topology={topology!r} cannot be compiled for: "
            f"{str(error).splitlines()[0]}. Programs for TPU need libtpu (pip install "
            "'rlt_jax[plan]'); GPUs can only be planned by their shapes."
        ) from error
    return setup.load_mesh({"mesh": section}, described.devices)


def _plan_slice(c: PlanConfig, topology: str, stop_early: bool = False) -> Record:
    """Compiles all programs; `stop_early` stops at the first that does not fit."""
    recipe = read_recipe(c, topology)
    lengths = read_lengths(c)
    stages, lowered, programs = {}, [], []
    for name in recipe["pipeline"]:
        section = recipe[name]
        mesh = slice_mesh(topology, section["mesh"])
        loop = section.get("loop") or section.get("sft") or {}
        steps = steps_of(c, loop, lengths)
        stages[name] = {"mesh": dict(mesh.shape), "steps": steps, "step_seconds": 0.0}
        made = PROGRAMS[section["stage"]](section, recipe, mesh, lengths)
        # The largest programs, which are the first to fail, are the last of a stage.
        lowered += [(name, program, mesh.size) for program in reversed(made)]
    # Only now, as compiling takes long and settings may be wrong.
    for name, program, devices in lowered:
        hosts.stop_if_asked()
        result = _assess(c, f"{name}/{program.name}", program, topology, devices)
        programs.append({"stage": name} | result)
        if "roofline" in result:
            seconds = result["roofline"]["seconds"] / c.efficiency
            stages[name]["step_seconds"] += seconds * program.runs
        if stop_early and not result["fits"]:
            break
    hours = sum(x["step_seconds"] * x["steps"] for x in stages.values()) / 3600
    recipe = {
        "name": c.recipe,
        "stages": stages,
        "hours": hours,
        "chip_hours": hours * num_chips(topology),
        "lengths": lengths._asdict(),
        "traces": c.traces,
        "efficiency": c.efficiency,
        "advice": [_advice(program) for program in programs if not program["fits"]],
    }
    fits = all(program["fits"] for program in programs)
    return {"fits": fits, "topology": topology, "programs": programs, "recipe": recipe}


def read_lengths(c: PlanConfig) -> plan_shapes.Lengths:
    """The lengths that times are estimated for: those of a run, or of the config.

    Raises:
      UserError: the file of the run has none.
    """
    if not c.lengths:
        given = c.prompt_tokens, c.completion_tokens, c.completion_p95
        return plan_shapes.Lengths(*given)
    names = "rollout/length_mean", "rollout/length_p95"
    with as_user_error(f"plan.lengths={c.lengths!r}", KeyError, OSError):
        rows = read_jsonl(Path(c.lengths))
        steps = [[row[name] for name in names] for row in rows if names[0] in row]
        if not steps:
            raise KeyError(names[0])
    return plan_shapes.Lengths(c.prompt_tokens, *np.mean(steps[-_LAST_STEPS:], axis=0))


def steps_of(c: PlanConfig, loop: Section, lengths: plan_shapes.Lengths) -> int:
    """Steps of a stage; where it counts `epochs`, an estimate (see `PlanConfig`)."""
    if not loop.get("epochs"):
        return loop.get("steps", 1)
    tokens = loop["epochs"] * c.traces * lengths.sequence
    steps = math.ceil(tokens / (loop["batch_size"] * loop["row_length"]))
    LOG.info(f"plan: an estimate of {steps:,} steps from plan.traces={c.traces:,}")
    return steps


def _assess(
    c: PlanConfig, name: str, program: Program, topology: str, devices: int
) -> Record:
    """Compiles a program and says what it needs on each device."""
    began, limit = time.monotonic(), chip_of(topology).usable_bytes
    resident = sharding.device_bytes(program.resident)
    arguments = [x for x in jax.tree.leaves(program.args) if hasattr(x, "sharding")]
    total = resident + sharding.device_bytes(arguments)
    sizes, traffic = {}, {}
    if total <= limit:
        try:
            compiled = compile_program(program)
            sizes = costs.memory(compiled)
            total = resident + sizes["peak"]
            traffic = _work(program, hlo.read(compiled), topology, devices)
        except jax.errors.JaxRuntimeError as error:
            if not (needed := re.search(_TOO_MUCH, str(error))):
                raise
            total = resident + float(needed[1]) * _UNITS[needed[2]]
    headroom = 1 - total / limit
    LOG.info("plan: %s, %.0f%% free", name, 100 * headroom)
    sizes |= {"resident": resident, "total": total, "limit": limit}
    return {
        "name": name,
        "runs_per_step": program.runs,
        "model_flops": program.flops,
        "fits": bool(traffic) and headroom >= c.headroom,
        "bytes": sizes | {"headroom": headroom},
        **traffic,
        "compile_seconds": time.monotonic() - began,
    }


def _work(program: Program, made: hlo.Program, topology: str, devices: int) -> Record:
    """What a compiled program computes and moves, and the least time that it takes."""
    moved = costs.collectives(made, program.trips)
    hbm = program.hbm_bytes or costs.hbm_bytes(made, program.trips)
    network = moved.get(costs.BETWEEN_SLICES, costs.Traffic(0, 0)).bytes
    inside = sum(traffic.bytes for traffic in moved.values()) - network
    executed = costs.flops(made, program.trips) + program.kernel_flops / devices
    if (unknown := kernels.uncounted(made)) and not program.kernel_flops:
        LOG.warning("plan: %s: flops of %s are not counted", program.name, unknown)
    limits = roofline(chip_of(topology), executed, hbm, inside, network)
    return {
        "collectives": {kind: one._asdict() for kind, one in moved.items()},
        "executed_flops": executed * devices,
        "hbm_bytes": hbm,
        "roofline": limits._asdict(),
    }


def compile_program(program: Program) -> jax.stages.Compiled:
    """The program for the devices of its arguments, which need not exist."""
    with compilation.programs_not_kept():
        return program.jitted.lower(*program.args).compile()


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


def _advice(program: Section) -> str:
    room, name = program["bytes"], re.sub(r".*/|student_(\d+_)?", "", program["name"])
    needed, limit, held = (room[x] / 2**30 for x in ("total", "limit", "resident"))
    return (
        f"{program['name']} needs {needed:.1f} of {limit:.1f} GiB a device, {held:.1f} "
        f"of it held by other arrays; try {_REMEDIES[name]}, or a larger slice."
    )
