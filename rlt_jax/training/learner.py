"""The learner: gradients added up over micro-batches, then one optimizer step.

Supervised training and reinforcement learning differ in the loss function that they pass.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlt_jax.models.transformer import Transformer
from rlt_jax.training import lora, sharding
from rlt_jax.training.state import Optimizer, apply_gradients
from rlt_jax.types import Batch, Metrics, Params, TrainState

# (model, params, micro-batch) -> loss and metrics. Both add up over the micro-batches of a
# batch, but for metrics whose name ends in "_max", of which the largest counts.
LossFn = Callable[[Transformer, Params, Batch], tuple[jax.Array, Metrics]]


class Learner(NamedTuple):
    """Compiled programs of what is trained.

    Attributes:
      update: (state, batch) -> new state and metrics; the state is donated.
      loss: (trained params, batch) -> loss of the batch, without a gradient.
      mix: (params, trained params, alpha) -> (1 - alpha) * params + alpha * trained, on
        merged parameters; the first argument is donated.
    """

    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    loss: Callable[[Params, Batch], jax.Array]
    mix: Callable[[Params, Params, float], Params]


def make_learner(
    loss_fn: LossFn,
    tuning: lora.Tuning,
    tx: Optimizer,
    mesh: Mesh,
    shardings: TrainState,
    max_norm: float | None = None,
) -> Learner:
    """Compiles the programs of a run at their first use.

    Args:
      loss_fn: loss of a micro-batch.
      tuning: model and what of it is trained.
      tx: optimizer.
      mesh: where the programs run.
      shardings: of the train state.
      max_norm: a step with a longer gradient is skipped; None for never.
    """
    jitted = jit_update(loss_fn, tuning.model, tx, mesh, shardings, max_norm)
    forward = functools.partial(batch_loss, loss_fn, tuning.model)
    forward = sharding.jit(forward, mesh, out_shardings=sharding.replicated(mesh))
    return Learner(
        lambda state, batch: jitted(state, batch, tuning.frozen),
        lambda params, batch: forward(params, batch, tuning.frozen),
        lambda params, trained, alpha: mix(params, tuning.merge(trained), alpha),
    )


def jit_update(
    loss_fn: LossFn,
    model: Transformer,
    tx: Optimizer,
    mesh: Mesh,
    shardings: TrainState,
    max_norm: float | None = None,
) -> jax.stages.Wrapped:
    """`update` as a `jax.jit` function of state, batch and frozen parameters."""
    program = functools.partial(update, loss_fn, model, tx, max_norm)
    given, made = (shardings, None, None), (shardings, sharding.replicated(mesh))
    return sharding.jit(
        program, mesh, in_shardings=given, out_shardings=made, donate_argnums=0
    )


def update(
    loss_fn: LossFn,
    model: Transformer,
    tx: Optimizer,
    max_norm: float | None,
    state: TrainState,
    batch: Batch,
    frozen: Params | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step; a later one on the same rollout takes the same batch.

    Args:
      loss_fn: loss of a micro-batch.
      model: the transformer.
      tx: optimizer.
      max_norm: see `make_learner`.
      state: donated by the caller.
      batch: [M, B, T]; micro-batches after `num_micro_batches` are not computed.
      frozen: parameters under the adapters in the state, see `lora.Tuning`.

    Returns:
      The new state and metrics; "optimizer/skipped" is 1 where nothing changed.
    """

    def of_micro_batch(params: Params, m: jax.Array | int) -> tuple:
        return loss_fn(model, lora.combine(model, frozen, params), batch.micro_batch(m))

    gradient = jax.value_and_grad(of_micro_batch, has_aux=True)
    if batch.tokens.shape[0] == 1:
        (loss, metrics), grads = gradient(state.params, 0)
    else:

        def add(m: jax.Array, total: tuple) -> tuple:
            new = gradient(state.params, m)
            (loss, metrics), grads = jax.tree.map(jnp.add, total, new)
            for name in lowest:
                metrics[name] = jnp.maximum(total[0][1][name], new[0][1][name])
            return (loss, metrics), grads

        shapes = jax.eval_shape(gradient, state.params, 0)
        (loss, metrics), grads = jax.tree.map(jnp.zeros_like, shapes)
        lowest = {k: x - jnp.inf for k, x in metrics.items() if k.endswith("_max")}
        start = (loss, metrics | lowest), grads
        total = jax.lax.fori_loop(0, batch.num_micro_batches, add, start)
        (loss, metrics), grads = total
    state, step_metrics = apply_gradients(state, grads, tx, loss, max_norm)
    return state, metrics | step_metrics


def batch_loss(
    loss_fn: LossFn,
    model: Transformer,
    params: Params,
    batch: Batch,
    frozen: Params | None = None,
) -> jax.Array:
    """The loss of a batch [M, B, T], without a gradient."""
    whole = lora.combine(model, frozen, params)

    def add(m: jax.Array, total: jax.Array) -> jax.Array:
        return total + loss_fn(model, whole, batch.micro_batch(m))[0]

    return jax.lax.fori_loop(0, batch.num_micro_batches, add, jnp.float32(0))


@functools.partial(jax.jit, donate_argnums=0)
def mix(params: Params, policy: Params, alpha: float) -> Params:
    """(1 - alpha) * params + alpha * policy (TR-DPO, arXiv 2404.09656, soft).

    The first argument is donated.
    """
    return optax.incremental_update(policy, params, alpha)
