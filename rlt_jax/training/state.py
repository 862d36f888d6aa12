"""The train state: made sharded, updated by one function."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from rlt_jax.models.transformer import Transformer, boxed_params
from rlt_jax.training.sharding import to_shardings
from rlt_jax.types import Params, TrainState


def state_shardings(
    model: Transformer, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A NamedSharding for every leaf of the state, moments as their parameters."""

    def boxed_state() -> TrainState:
        params = boxed_params(model.config, jax.random.key(0))
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    return to_shardings(nn.get_partition_spec(jax.eval_shape(boxed_state)), mesh)


def new_state(
    params: Params, tx: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """The state of step 0 around given parameters; the parameters are copied."""

    def init(params: Params) -> TrainState:
        params = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    return jax.jit(init, out_shardings=shardings)(params)


def apply_gradients(
    state: TrainState, grads: Params, tx: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step; metrics name the norms of gradient and update."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "optimizer/gradient_norm": optax.tree.norm(grads),
        "optimizer/update_norm": optax.tree.norm(updates),
    }
    return TrainState(state.step + 1, params, opt_state), metrics
