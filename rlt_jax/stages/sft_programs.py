"""The device programs of stage `sft`: the update, and the held-out loss."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rlt_jax.inference.log_probs import token_stats
from rlt_jax.models.transformer import Transformer
from rlt_jax.training import sharding
from rlt_jax.training.lora import Tuning, combine
from rlt_jax.training.state import apply_gradients
from rlt_jax.types import Params, TrainState


def jit_update(
    model: Transformer,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
    micro_batches: int = 1,
) -> Any:
    """Compiles `update` for the mesh; the state is donated."""
    return sharding.jit(
        functools.partial(update, model, tx, micro_batches),
        mesh,
        in_shardings=(shardings, sharding.batch_sharding(mesh), None),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def update(
    model: Transformer,
    tx: optax.GradientTransformation,
    micro_batches: int,
    state: TrainState,
    batch: Mapping[str, jax.Array],
    frozen: Params | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on one batch of packed rows, arrays [B, T].

    Micro-batches, B / micro_batches rows each, are computed one after another; the loss
    is the mean over the tokens of all.
    """
    rows = _weighted(batch)
    total = rows["weight"].sum()

    def loss_fn(params: Params, rows: Mapping[str, jax.Array]) -> jax.Array:
        return _loss_sum(model, frozen, params, rows) / total

    gradient = jax.value_and_grad(loss_fn)
    if micro_batches == 1:
        loss, grads = gradient(state.params, rows)
    else:

        def add(sums: tuple, rows: Mapping[str, jax.Array]) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, sums, gradient(state.params, rows)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
        (loss, grads), _ = jax.lax.scan(add, zeros, _parts(rows, micro_batches))
    state, metrics = apply_gradients(state, grads, tx, loss)
    tokens = (batch["segment_ids"] > 0).sum()
    fill = tokens / batch["segment_ids"].size
    return state, {"sft/loss": loss, "sft/tokens": tokens, "sft/fill": fill, **metrics}


def make_evaluation(
    batches: Sequence[Mapping[str, np.ndarray]],
    tuning: Tuning,
    mesh: Mesh,
    shardings: TrainState,
    micro_batches: int,
) -> Callable[[Params], float]:
    """Trained parameters -> mean loss over all learned tokens of the batches."""
    program = sharding.jit(
        functools.partial(loss_and_tokens, tuning.model, micro_batches),
        mesh,
        in_shardings=(shardings.params, sharding.batch_sharding(mesh), None),
        out_shardings=sharding.replicated(mesh),
    )

    def evaluate(params: Params) -> float:
        loss = tokens = 0
        for batch in batches:
            rows = sharding.put_rows(batch, mesh)
            found = jax.device_get(program(params, rows, tuning.frozen))
            loss, tokens = loss + float(found[0]), tokens + int(found[1])
        return loss / tokens

    return evaluate


def loss_and_tokens(
    model: Transformer,
    micro_batches: int,
    params: Params,
    batch: Mapping[str, jax.Array],
    frozen: Params | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the loss over the learned tokens of a batch, and their number."""
    rows = _weighted(batch)
    part = functools.partial(_loss_sum, model, frozen, params)
    sums = jax.lax.map(part, _parts(rows, micro_batches))
    return sums.sum(), rows["weight"].sum()


def _weighted(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """With the tokens that are learned; nothing predicts the first of a segment."""
    return {**batch, "weight": batch["loss_mask"] & (batch["positions"] > 0)}


def _parts(rows: Mapping[str, jax.Array], micro_batches: int) -> dict[str, jax.Array]:
    """[M, B / M, T], of rows that each device has already."""

    def parts(x: jax.Array) -> jax.Array:
        return x.reshape(-1, micro_batches, x.shape[1]).swapaxes(0, 1)

    return jax.tree.map(parts, rows)


def _loss_sum(
    model: Transformer,
    frozen: Params | None,
    params: Params,
    rows: Mapping[str, jax.Array],
) -> jax.Array:
    stats = token_stats(
        model,
        combine(model, frozen, params),
        rows["tokens"],
        rows["segment_ids"],
        rows["positions"],
        wanted=rows["weight"],
    )
    return -(stats.log_probs * rows["weight"]).sum()
