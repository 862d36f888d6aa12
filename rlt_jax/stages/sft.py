"""Stage `sft`: next-token training on packed rows of traces.

Used three times: to pretrain a base, to warm up a teacher (`format="teacher"`, loss on
the explanation only), and to distil a student (`format="student"`, loss on thought and
solution).
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from rlt_jax.data import examples, pipeline
from rlt_jax.data.templates import load_template
from rlt_jax.errors import UserError
from rlt_jax.inference.log_probs import token_stats
from rlt_jax.models.transformer import Transformer
from rlt_jax.settings import build
from rlt_jax.training import checkpoint, hosts, sharding
from rlt_jax.training.lora import LoRAConfig, Tuning, combine, make_tuning
from rlt_jax.training.metrics import (
    MetricWriter,
    phase_metrics,
    read_jsonl,
    steps,
)
from rlt_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlt_jax.training.state import (
    apply_gradients,
    check_skipped,
    from_items,
    new_state,
    state_shardings,
    to_items,
)
from rlt_jax.types import Params, TrainState

FORMATS = {"teacher": examples.teacher_row, "student": examples.student_row}


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Settings of the loop.

    Attributes:
      format: which rows are made of the traces, "teacher" or "student".
      steps: optimizer steps.
      batch_size: packed rows per step.
      micro_batch_size: rows computed at once, over all devices; 0 is all of them.
      row_length: tokens per packed row; no single row may be longer.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: how many of them stay.
      max_skipped: steps in a row that may be skipped, for a loss or gradient that is not
        finite, before the run stops.
      profile_steps: first of the steps that are profiled, and the one after the last.
    """

    format: str
    steps: int
    batch_size: int
    row_length: int
    micro_batch_size: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 1
    max_skipped: int = 5
    profile_steps: Sequence[int] = ()

    @property
    def rows_at_once(self) -> int:
        """Of a micro-batch, or of the whole batch."""
        return self.micro_batch_size or self.batch_size

    def __post_init__(self) -> None:
        if self.batch_size % self.rows_at_once:
            raise UserError(
                f"sft.micro_batch_size={self.micro_batch_size} does not divide "
                f"batch_size={self.batch_size}."
            )
        if len(self.profile_steps) not in (0, 2):
            raise UserError(f"sft.profile_steps={self.profile_steps}: (first, end).")
        if self.steps < 1:
            raise UserError(f"steps={self.steps}: at least 1.")
        if self.format not in FORMATS:
            raise UserError(f"format={self.format!r}: one of {', '.join(FORMATS)}.")


SECTIONS = {
    "model": checkpoint.ModelSource,
    "template": None,
    "data": None,
    "sft": SFTConfig,
    "lora": LoRAConfig,
    "optimizer": OptimizerConfig,
    "mesh": sharding.MeshConfig,
}


def run(config: ml_collections.ConfigDict, workdir: Path, seed: int) -> dict[str, Any]:
    """Trains a model on traces; leaves checkpoints that other stages load.

    Args:
      config: sections as in `SECTIONS`.
      workdir: folder of the stage.
      seed: of everything random.

    Returns:
      Last loss, number of traces and of tokens seen.
    """
    c = build(SFTConfig, config.sft, "sft")
    mesh = sharding.make_mesh(build(sharding.MeshConfig, config.mesh, "mesh"))
    check_rows(c, mesh)
    source = build(checkpoint.ModelSource, config.model, "model")
    key = jax.random.key(seed)
    model, params, tokenizer = checkpoint.load(source, mesh, key)
    template = load_template(config.template)
    traces = pipeline.load_traces(config.data, template, seed)
    hosts.agree_on_items("the traces of the data", traces)
    rows = [FORMATS[c.format](tokenizer, template, trace) for trace in traces]
    examples.check_lengths([row.tokens for row in rows], c.row_length, "sft.row_length")
    batches = pipeline.packed_batches(rows, c.batch_size, c.row_length, seed)

    low_rank = build(LoRAConfig, config.lora, "lora")
    tuning, params = make_tuning(low_rank, model, params, mesh, key)
    tx = make_optimizer(build(OptimizerConfig, config.optimizer, "optimizer"), c.steps)
    shardings = state_shardings(tuning.model, tx, mesh)
    state = new_state(params, tx, shardings)
    del params
    parts = c.batch_size // c.rows_at_once
    update = jit_update(tuning.model, tx, mesh, shardings, parts)
    checkpoint.describe(workdir, model, tokenizer)
    with checkpoint.open_manager(workdir, c.keep_checkpoints) as manager:
        first, state = _restore(manager, tuning, state, batches)
        with MetricWriter(workdir, first) as writer:
            began = time.monotonic()
            for step in steps(first, c.steps, workdir, c.profile_steps):
                rows = next(batches)
                batch = sharding.put_rows(rows, mesh)
                state, metrics = update(state, batch, tuning.frozen)
                tokens, now = np.count_nonzero(rows["segment_ids"]), time.monotonic()
                metrics |= phase_metrics("step", tokens, now - began)
                began = now
                check_skipped(writer.write(step, metrics), c.max_skipped)
                stop, done = hosts.stopping(), step + 1
                if done % c.checkpoint_every == 0 or done == c.steps or stop:
                    # A checkpoint's steps have their rows.
                    check_skipped(writer.flush(), c.max_skipped)
                    _save(manager, done, tuning, state, batches)
                if stop:
                    raise hosts.Stopped
        manager.wait_until_finished()
    file = workdir / "metrics.jsonl"
    loss = hosts.from_first(lambda: read_jsonl(file)[-1]["sft/loss"])
    return {"traces": len(traces), "loss": loss}


def check_rows(c: SFTConfig, mesh: Mesh) -> None:
    """Refuses rows that the mesh cannot split."""
    names = "sft.micro_batch_size (or batch_size), sft.row_length"
    sharding.check_rows(mesh, c.rows_at_once, c.row_length, names)


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
    weight = batch["loss_mask"] & (batch["positions"] > 0)
    total = weight.sum()

    def loss_fn(params: Params, rows: Mapping[str, jax.Array]) -> jax.Array:
        whole = combine(model, frozen, params)
        stats = token_stats(
            model,
            whole,
            rows["tokens"],
            rows["segment_ids"],
            rows["positions"],
            wanted=rows["weight"],
        )
        return -(stats.log_probs * rows["weight"]).sum() / total

    gradient = jax.value_and_grad(loss_fn)
    rows = {**batch, "weight": weight}
    if micro_batches == 1:
        loss, grads = gradient(state.params, rows)
    else:

        def parts(x: jax.Array) -> jax.Array:
            """[M, B / M, T], of rows that each device has already."""
            return x.reshape(-1, micro_batches, x.shape[1]).swapaxes(0, 1)

        def add(sums: tuple, rows: Mapping[str, jax.Array]) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, sums, gradient(state.params, rows)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
        (loss, grads), _ = jax.lax.scan(add, zeros, jax.tree.map(parts, rows))
    state, metrics = apply_gradients(state, grads, tx, loss)
    tokens = (batch["segment_ids"] > 0).sum()
    fill = tokens / batch["segment_ids"].size
    return state, {"sft/loss": loss, "sft/tokens": tokens, "sft/fill": fill, **metrics}


def _save(
    manager: Any, step: int, tuning: Tuning, state: TrainState, batches: Any
) -> None:
    trees = {"params": tuning.merge(state.params)} | to_items(state, tuning.item)
    checkpoint.save(manager, step, trees, {"batches": batches.get_state()})


def _restore(
    manager: Any, tuning: Tuning, state: TrainState, batches: Any
) -> tuple[int, TrainState]:
    restored = checkpoint.restore_latest(manager, to_items(state, tuning.item))
    if restored is None:
        return 0, state
    first, trees, data = restored
    batches.set_state(data["batches"])
    return first, from_items(trees, tuning.item)
