"""Stage `rl`: policy gradients on a teacher or a student.

A teacher is rewarded by what a student makes of its explanations, a student by whether its
answers are right; the reward is a sum of named terms and the loop is the same. `run` sets
up, `train` is the loop; `rl_journal.py` keeps metrics, samples and checkpoints.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rlt_jax.data import pipeline, rows
from rlt_jax.errors import LOG, UserError
from rlt_jax.inference import layout, log_probs
from rlt_jax.records import Problem, Record
from rlt_jax.rl import advantages, rewards
from rlt_jax.rl.grading import check_gradable
from rlt_jax.rl.losses import ObjectiveConfig, policy_loss
from rlt_jax.rl.teaching import TeachingConfig, mix_advantages
from rlt_jax.settings import build
from rlt_jax.stages import setup
from rlt_jax.stages.rl_config import RLConfig
from rlt_jax.stages.rl_journal import Journal, Weights
from rlt_jax.stages.teaching import Teacher, load_weights, open_teacher
from rlt_jax.training import checkpoint, lora, offload, optimizer, sharding
from rlt_jax.training.learner import Learner
from rlt_jax.types import Array, Batch, Params

SECTIONS = setup.SECTIONS | {
    "policy": checkpoint.ModelSource,
    "data": pipeline.check_problems,
    "held_out": pipeline.check_problems,
    "reward_terms": lambda terms, where: rewards.make_terms(terms),
    "objective": ObjectiveConfig,
    "teaching": (TeachingConfig, None),
    "loop": RLConfig,
    "lora": lora.LoRAConfig,
    "optimizer": optimizer.OptimizerConfig,
}


def run(config: ConfigDict, workdir: Path, seed: int) -> Record:
    """Trains a policy.

    Args:
      config: sections as in `SECTIONS`.
      workdir: folder of the stage.
      seed: seed of everything random.

    Returns:
      Weight of the KL, best held-out reward, and held-out results before and after.
    """
    c = build(RLConfig, config.loop, "loop")
    objective = build(ObjectiveConfig, config.objective, "objective")
    run, opened, problems, held_out, prompts, teacher = prepare(config, seed)
    policy, *students = setup.load_weights(config, "policy", opened, run.mesh, seed)
    layout.check_memory(policy.model, run.sampler.layout, run.mesh)

    updates, completions = c.steps * c.updates_per_rollout, c.batch_size * c.group_size
    teacher = load_weights(teacher, seed, c.offload)
    divergence = teacher and teacher.divergence
    loss_fn = policy_loss(objective, run.sampling.temperature, completions, divergence)
    learner, tuning, state = setup.load_learner(
        config, loss_fn, policy, run.mesh, updates, seed, objective.skip_gradient_norm
    )
    reference = _copy(policy.params, c.offload, "reference") if objective.beta else {}
    student = _copy(policy.params, c.offload, "student") if c.self_teaching else {}
    has_copy = teacher and teacher.has_copy
    copied = _copy(policy.params, c.offload, "teacher") if has_copy else {}
    if not c.self_teaching:
        kept = [
            one._replace(params=offload.keep(one.params, c.offload, "student"))
            for one in students
        ]
        run = dataclasses.replace(run, students=tuple(kept))
    checkpoint.describe(workdir, run.policy.model, run.policy.tokenizer)
    groups, size = sharding.num_groups(run.mesh), run.row_shape.micro_batch_size
    LOG.info(
        f"a step: {c.batch_size} prompts x {c.group_size} completions = "
        f"{c.batch_size * c.group_size}; {size} rows of {run.row_shape.row_length} tokens "
        f"a micro-batch, {size // groups} a device group ({groups} groups)"
    )
    key = jax.random.key(seed)
    journal = Journal(c, run, tuning, held_out[:completions], prompts, key, workdir)
    journal.weights = Weights(state, reference, student, copied)
    # The journal alone holds the weights, so that those it replaces are freed.
    del policy, students, state, reference, student, copied
    fill_advantages = jit_advantages(objective, c.group_size, run, teacher)
    with journal.open(objective.advantage):
        train(teacher, learner, fill_advantages, problems, journal)
    return journal.summary()


class Prepared(NamedTuple):
    """What `run` works with, before the weights are loaded.

    Attributes:
      run: what rollouts, log-probs and rewards are made with.
      opened: the policy, then the students that are models of their own.
      problems: to train on.
      held_out: to evaluate on.
      prompts: endless batches of indices of `problems`.
      teacher: of a student, or None.
    """

    run: setup.Run
    opened: list[checkpoint.LoadedModel]
    problems: list[Problem]
    held_out: list[Problem]
    prompts: grain.DatasetIterator
    teacher: Teacher | None


def prepare(config: ConfigDict, seed: int) -> Prepared:
    """Models without weights and data of the stage; raises UserError for bad input."""
    c = build(RLConfig, config.loop, "loop")
    terms = rewards.make_terms(config.reward_terms)
    if c.self_teaching and config["students"]:
        raise UserError("loop.self_teaching: set `students` to (), it is the policy.")
    opened = setup.open_models(config, "policy")
    # With self-teaching the policy is its own student.
    models = [*opened, *opened] if c.self_teaching else opened
    run = setup.load_run(config, c.role, models, terms)
    problems = setup.load_problems(config.data, run.template, seed)
    held_out = setup.load_problems(config.held_out, run.template, seed, "held_out")
    setup.check_fit(run, [*problems, *held_out])
    graded = [*problems, *held_out]
    if "correctness" not in [term.name for term in terms]:
        graded = [one for one in held_out if (one.answer or "").strip()]
    check_gradable(graded)
    prompts = pipeline.problem_batches(problems, c.batch_size, seed)
    teacher = open_teacher(config, run, problems, c.group_size)
    return Prepared(run, opened, problems, held_out, prompts, teacher)


def train(
    teacher: Teacher | None,
    learner: Learner,
    fill_advantages: Callable[[Batch, Array], Batch],
    problems: Sequence[Problem],
    journal: Journal,
) -> None:
    """The loop; it continues from the weights and the step that the journal restored."""
    c, run = journal.c, journal.run
    if teacher:
        run = dataclasses.replace(run, sampler=teacher.sampler)
    # The log-probs at the time of the rollout serve the reward and later updates.
    needs_policy = bool(run.students) or c.updates_per_rollout > 1
    needs_policy |= teacher is not None and teacher.needs_policy
    taught = teacher.config if teacher else TeachingConfig()
    for step in journal.steps():
        state, reference, *_ = journal.weights
        policy, students = journal.policy(), journal.students()
        key = jax.random.fold_in(journal.key, step)
        chosen = [problems[i] for i in next(journal.prompts)]
        requests = run.requests([p for p in chosen for _ in range(c.group_size)])
        file = Path(c.rollouts) / f"{step:06d}.jsonl" if c.rollouts else None

        rollout = run.stored(file).generate(policy, requests, key)
        journal.lap("rollout")
        packed = rows.pack(rollout, run)
        batch = sharding.put_rows(packed, run.mesh)
        batch = log_probs.fill(
            run.programs, batch, policy if needs_policy else None, students, reference
        )
        reward = rewards.compute(run.reward, batch, rollout, journal.kl_coef)
        if teacher:
            # Weights without a name here: it would keep a copy that `sync` replaces.
            batch, judged = teacher.teach(
                teacher.loaded.params or journal.weights.teacher or policy,
                rollout,
                packed.completion.start,
                batch,
            )
            reward |= judged
        journal.lap("score", batch, reward)
        del policy  # with adapters a merged copy, which the update does not need
        batch, updates = fill_advantages(batch, reward["value"]), []
        for _ in range(c.updates_per_rollout):
            state, metrics = learner.update(state, batch)
            updates.append(metrics)
        weights = journal.weights._replace(state=state)
        journal.weights = sync(c, taught, learner, weights, step)
        journal.lap("update", journal.weights)
        journal.record(step, rollout, batch, reward, updates)


def sync(
    c: RLConfig, taught: TeachingConfig, learner: Learner, weights: Weights, step: int
) -> Weights:
    """Mixes the policy into the reference and its copies, where they are due."""
    state, reference, student, teacher = weights

    def mixed(params: Params, every: int, alpha: float) -> Params:
        if not params or not every or (step + 1) % every:
            return params
        mixture = learner.mix(offload.fetch(params), state.params, alpha)
        return jax.device_put(mixture, jax.tree.map(lambda x: x.sharding, params))

    return weights._replace(
        reference=mixed(reference, c.sync_every, c.sync_alpha),
        student=mixed(student, c.student_sync_every, c.student_sync_alpha),
        teacher=mixed(teacher, taught.sync_every, taught.sync_alpha),
    )


def jit_advantages(
    objective: ObjectiveConfig, group_size: int, run: setup.Run, teacher: Teacher | None
) -> Callable[[Batch, Array], Batch]:
    """`advantages.fill` compiled for the mesh of a run, mixed with what a teacher says."""
    names = ("advantages", "inverse_length", "loss_weights")
    limit = run.sampling.max_new_tokens

    @functools.partial(sharding.jit, mesh=run.mesh)
    def new_fields(batch: Batch, values: Array) -> dict[str, Array]:
        filled = advantages.fill(objective, group_size, limit, batch, values)
        if teacher:
            filled = mix_advantages(teacher.config, filled)
        return {name: getattr(filled, name) for name in names}

    def fill_advantages(batch: Batch, values: Array) -> Batch:
        # The other arrays of the batch stay where they are.
        few = batch._replace(students=(), ref_log_probs=None, log_probs=None)
        return batch._replace(**new_fields(few, values))

    return fill_advantages


def _copy(params: Params, offloaded: bool, name: str) -> Params:
    return offload.keep(jax.tree.map(jnp.copy, params), offloaded, name)
