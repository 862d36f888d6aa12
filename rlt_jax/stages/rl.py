"""Stage `rl`: GRPO on a teacher, rewarded by what a student makes of its explanations.

`run` sets up, `train` is the loop. One step, with P prompts of R completions each:
prompts -> rollout -> rows -> score -> reward -> advantages -> update.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from rlt_jax.data import pipeline
from rlt_jax.data.packing import on_spans
from rlt_jax.data.scoring import RowShape
from rlt_jax.data.templates import Problem
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import Engine, EngineConfig, Occupancy
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.scoring import score_rows
from rlt_jax.inference.stored import roll_out
from rlt_jax.rl import policy_update
from rlt_jax.rl.advantages import group_advantages
from rlt_jax.rl.losses import ObjectiveConfig
from rlt_jax.rl.metrics import reward_metrics, rollout_metrics
from rlt_jax.rl.rlt_reward import RLTRewardConfig
from rlt_jax.rl.scorer import Scored, StudentsConfig, balanced_kl_coef
from rlt_jax.settings import build
from rlt_jax.stages.roles import (
    Roles,
    check_fit,
    explanation_requests,
    jit_scorer,
    load_explainer,
    load_roles,
    sample_rows,
    scoring_batches,
)
from rlt_jax.training import checkpoint, sharding
from rlt_jax.training.metrics import (
    MetricWriter,
    append_jsonl,
    keep_rows_before,
    progress,
)
from rlt_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlt_jax.training.state import new_state, state_shardings
from rlt_jax.types import Params, TrainState

_LOG = logging.getLogger("rlt_jax")


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Settings of the loop.

    Attributes:
      steps: optimizer steps, one rollout each.
      batch_size: P, prompts per step.
      group_size: R, completions per prompt.
      beta: weight of the KL to the reference.
      sync_every: steps between two mixings of the reference.
      sync_alpha: share of the policy in the mixed reference.
      sample_every: steps between explanations written to samples.jsonl.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: how many of them stay.
      rollouts: folder in which the completions of every step are kept; what is there
        already is taken from there, which replays a run.
    """

    steps: int
    batch_size: int
    group_size: int
    beta: float = 0.04
    sync_every: int = 32
    sync_alpha: float = 0.9
    sample_every: int = 10
    checkpoint_every: int = 20
    keep_checkpoints: int = 1
    rollouts: str = ""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps={self.steps}: at least 1.")
        if self.group_size < 2:
            raise UserError(f"group_size={self.group_size}: a group needs at least 2.")


SECTIONS = {
    "teacher": checkpoint.ModelSource,
    "student": None,  # a ModelSource, or several
    "students": StudentsConfig,
    "template": None,
    "data": None,
    "held_out": None,
    "rows": RowShape,
    "sampling": SamplingConfig,
    "engine": EngineConfig,
    "reward": RLTRewardConfig,
    "grpo": GRPOConfig,
    "optimizer": OptimizerConfig,
    "mesh": sharding.MeshConfig,
}


class Programs(NamedTuple):
    """The compiled device programs of a step, in the order of their use."""

    rollout: Engine
    score: Any  # policy and student params, batches, KL weight -> Scored
    reference: Any  # reference params, teacher rows -> log_probs
    advantages: Any  # rewards -> advantages
    update: Any  # state, PolicyBatch -> state, metrics
    mix: Any  # reference, policy -> reference


def run(config: ml_collections.ConfigDict, workdir: Path, seed: int) -> dict[str, Any]:
    """Trains a teacher with the RLT reward.

    Args:
      config: sections `teacher`, `student`, `students`, `template`, `data`, `held_out`, `rows`,
        `sampling`, `engine`, `reward`, `grpo`, `optimizer`, `mesh`.
      workdir: folder of the stage.
      seed: of everything random.

    Returns:
      Held-out reward and terms before and after, with standard errors.
    """
    c = build(GRPOConfig, config.grpo, "grpo")
    mesh = sharding.make_mesh(build(sharding.MeshConfig, config.mesh, "mesh"))
    roles = load_roles(config, mesh, seed)
    teacher = roles.teacher
    sampling = build(SamplingConfig, config.sampling, "sampling")
    problems = pipeline.load_problems(config.data, roles.template, seed)
    held_out = pipeline.load_problems(config.held_out, roles.template, seed)
    check_fit(roles, sampling, [*problems, *held_out])

    tx = make_optimizer(build(OptimizerConfig, config.optimizer, "optimizer"), c.steps)
    shardings = state_shardings(teacher.model, tx, mesh)
    score, reward = jit_scorer(roles, config, sampling.temperature)
    engine = load_explainer(roles, config, mesh)
    programs = compile_programs(c, roles, engine, score, tx, mesh, shardings)
    state = new_state(teacher.params, tx, shardings)
    reference = jax.tree.map(jnp.copy, teacher.params)
    roles = roles._replace(teacher=teacher._replace(params=None))
    prompts = pipeline.problem_batches(problems, c.batch_size, seed)
    checkpoint.describe(workdir, teacher.model, teacher.tokenizer)
    key = jax.random.key(seed)
    held_out = held_out[: c.batch_size * c.group_size]
    balanced = reward.explanation_kl_coef == "auto"
    return train(
        c,
        programs,
        roles,
        problems,
        held_out,
        prompts,
        state,
        reference,
        None if balanced else reward.explanation_kl_coef,
        key,
        workdir,
    )


def train(
    c: GRPOConfig,
    programs: Programs,
    roles: Roles,
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
    prompts: grain.DatasetIterator,
    state: TrainState,
    reference: Params,
    kl_coef: float | None,
    key: jax.Array,
    workdir: Path,
) -> dict[str, Any]:
    """The loop; resumes from the latest checkpoint in the workdir.

    Without a `kl_coef` the weight of the explanation KL is balanced to the solution
    score on the held-out problems before the first step.
    """
    samples = workdir / "samples.jsonl"
    longest = programs.rollout.sampling.max_new_tokens
    with checkpoint.open_manager(workdir, c.keep_checkpoints) as manager:
        first, state, reference, start = _restore(manager, state, reference, prompts)
        keep_rows_before(samples, first)
        if start is None:
            start = evaluate_held_out(
                programs, roles, held_out, state, key, c, samples, "first", kl_coef
            )
            _log_sizes(start)
        kl_coef = start["kl_coef"]
        with (
            MetricWriter(workdir, first) as writer,
            progress(first, c.steps, workdir.name) as bar,
        ):
            for step in range(first, c.steps):
                began, occupancy = time.monotonic(), Occupancy()
                step_key = jax.random.fold_in(key, step)
                chosen = [problems[i] for i in next(prompts)]
                group = [problem for problem in chosen for _ in range(c.group_size)]

                requests = explanation_requests(roles, group, longest)
                kept = c.rollouts and Path(c.rollouts) / f"{step:06d}.jsonl"
                rollout = roll_out(
                    programs.rollout, state.params, requests, step_key, occupancy, kept
                )
                completions = [completion.tokens for completion in rollout]
                batches, overlong = scoring_batches(roles, group, completions)
                scored = programs.score(
                    state.params, roles.student_params, batches, kl_coef
                )
                reward, rows = scored.reward, batches[0].teacher
                state, metrics = programs.update(
                    state,
                    policy_update.PolicyBatch(
                        rows,
                        batches[0].completion,
                        programs.advantages(reward.value),
                        scored.teacher_log_probs,
                        programs.reference(reference, rows),
                        sampler_log_probs=on_spans(
                            [one.log_probs for one in rollout],
                            batches[0].completion,
                            rows.tokens.shape,
                        ),
                    ),
                )
                if (step + 1) % c.sync_every == 0:
                    reference = programs.mix(reference, state.params)

                metrics |= reward_metrics(reward)
                metrics |= rollout_metrics(rollout, occupancy)
                metrics["rollout/overlong"] = overlong
                metrics["time/step_seconds"] = time.monotonic() - began
                writer.write(step, metrics)
                if step % c.sample_every == 0:
                    firsts = slice(0, None, c.group_size)
                    written = sample_rows(roles, group, completions, reward, firsts)
                    _write_samples(samples, step, "train", written)
                if (step + 1) % c.checkpoint_every == 0 or step + 1 == c.steps:
                    writer.flush()  # a checkpoint's steps have their rows
                    trees = _trees(state, reference)
                    data = {"prompts": prompts.get_state(), "start": start}
                    checkpoint.save(manager, step + 1, trees, data)
                bar.update()
        end = evaluate_held_out(
            programs, roles, held_out, state, key, c, samples, "last", kl_coef
        )
        manager.wait_until_finished()
    return start | end


def compile_programs(
    c: GRPOConfig,
    roles: Roles,
    engine: Engine,
    score: Callable[..., Scored],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
) -> Programs:
    """Jits every program once, with the shardings of the mesh."""
    teacher, sampling = roles.teacher, engine.sampling
    reference = functools.partial(score_rows, teacher.model, sampling.temperature)
    update = functools.partial(
        policy_update.update,
        teacher.model,
        tx,
        sampling,
        ObjectiveConfig(beta=c.beta),
    )
    mix = functools.partial(policy_update.mix_reference, alpha=c.sync_alpha)

    return Programs(
        rollout=engine,
        score=score,
        reference=jax.jit(reference),
        advantages=jax.jit(
            functools.partial(group_advantages, group_size=c.group_size)
        ),
        update=jax.jit(
            update,
            in_shardings=(shardings, None),
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
        ),
        mix=jax.jit(mix, donate_argnums=0),
    )


def evaluate_held_out(
    programs: Programs,
    roles: Roles,
    problems: Sequence[Problem],
    state: TrainState,
    key: jax.Array,
    c: GRPOConfig,
    samples: Path,
    when: str,
    kl_coef: float | None,
) -> dict[str, float]:
    """Mean reward and terms on held-out problems, one completion each, and the KL weight.

    The batch has the shape of a training step, so nothing new is compiled, and the same
    key at every call, so two calls differ by the policy alone.
    """
    rows = c.batch_size * c.group_size
    padded = [problems[i % len(problems)] for i in range(rows)]
    held_out_key = jax.random.fold_in(key, 2**31 - 1)
    engine = programs.rollout
    requests = explanation_requests(roles, padded, engine.sampling.max_new_tokens)
    rollout = roll_out(engine, state.params, requests, held_out_key)
    completions = [completion.tokens for completion in rollout]
    batches, _ = scoring_batches(roles, padded, completions)
    params = state.params, roles.student_params
    if kl_coef is None:
        terms = jax.device_get(programs.score(*params, batches, 0.0).reward.terms)
        kl_coef = balanced_kl_coef(terms["solution_score"], terms["explanation_kl"])
    reward = programs.score(*params, batches, kl_coef).reward
    step = 0 if when == "first" else c.steps
    chosen = slice(0, min(32, len(problems)))
    written = sample_rows(roles, padded, completions, reward, chosen)
    _write_samples(samples, step, "held_out", written)
    values = jax.device_get({"reward": reward.value, **reward.terms})
    result = {"kl_coef": float(kl_coef)}
    for name, value in values.items():
        value = value[: len(problems)]
        result[f"held_out_{name}_{when}"] = float(value.mean())
        error = value.std(ddof=1) / np.sqrt(len(value)) if len(value) > 1 else 0.0
        result[f"held_out_{name}_{when}_standard_error"] = float(error)
    return result


def _log_sizes(start: dict[str, float]) -> None:
    score, divergence, kl_coef = (
        start[name]
        for name in (
            "held_out_solution_score_first",
            "held_out_explanation_kl_first",
            "kl_coef",
        )
    )
    _LOG.info(
        "before the first step: solution score %.4g, explanation KL %.4g * %.4g = %.4g",
        score,
        divergence,
        kl_coef,
        divergence * kl_coef,
    )


def _write_samples(
    file: Path, step: int, split: str, rows: list[dict[str, Any]]
) -> None:
    append_jsonl(file, [{"step": step, "split": split, **row} for row in rows])


def _trees(state: TrainState, reference: Params) -> dict[str, Any]:
    return {
        "params": state.params,
        "optimizer": (state.step, state.opt_state),
        "reference": reference,
    }


def _restore(
    manager: Any, state: TrainState, reference: Params, prompts: Any
) -> tuple[int, TrainState, Params, dict[str, float] | None]:
    restored = checkpoint.restore_latest(manager, _trees(state, reference))
    if restored is None:
        return 0, state, reference, None
    first, trees, data = restored
    prompts.set_state(data["prompts"])
    state = TrainState(trees["optimizer"][0], trees["params"], trees["optimizer"][1])
    return first, state, trees["reference"], data["start"]
