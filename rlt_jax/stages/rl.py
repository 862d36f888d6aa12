"""Stage `rl`: policy gradients on a teacher or a student.

A teacher is rewarded by what a student makes of its explanations, a student by whether its
answers are right; the reward is a sum of named terms and the loop is the same.
`run` sets up, `train` is the loop. One step, with P prompts of R completions each:
prompts -> rollout -> rows -> scores -> reward -> advantages -> updates -> reference.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from rlt_jax.data import pipeline
from rlt_jax.data.scoring import RowShape
from rlt_jax.data.templates import Problem, load_template
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.rl import policy_update
from rlt_jax.rl.losses import ObjectiveConfig
from rlt_jax.rl.metrics import over_updates, reward_metrics
from rlt_jax.rl.rlt_reward import RLTRewardConfig
from rlt_jax.rl.scorer import StudentsConfig
from rlt_jax.settings import build
from rlt_jax.stages.experience import (
    evaluate_held_out,
    gather_experience,
    load_writing,
)
from rlt_jax.stages.policy_programs import Programs, compile_programs
from rlt_jax.stages.roles import (
    PROMPTS,
    Roles,
    check_fit,
    load_models,
    load_problems,
    load_rows,
    sample_rows,
)
from rlt_jax.training import checkpoint, hosts, offload, sharding
from rlt_jax.training.lora import LoRAConfig, Tuning, make_tuning
from rlt_jax.training.metrics import (
    MetricWriter,
    append_jsonl,
    keep_rows_before,
    memory_metrics,
    phase_metrics,
    steps,
)
from rlt_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlt_jax.training.state import (
    check_skipped,
    from_items,
    new_state,
    state_shardings,
    to_items,
)
from rlt_jax.types import Params, TrainState

_LOG = logging.getLogger("rlt_jax")


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Settings of the loop.

    Attributes:
      steps: rollouts.
      batch_size: P, prompts per step, over all devices.
      group_size: R, completions per prompt.
      format: "teacher", which sees the solution and explains it, or "student".
      updates_per_rollout: optimizer steps on the same completions.
      sync_every: steps between two mixings of the reference; 0 leaves it as it is.
      sync_alpha: share of the policy in the mixed reference.
      self_teaching: the reward's student is a copy of the policy.
      student_sync_every: steps between two mixings of that copy; 0 leaves it as it is.
      student_sync_alpha: share of the policy in the mixed copy.
      offload: reference and students are in the host's memory between uses.
      sample_every: steps between completions written to samples.jsonl.
      evaluate_every: steps between evaluations on the held-out problems, besides the
        first and the last; the best checkpoint of them is kept in `best`.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: how many of them stay.
      max_skipped: updates in a row that may be skipped before the run stops.
      profile_steps: first of the steps that are profiled, and the one after the last.
      rollouts: folder in which the completions of every step are kept; what is there
        already is taken from there, which replays a run.
    """

    steps: int
    batch_size: int
    group_size: int
    format: str = "teacher"
    updates_per_rollout: int = 1
    sync_every: int = 32
    sync_alpha: float = 0.9
    self_teaching: bool = False
    student_sync_every: int = 1
    student_sync_alpha: float = 1.0
    offload: bool = False
    sample_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 20
    keep_checkpoints: int = 1
    max_skipped: int = 5
    profile_steps: Sequence[int] = ()
    rollouts: str = ""

    def __post_init__(self) -> None:
        if len(self.profile_steps) not in (0, 2):
            raise UserError(f"loop.profile_steps={self.profile_steps}: (first, end).")
        for name in ("steps", "batch_size", "updates_per_rollout", "max_skipped"):
            if getattr(self, name) < 1:
                raise UserError(f"loop.{name}={getattr(self, name)}: at least 1.")
        if self.group_size < 2:
            raise UserError(f"group_size={self.group_size}: a group needs at least 2.")
        if self.format not in PROMPTS:
            raise UserError(
                f"loop.format={self.format!r}: one of {', '.join(PROMPTS)}."
            )


SECTIONS = {
    "policy": checkpoint.ModelSource,
    "student": None,  # a ModelSource, several, or None: self-teaching, or no RLT term
    "students": StudentsConfig,
    "template": None,
    "data": None,
    "held_out": None,
    "rows": RowShape,
    "sampling": SamplingConfig,
    "engine": EngineConfig,
    "reward": RLTRewardConfig,
    "terms": None,
    "objective": ObjectiveConfig,
    "loop": RLConfig,
    "lora": LoRAConfig,
    "optimizer": OptimizerConfig,
    "mesh": sharding.MeshConfig,
}


class Trees(NamedTuple):
    """The arrays of a run, all of them in its checkpoints.

    Attributes:
      state: of the policy.
      reference: parameters, {} where the objective has none.
      student: the policy's copy in self-teaching, else {}.
    """

    state: TrainState
    reference: Params
    student: Params


def run(config: ml_collections.ConfigDict, workdir: Path, seed: int) -> dict[str, Any]:
    """Trains a policy.

    Args:
      config: sections as in `SECTIONS`.
      workdir: folder of the stage.
      seed: of everything random.

    Returns:
      Held-out reward and terms before and after, with standard errors.
    """
    c = build(RLConfig, config.loop, "loop")
    objective = build(ObjectiveConfig, config.objective, "objective")
    mesh = sharding.make_mesh(build(sharding.MeshConfig, config.mesh, "mesh"))
    roles = load_rl_roles(config, c, mesh, seed)
    sampling = build(SamplingConfig, config.sampling, "sampling")
    problems = load_problems(config.data, roles.template, seed)
    held_out = load_problems(config.held_out, roles.template, seed)
    check_fit(roles, sampling, [*problems, *held_out], c.format)

    updates = c.steps * c.updates_per_rollout
    tx = make_optimizer(build(OptimizerConfig, config.optimizer, "optimizer"), updates)
    params, key = roles.teacher.params, jax.random.key(seed)
    low_rank = build(LoRAConfig, config.lora, "lora")
    tuning, trained = make_tuning(low_rank, roles.teacher.model, params, mesh, key)
    shardings = state_shardings(tuning.model, tx, mesh)
    writing, kl_coef = load_writing(
        config, c.format, roles, mesh, c.updates_per_rollout
    )
    programs = compile_programs(
        c.group_size, objective, writing, tuning, tx, mesh, shardings
    )
    trees = Trees(
        new_state(trained, tx, shardings),
        _copy(params, c.offload, "reference") if objective.beta else {},
        _copy(params, c.offload, "student") if c.self_teaching else {},
    )
    roles = roles._replace(teacher=roles.teacher._replace(params=None))
    prompts = pipeline.problem_batches(problems, c.batch_size, seed)
    del params, trained
    checkpoint.describe(workdir, roles.teacher.model, roles.teacher.tokenizer)
    _log_sizes(c, roles, mesh)
    held_out = held_out[: c.batch_size * c.group_size]
    return train(
        c, programs, roles, problems, held_out, prompts, trees, kl_coef, key, workdir
    )


def train(
    c: RLConfig,
    programs: Programs,
    roles: Roles,
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
    prompts: grain.DatasetIterator,
    trees: Trees,
    kl_coef: float | None,
    key: jax.Array,
    workdir: Path,
) -> dict[str, Any]:
    """The loop; resumes from the latest checkpoint in the workdir.

    Without a `kl_coef` the weight of the explanation KL is balanced to the solution
    score on the held-out problems before the first step.
    """
    samples, best = workdir / "samples.jsonl", workdir / "best"
    tuning = programs.tuning
    with checkpoint.open_manager(workdir, c.keep_checkpoints) as manager:
        first, trees, start = _restore(manager, tuning, trees, prompts)
        keep_rows_before(samples, first)

        def evaluate(step: int, kl_coef: float | None) -> tuple[float, dict]:
            kl_coef, found, rows = evaluate_held_out(
                programs.writing,
                roles,
                tuning.merge(trees.state.params),
                (trees.student,) if c.self_teaching else roles.student_params,
                held_out,
                c.batch_size * c.group_size,
                jax.random.fold_in(key, 2**31 - 1),
                kl_coef,
            )
            append_jsonl(samples, _of_step(step, "held_out", rows))
            return kl_coef, found

        if start is None:
            kl_coef, found = evaluate(0, kl_coef)
            start = {"kl_coef": kl_coef, "best": found["reward"]}
            start |= _named(found, "first")
        kl_coef = start["kl_coef"]
        with MetricWriter(workdir, first) as writer:
            for step in steps(first, c.steps, workdir, c.profile_steps):
                done, began = step + 1, time.monotonic()
                chosen = [problems[i] for i in next(prompts)]
                group = [problem for problem in chosen for _ in range(c.group_size)]
                state, reference, student = trees

                experience = gather_experience(
                    programs.writing,
                    roles,
                    tuning.merge(state.params),
                    (student,) if c.self_teaching else roles.student_params,
                    group,
                    jax.random.fold_in(key, step),
                    kl_coef,
                    Path(c.rollouts) / f"{step:06d}.jsonl" if c.rollouts else None,
                )
                reward, rows = experience.reward, experience.rows
                advantages, counted, metrics = programs.advantages(
                    reward.value, experience.finished
                )
                batch = policy_update.PolicyBatch(
                    rows,
                    experience.spans,
                    advantages,
                    experience.log_probs,
                    programs.reference(reference, rows, experience.spans)
                    if reference
                    else None,
                    counted,
                    experience.sampler_log_probs,
                )
                updates, updating = [], time.monotonic()
                for _ in range(c.updates_per_rollout):
                    state, updated = programs.update(state, batch)
                    updates.append(updated)
                if reference and c.sync_every and done % c.sync_every == 0:
                    reference = programs.mix(reference, state.params, c.sync_alpha)
                every = c.student_sync_every
                if student and every and done % every == 0:
                    student = programs.mix(student, state.params, c.student_sync_alpha)
                trees = Trees(state, reference, student)

                # Or the next rollout's time would have this in it.
                jax.block_until_ready(trees)
                taken = time.monotonic() - updating
                tokens = len(updates) * experience.num_tokens
                metrics |= phase_metrics("update", tokens, taken)
                metrics |= reward_metrics(reward) | over_updates(updates)
                metrics |= experience.metrics | memory_metrics()
                metrics["time/step_seconds"] = time.monotonic() - began
                if c.evaluate_every and done % c.evaluate_every == 0:
                    _, found = evaluate(done, kl_coef)
                    metrics |= {f"held_out/{name}": x for name, x in found.items()}
                    if found["reward"] > start["best"]:
                        start["best"] = found["reward"]
                        checkpoint.save_model(
                            best, done, roles.teacher, tuning.merge(state.params)
                        )
                check_skipped(writer.write(step, metrics), c.max_skipped)
                if step % c.sample_every == 0:
                    firsts = slice(0, None, c.group_size)
                    written = sample_rows(
                        roles, c.format, group, experience.completions, reward, firsts
                    )
                    append_jsonl(samples, _of_step(step, "train", written))
                stop = hosts.stopping()
                if done % c.checkpoint_every == 0 or done == c.steps or stop:
                    # A checkpoint's steps have their rows.
                    check_skipped(writer.flush(), c.max_skipped)
                    data = {"prompts": prompts.get_state(), "start": start}
                    items = {"params": tuning.merge(state.params)}
                    items |= _items(tuning, trees)
                    checkpoint.save(manager, done, items, data)
                if stop:
                    raise hosts.Stopped
        _, end = evaluate(c.steps, kl_coef)
        manager.wait_until_finished()
    return start | _named(end, "last")


def load_rl_roles(
    config: Mapping[str, Any], c: RLConfig, mesh: Mesh, seed: int
) -> Roles:
    """The policy as "teacher" of the roles, and the reward's students."""
    if c.self_teaching and config["student"] is not None:
        raise UserError("loop.self_teaching: set `student` to None, it is the policy.")
    rows = load_rows(config, mesh)
    policy, *students = load_models(config["policy"], config["student"], mesh, seed)
    students = [
        student._replace(params=offload.keep(student.params, c.offload, "student"))
        for student in students
    ]
    if c.self_teaching:
        students = [policy._replace(params=None)]
    return Roles(policy, tuple(students), load_template(config["template"]), rows)


def _log_sizes(c: RLConfig, roles: Roles, mesh: Mesh) -> None:
    """Prints what the settings make of the devices."""
    groups, lines = sharding.num_groups(mesh), roles.rows.micro_batch_size
    _LOG.info(
        f"a step: {c.batch_size} prompts x {c.group_size} completions = "
        f"{c.batch_size * c.group_size}; {lines} lines of {roles.rows.row_length} tokens "
        f"a micro-batch, {lines // groups} a device group ({groups} groups)"
    )


def _named(found: dict[str, float], when: str) -> dict[str, float]:
    return {f"held_out_{name}_{when}": value for name, value in found.items()}


def _copy(params: Params, offloaded: bool, name: str) -> Params:
    return offload.keep(jax.tree.map(jnp.copy, params), offloaded, name)


def _of_step(step: int, split: str, rows: list[dict[str, Any]]) -> list[dict]:
    return [{"step": step, "split": split, **row} for row in rows]


def _items(tuning: Tuning, trees: Trees) -> dict[str, Any]:
    state, reference, student = trees
    items = to_items(state, tuning.item)
    optional = {"reference": reference, "student": student}
    return items | {name: tree for name, tree in optional.items() if tree}


def _restore(
    manager: Any, tuning: Tuning, trees: Trees, prompts: Any
) -> tuple[int, Trees, dict[str, float] | None]:
    restored = checkpoint.restore_latest(manager, _items(tuning, trees))
    if restored is None:
        return 0, trees, None
    first, items, data = restored
    prompts.set_state(data["prompts"])
    reference, student = (items.get(name, {}) for name in ("reference", "student"))
    state = from_items(items, tuning.item)
    return first, Trees(state, reference, student), data["start"]
