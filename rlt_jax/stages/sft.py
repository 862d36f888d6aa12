"""Stage `sft`: next-token training on packed rows of traces.

Used three times: to pretrain a base, to warm up a teacher (`role="teacher"`, loss on the
explanation only), and to distil a student (`role="student"`, loss on thought and
solution).
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlt_jax import ranges
from rlt_jax.data import examples, pipeline, rows, selection, templates
from rlt_jax.errors import LOG, UserError
from rlt_jax.inference.head import log_probs_and_entropy
from rlt_jax.models.transformer import Transformer
from rlt_jax.records import Record
from rlt_jax.settings import build
from rlt_jax.stages import setup
from rlt_jax.training import checkpoint, hosts, lora, optimizer, sharding
from rlt_jax.training.learner import Learner
from rlt_jax.training.metrics import MetricWriter, phase_metrics, read_jsonl, steps
from rlt_jax.training.state import check_updates, from_items, to_items
from rlt_jax.types import Array, Batch, Metrics, Params


@dataclasses.dataclass(frozen=True)
class SFTConfig(ranges.Checked):
    """Settings of the loop.

    Attributes:
      role: whose sequences are made from the traces, "teacher" or "student".
      batch_size: packed rows per step.
      row_length: tokens per packed row.
      steps: optimizer steps; 0 where `epochs` counts them.
      epochs: passes over the sequences that are used, all those of a mix together; their
        number of steps depends on how the sequences are packed. 0 where `steps` counts.
      micro_batch_size: rows computed at once, over all devices; 0 is all of them.
      overlong: what happens to a trace whose sequence is longer: "error" raises, "drop"
        leaves it out, "shorter" uses another one of the same question that fits, if
        there is one, "truncate" cuts its sequence.
      allow_empty: whether a file without any trace saves the model as it is, with a
        warning, instead of ending the run.
      traces_per_question: maximum traces of each question of a source, chosen by the
        seed among those that fit; 0 for all.
      evaluate_every: steps between evaluations on the held-out traces, besides the first
        and the last; 0 for the last only.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: number of checkpoints to keep.
      max_skipped: consecutive steps that may be skipped, for a loss or gradient that is
        not finite, before the run stops.
      profile_steps: the first step to profile, and the one after the last.
    """

    role: Annotated[str, ranges.OneOf(examples.ROLES)]
    batch_size: ranges.Count
    row_length: ranges.Size
    steps: ranges.NonNegativeInt = 0
    epochs: Annotated[float, ranges.Range(0, 10_000)] = 0.0
    micro_batch_size: Annotated[int, ranges.Range(0, 2**16)] = 0
    overlong: Annotated[str, ranges.OneOf(selection.OVERLONG)] = "error"
    allow_empty: bool = False
    traces_per_question: ranges.NonNegativeInt = 0
    evaluate_every: ranges.NonNegativeInt = 0
    checkpoint_every: ranges.PositiveInt = 100
    keep_checkpoints: ranges.PositiveInt = 1
    max_skipped: ranges.NonNegativeInt = 5
    profile_steps: ranges.Steps = ()

    @property
    def shape(self) -> rows.RowShape:
        """Shape of a micro-batch of packed rows."""
        return rows.RowShape(self.micro_batch_size or self.batch_size, self.row_length)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.steps) == bool(self.epochs):
            given = f"sft.steps={self.steps}, sft.epochs={self.epochs}"
            raise UserError(f"{given}: set one of the two, and the other to 0.")
        if self.batch_size % self.shape.micro_batch_size:
            given = f"sft.micro_batch_size={self.micro_batch_size}"
            raise UserError(f"{given} does not divide batch_size={self.batch_size}.")


SECTIONS = {
    "model": checkpoint.ModelSource,
    "template": str,
    "data": pipeline.check_sources,
    "held_out": (pipeline.check_traces, None),  # without a mix
    "sft": SFTConfig,
    "lora": lora.LoRAConfig,
    "optimizer": optimizer.OptimizerConfig,
    "mesh": sharding.MeshConfig,
}


def run(config: ConfigDict, workdir: Path, seed: int) -> Record:
    """Trains a model on traces; leaves checkpoints that other stages load.

    Returns:
      Numbers of traces of each data section, the last training loss; the last held-out
      loss and, where it was evaluated, the first.
    """
    source = build(checkpoint.ModelSource, config.model, "model")
    mesh, key = setup.load_mesh(config), jax.random.key(seed)
    c, opened, batches, held_out, counts = prepare(config, seed)
    params = checkpoint.load_params(source, opened.model, mesh, key)
    if batches is None:
        LOG.warning(f"{config.data.path} has no traces: the model is saved as it is")
        checkpoint.save_model(workdir, 0, opened, params)
        return {"steps": 0, "traces": counts}
    loaded = opened._replace(params=params)
    learner, tuning, state = setup.load_learner(
        config, next_token_loss, loaded, mesh, c.steps, seed
    )
    checkpoint.describe(workdir, loaded.model, loaded.tokenizer)
    del loaded, params
    with checkpoint.open_manager(workdir, c.keep_checkpoints) as manager:
        first, items = 0, to_items(state, tuning.item)

        def use(data: Record) -> None:
            batches.set_state(data["batches"])

        if restored := checkpoint.restore_latest(manager, items, use):
            first, items = restored
            state = from_items(items, tuning.item)
        with MetricWriter(workdir, first) as writer:
            began = time.monotonic()
            for step in steps(first, c.steps, workdir, c.profile_steps):
                done, first_loss = step + 1, {}
                if c.evaluate_every and not step:
                    loss = held_out_loss(learner, state.params, held_out, mesh)
                    first_loss = {"held_out/loss_first": loss}
                batch = next(batches)
                tokens = np.count_nonzero(batch.segment_ids)
                state, metrics = learner.update(state, sharding.put_rows(batch, mesh))
                fill = tokens / batch.tokens.size
                metrics |= {"sft/tokens": tokens, "sft/fill": fill} | first_loss
                began, before = time.monotonic(), began
                metrics |= phase_metrics("step", tokens, began - before)
                if held_out and setup.is_due(done, c.evaluate_every, c.steps):
                    loss = held_out_loss(learner, state.params, held_out, mesh)
                    metrics["held_out/loss"] = loss
                check_updates(writer.write(step, metrics), c.max_skipped, False)
                stop = hosts.stopping()
                if setup.is_due(done, c.checkpoint_every, c.steps) or stop:
                    # The metrics of all steps before a checkpoint are on disk.
                    last = writer.flush(), c.max_skipped, done == c.steps
                    if check_updates(*last):
                        trees = {"params": tuning.merge(state.params)}
                        trees |= to_items(state, tuning.item)
                        data = {"batches": batches.get_state()}
                        checkpoint.save(manager, done, trees, data)
                if stop:
                    raise hosts.Stopped
        manager.wait_until_finished()
    losses = hosts.from_first(lambda: _losses(workdir / "metrics.jsonl"))
    return {"steps": c.steps, "traces": counts} | losses


class Prepared(NamedTuple):
    """What `run` works with, before the weights are loaded.

    Attributes:
      c: settings with a number of steps.
      opened: the model.
      batches: endless packed rows; None where there is no trace, see `allow_empty`.
      held_out: batches that hold every held-out trace once.
      counts: numbers of traces of each data section.
    """

    c: SFTConfig
    opened: checkpoint.LoadedModel
    batches: rows.PackedBatches | None
    held_out: list[Batch]
    counts: dict[str, dict[str, int]]


def prepare(config: ConfigDict, seed: int) -> Prepared:
    """Model without weights and data of the stage; raises UserError for bad input."""
    c = build(SFTConfig, config.sft, "sft")
    check_rows(c, setup.load_mesh(config))
    opened = checkpoint.open_model(build(checkpoint.ModelSource, config.model, "model"))
    file = Path(config.data.get("path") or "")
    if c.allow_empty and file.is_file() and not file.stat().st_size:
        return Prepared(c, opened, None, [], {})
    template = templates.load_template(config.template)
    renderer = examples.Renderer(opened.tokenizer, template, c.role)
    context = opened.model.config.max_length
    sources = pipeline.load_sources(config.data, template, seed)
    made, counts = [], {}
    for source in sources:
        used, counts[source.where] = load_examples(c, source, renderer, seed, context)
        made.append(used)
    held_out: list[Batch] = []
    if config.held_out is not None:
        traces = pipeline.load_traces(config.held_out, template, seed, "held_out")
        source = pipeline.Source("held_out", 1.0, traces)
        # All are used: none is replaced by another trace of its question.
        overlong = "drop" if c.overlong == "shorter" else c.overlong
        every = dataclasses.replace(c, overlong=overlong, traces_per_question=0)
        used, counts["held_out"] = load_examples(every, source, renderer, seed, context)
        held_out = pipeline.all_batches(used, c.shape, c.batch_size)
    elif c.evaluate_every:
        raise UserError("sft.evaluate_every needs traces in the section held_out.")
    weights = [source.weight for source in sources]
    batches = pipeline.packed_batches(made, weights, c.shape, c.batch_size, seed)
    if c.epochs:
        sequences = sum(map(len, made))
        count = batches.count_until(round(c.epochs * sequences) or 1)
        LOG.info(f"{c.epochs:g} epochs of {sequences:,} sequences are {count:,} steps")
        c = dataclasses.replace(c, steps=count, epochs=0.0)
    return Prepared(c, opened, batches, held_out, counts)


def next_token_loss(
    model: Transformer, params: Params, batch: Batch
) -> tuple[Array, Metrics]:
    """Cross entropy of the learned tokens of a micro-batch, weighted by `loss_weights`."""
    learned = batch.loss_weights > 0
    log_probs, _ = log_probs_and_entropy(model, params, batch, wanted=learned)
    loss = -(log_probs * batch.loss_weights).sum()
    return loss, {"sft/loss": loss}


def held_out_loss(
    learner: Learner, params: Params, batches: Sequence[Batch], mesh: Mesh
) -> float:
    """Mean loss over all learned tokens of the batches."""
    loss = tokens = 0
    for batch in batches:
        learned = np.count_nonzero(batch.loss_weights)
        mean = jax.device_get(learner.loss(params, sharding.put_rows(batch, mesh)))
        loss, tokens = loss + learned * float(mean), tokens + learned
    return loss / tokens


def check_rows(c: SFTConfig, mesh: Mesh) -> None:
    """Raises UserError for rows that the mesh cannot split."""
    names = "sft.micro_batch_size (or batch_size), sft.row_length"
    sharding.check_rows(mesh, c.shape.micro_batch_size, c.row_length, names)


def load_examples(
    c: SFTConfig,
    source: pipeline.Source,
    renderer: examples.Renderer,
    seed: int,
    context: int,
) -> tuple[list[examples.Example], dict[str, int]]:
    """The sequences of a source that fit, and its numbers of traces.

    A sequence has to fit into sft.row_length and into the model's context.
    """
    limit = min(c.row_length, context)
    name = "sft.row_length" if limit == c.row_length else "the model's max_length"
    where, _, traces = source
    hosts.agree_on_items(f"the traces of {where}", traces)
    sequences = examples.EXAMPLES[c.role](renderer, traces)
    asked = [str(one.problem.asked) for one in traces]
    what = f"{where}, {name} (see sft.overlong)"
    rule = limit, c.overlong, c.traces_per_question, seed, what
    used, counts = selection.fit_examples(sequences, asked, *rule)
    if any(counts[change] for change in ("dropped", "replaced", "truncated")):
        numbers = ", ".join(f"{n} {key}" for key, n in counts.items())
        LOG.warning(f"{where}: traces longer than {name}={limit}: {numbers}")
    return used, counts


def _losses(file: Path) -> dict[str, float]:
    """The last training loss; the last and the first held-out loss, if any."""
    records = read_jsonl(file) if file.is_file() else []
    first, last = (records[0], records[-1]) if records else ({}, {})
    losses = {
        "loss": last.get("sft/loss"),
        "held_out_loss": last.get("held_out/loss"),
        "held_out_loss_first": first.get("held_out/loss_first"),
    }
    return {name: loss for name, loss in losses.items() if loss is not None}
