"""The train state: made sharded, updated by one function."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from rlt_jax.errors import LOG, UserError
from rlt_jax.models.transformer import Transformer, boxed_shapes
from rlt_jax.training import lora, sharding
from rlt_jax.types import Params, TrainState

Optimizer = optax.GradientTransformation
# Part of a metric's name -> what it tells of, from cause to effect.
NUMBERS = {
    "reward/solution_score": "student's log-probs of the solution",
    "reward/explanation_kl": "KL of policy and student",
    "reward/value": "reward",
    "/loss": "policy's loss",
    "optimizer/gradient_norm": "gradient",
    "optimizer/update_norm": "update",
}


def state_shardings(model: Transformer, tx: Optimizer, mesh: Mesh) -> TrainState:
    """A NamedSharding for every leaf of the state, moments as their parameters.

    Moments without some of the axes of their parameter, as in adafactor, are whole on
    every device.
    """

    def named(box: Any) -> Any:
        if not isinstance(box, nn.Partitioned):
            return box
        shape = getattr(box.value, "shape", (1,))  # (1,) and no array: a placeholder
        return box.value if shape == (1,) or len(shape) != len(box.names) else box

    trained = lora.trained_part(boxed_shapes(model))
    shapes = jax.eval_shape(functools.partial(_first, tx), trained)
    boxes = jax.tree.map(named, shapes, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    return sharding.to_shardings(nn.get_partition_spec(boxes), mesh)


def abstract_state(
    model: Transformer, params: Params, tx: Optimizer, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state around parameters, given likewise."""
    shapes = jax.eval_shape(functools.partial(_first, tx), params)
    return sharding.abstract(shapes, state_shardings(model, tx, mesh))


def new_state(params: Params, tx: Optimizer, shardings: TrainState) -> TrainState:
    """The state of step 0 around given parameters; the parameters are copied."""
    if any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params)):
        LOG.warning(
            "the trained parameters are bfloat16, which rounds changes of less than 1/500 "
            "of a parameter away: at small learning rates nothing is learned. Set "
            'model.param_dtype="float32" (policy.param_dtype in rl) for master weights.'
        )

    def init(params: Params) -> TrainState:
        return _first(tx, jax.tree.map(jnp.copy, params))

    return jax.jit(init, out_shardings=shardings)(params)


def _first(tx: Optimizer, params: Params) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), zero)


def to_items(state: TrainState, name: str) -> dict[str, Any]:
    """The state as items of a checkpoint, its parameters under a name."""
    optimizer = state.step, state.opt_state, state.skipped
    return {name: state.params, "optimizer": optimizer}


def from_items(items: Mapping[str, Any], name: str) -> TrainState:
    """The state of a restored checkpoint."""
    step, opt_state, skipped = items["optimizer"]
    return TrainState(step, items[name], opt_state, skipped)


def apply_gradients(
    state: TrainState,
    grads: Params,
    tx: Optimizer,
    loss: jax.Array | float = 0.0,
    max_norm: float | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step; metrics name the norms of gradient and update.

    Where loss, gradient or update is not finite, or the gradient longer than `max_norm`,
    the step is skipped: the state is unchanged except for `skipped`, which counts it.
    """
    norm = optax.tree.norm(grads)
    is_wanted = jnp.isfinite(loss) & jnp.isfinite(norm)
    if max_norm is not None:
        is_wanted &= norm <= max_norm
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    update_norm = optax.tree.norm(updates)
    is_done = is_wanted & jnp.isfinite(update_norm)
    params = optax.apply_updates(state.params, updates)
    stepped = TrainState(state.step + 1, params, opt_state, state.skipped)
    # Elementwise, so it is done in place of the old state and needs no copy of it.
    chosen = jax.tree.map(functools.partial(jnp.where, is_done), stepped, state)
    chosen = chosen._replace(skipped=jnp.where(is_done, 0, state.skipped + 1))
    return chosen, {
        "optimizer/gradient_norm": norm,
        "optimizer/update_norm": jnp.where(is_wanted, update_norm, 0.0),
        "optimizer/skipped": 1.0 - is_done,
        "optimizer/skipped_in_a_row": chosen.skipped,
    }


def check_updates(metrics: Mapping[str, float], limit: int, is_last: bool) -> bool:
    """Stops a run whose updates are skipped.

    Args:
      metrics: metrics of a step; {} for none.
      limit: consecutive optimizer steps that may be skipped.
      is_last: whether this is the last step, whose weights the stage would leave.

    Returns:
      Whether the weights may be saved: not after numbers that were not finite, as the
      update before may have spoilt the weights, and the last checkpoint is a good one.

    Raises:
      UserError: more were skipped; or the numbers of the last step are not finite.
    """
    skipped = int(metrics.get("optimizer/skipped_in_a_row", 0))
    wrong = [name for name, x in metrics.items() if skipped and not math.isfinite(x)]
    broken = [what for name, what in NUMBERS.items() if any(name in x for x in wrong)]
    if skipped > limit or (broken and is_last):
        if broken:
            reason = f"the {', the '.join(broken)} not being finite"
        else:
            norm = metrics["optimizer/gradient_norm"]
            reason = f"the gradient's norm {norm:.3g} being above objective.skip_gradient_norm"
        raise UserError(
            f"{skipped} updates in a row were skipped, {reason}. The weights of the last "
            "checkpoint are kept. Lower optimizer.learning_rate, or change what else may "
            "be the reason, and give the command again with --resume_with_changes."
        )
    return not broken
