"""The device programs of policy gradients."""

import functools
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl import policy_update
from rlt_jax.rl.advantages import ADVANTAGES
from rlt_jax.rl.losses import ObjectiveConfig, counted_completions
from rlt_jax.rl.metrics import group_metrics
from rlt_jax.stages.experience import Writing
from rlt_jax.training import offload, sharding
from rlt_jax.training.lora import Tuning
from rlt_jax.types import Params, TrainState


class Programs(NamedTuple):
    """What a run computes with, in the order of its use."""

    tuning: Tuning
    writing: Writing
    reference: Any  # reference params, packed rows, spans -> log_probs
    advantages: Any  # rewards [N], finished [N] -> advantages [N], counted [N], metrics
    update: Any  # state, PolicyBatch -> state, metrics
    mix: Any  # params, trained params, alpha -> params


def compile_programs(
    group_size: int,
    objective: ObjectiveConfig,
    writing: Writing,
    tuning: Tuning,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
) -> Programs:
    """Jits every program once, with the shardings of the mesh."""
    sampling = writing.engine.sampling

    def advantages(rewards: jax.Array, finished: jax.Array) -> tuple:
        found = ADVANTAGES[objective.advantage](rewards, group_size)
        counted = counted_completions(objective, rewards, finished, group_size)
        return found, counted, group_metrics(rewards, found, group_size)

    mixed = jit_mix()

    def mix(params: Params, trained: Params, alpha: float) -> Params:
        mixture = mixed(offload.fetch(params), tuning.merge(trained), alpha)
        return offload.put_back(mixture, params)

    update = jit_update(tuning.model, tx, sampling, objective, mesh, shardings)
    return Programs(
        tuning,
        writing,
        lambda reference, *rest: writing.log_probs(offload.fetch(reference), *rest),
        jax.jit(advantages, out_shardings=sharding.replicated(mesh)),
        lambda state, batch: update(state, batch, tuning.frozen),
        mix,
    )


def jit_update(
    model: Transformer,
    tx: optax.GradientTransformation,
    sampling: SamplingConfig,
    objective: ObjectiveConfig,
    mesh: Mesh,
    shardings: TrainState,
) -> Any:
    """Compiles `policy_update.update` for the mesh; the state is donated."""
    return sharding.jit(
        functools.partial(policy_update.update, model, tx, sampling, objective),
        mesh,
        in_shardings=(shardings, None, None),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def jit_mix() -> Any:
    """Compiles `policy_update.mix_reference`; the reference is donated."""
    return jax.jit(policy_update.mix_reference, donate_argnums=0)
