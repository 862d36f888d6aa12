"""Stage `sft`: next-token training on packed rows of traces.

Used three times: to pretrain a base, to warm up a teacher (`format="teacher"`, loss on
the explanation only), and to distil a student (`format="student"`, loss on thought and
solution).
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from rlt_jax.data import examples, pipeline, selection
from rlt_jax.data.templates import Template, load_template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError, check_choice
from rlt_jax.settings import build
from rlt_jax.stages.sft_programs import jit_update, make_evaluation
from rlt_jax.training import checkpoint, hosts, sharding
from rlt_jax.training.lora import LoRAConfig, Tuning, make_tuning
from rlt_jax.training.metrics import (
    MetricWriter,
    phase_metrics,
    read_jsonl,
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
from rlt_jax.types import TrainState

_LOG = logging.getLogger("rlt_jax")

FORMATS = {"teacher": examples.teacher_row, "student": examples.student_row}


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Settings of the loop.

    Attributes:
      format: which rows are made of the traces, "teacher" or "student".
      steps: optimizer steps.
      batch_size: packed rows per step.
      micro_batch_size: rows computed at once, over all devices; 0 is all of them.
      row_length: tokens per packed row.
      overlong: what becomes of a trace whose row is longer: "error" refuses it, "drop"
        leaves it out, "shorter" uses another one of the same question that fits, if
        there is one, "truncate" cuts its row.
      traces_per_question: at most so many of each question of a source, chosen by the
        seed among those that fit; 0 for all.
      evaluate_every: steps between evaluations on the held-out traces, besides the first
        and the last; 0 for the last only.
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
    overlong: str = "error"
    traces_per_question: int = 0
    evaluate_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 1
    max_skipped: int = 5
    profile_steps: Sequence[int] = ()

    def evaluates_after(self, done: int) -> bool:
        """Whether the held-out loss is due when so many steps are done."""
        every = self.evaluate_every
        return done == self.steps or (every > 0 and done % every == 0)

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
        check_choice("sft.format", self.format, FORMATS)
        check_choice("sft.overlong", self.overlong, selection.OVERLONG)
        for name in ("traces_per_question", "evaluate_every"):
            if getattr(self, name) < 0:
                raise UserError(f"sft.{name}={getattr(self, name)}: at least 0.")


SECTIONS = {
    "model": checkpoint.ModelSource,
    "template": None,
    "data": None,
    "held_out": None,  # traces as of `data`, without a mix; or None
    "sft": SFTConfig,
    "lora": LoRAConfig,
    "optimizer": OptimizerConfig,
    "mesh": sharding.MeshConfig,
}


def run(config: ml_collections.ConfigDict, workdir: Path, seed: int) -> dict[str, Any]:
    """Trains a model on traces; leaves checkpoints that other stages load.

    Returns:
      Numbers of traces of each section that names some, last loss; the last held-out
      loss and, where it was evaluated, the first.
    """
    c = build(SFTConfig, config.sft, "sft")
    mesh = sharding.make_mesh(build(sharding.MeshConfig, config.mesh, "mesh"))
    check_rows(c, mesh)
    source = build(checkpoint.ModelSource, config.model, "model")
    key = jax.random.key(seed)
    model, params, tokenizer = checkpoint.load(source, mesh, key)
    template = load_template(config.template)
    sources = pipeline.load_sources(config.data, template, seed)
    reading = (tokenizer, template, seed, model.config.max_length)
    rows, counts = load_rows(c, sources, *reading)
    held_out, found = load_held_out(c, config.held_out, *reading)
    counts |= found
    shares = [source.share for source in sources]
    batches = pipeline.packed_batches(rows, shares, c.batch_size, c.row_length, seed)

    low_rank = build(LoRAConfig, config.lora, "lora")
    tuning, params = make_tuning(low_rank, model, params, mesh, key)
    tx = make_optimizer(build(OptimizerConfig, config.optimizer, "optimizer"), c.steps)
    shardings = state_shardings(tuning.model, tx, mesh)
    state = new_state(params, tx, shardings)
    del params
    parts = c.batch_size // c.rows_at_once
    update = jit_update(tuning.model, tx, mesh, shardings, parts)
    evaluate = make_evaluation(held_out, tuning, mesh, shardings, parts)
    checkpoint.describe(workdir, model, tokenizer)
    with checkpoint.open_manager(workdir, c.keep_checkpoints) as manager:
        first, state = _restore(manager, tuning, state, batches)
        with MetricWriter(workdir, first) as writer:
            began = time.monotonic()
            for step in steps(first, c.steps, workdir, c.profile_steps):
                done, first_loss = step + 1, {}
                if c.evaluate_every and not step:
                    first_loss = {"held_out/loss_first": evaluate(state.params)}
                rows = next(batches)
                batch = sharding.put_rows(rows, mesh)
                state, metrics = update(state, batch, tuning.frozen)
                tokens, now = np.count_nonzero(rows["segment_ids"]), time.monotonic()
                metrics |= phase_metrics("step", tokens, now - began) | first_loss
                began = now
                if held_out and c.evaluates_after(done):
                    metrics["held_out/loss"] = evaluate(state.params)
                check_skipped(writer.write(step, metrics), c.max_skipped)
                stop = hosts.stopping()
                if done % c.checkpoint_every == 0 or done == c.steps or stop:
                    # A checkpoint's steps have their rows.
                    check_skipped(writer.flush(), c.max_skipped)
                    _save(manager, done, tuning, state, batches)
                if stop:
                    raise hosts.Stopped
        manager.wait_until_finished()
    losses = hosts.from_first(lambda: _losses(workdir / "metrics.jsonl"))
    return {"traces": counts} | losses


def check_rows(c: SFTConfig, mesh: Mesh) -> None:
    """Refuses rows that the mesh cannot split."""
    names = "sft.micro_batch_size (or batch_size), sft.row_length"
    sharding.check_rows(mesh, c.rows_at_once, c.row_length, names)


def load_rows(
    c: SFTConfig,
    sources: Sequence[pipeline.Source],
    tokenizer: Tokenizer,
    template: Template,
    seed: int,
    context: int,
) -> tuple[list[list[examples.Row]], dict[str, dict[str, int]]]:
    """The rows that fit of every source, and its numbers of traces by its name.

    A row has to fit into sft.row_length and into the model's context.
    """
    limit = min(c.row_length, context)
    name = "sft.row_length" if limit == c.row_length else "the model's max_length"
    made, counts = [], {}
    for where, _, traces in sources:
        hosts.agree_on_items(f"the traces of {where}", traces)
        rows, counts[where] = selection.fit_rows(
            [FORMATS[c.format](tokenizer, template, trace) for trace in traces],
            [trace.problem.question for trace in traces],
            limit,
            c.overlong,
            c.traces_per_question,
            seed,
            f"{where}, {name} (see sft.overlong)",
        )
        made.append(rows)
        if any(counts[where][name] for name in ("dropped", "replaced", "truncated")):
            numbers = ", ".join(f"{n} {name}" for name, n in counts[where].items())
            _LOG.warning(
                "%s: traces longer than %s=%d: %s", where, name, limit, numbers
            )
    return made, counts


def load_held_out(
    c: SFTConfig,
    config: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    template: Template,
    seed: int,
    context: int,
) -> tuple[list[dict[str, np.ndarray]], dict[str, dict[str, int]]]:
    """Batches of the section `held_out`, [] where there is none; its numbers of traces.

    All of its traces are used; of those that do not fit none stands in for another.
    """
    if config is None:
        if c.evaluate_every:
            raise UserError("sft.evaluate_every needs traces in the section held_out.")
        return [], {}
    overlong = "drop" if c.overlong == "shorter" else c.overlong
    c = dataclasses.replace(c, overlong=overlong, traces_per_question=0)
    traces = pipeline.load_traces(config, template, seed, "held_out")
    source = pipeline.Source("held_out", 1.0, traces)
    (rows,), counts = load_rows(c, [source], tokenizer, template, seed, context)
    return pipeline.all_batches(rows, c.batch_size, c.row_length), counts


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


def _losses(file: Path) -> dict[str, float]:
    """The last training loss; of the held-out ones the last and the first, if any."""
    rows = read_jsonl(file)
    found = {
        "loss": rows[-1]["sft/loss"],
        "held_out_loss": rows[-1].get("held_out/loss"),
        "held_out_loss_first": rows[0].get("held_out/loss_first"),
    }
    return {name: loss for name, loss in found.items() if loss is not None}
