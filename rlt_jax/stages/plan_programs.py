"""The device programs of each stage, ready to be lowered for devices elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlt_jax.api import jit_score
from rlt_jax.costs.flops import forward_flops, train_flops
from rlt_jax.errors import UserError
from rlt_jax.inference.decode import Refill
from rlt_jax.inference.engine import EngineConfig, cache_shardings, make_engine
from rlt_jax.inference.log_probs import chunk_length
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.weights import decode_weights
from rlt_jax.models.paged_cache import page_bytes
from rlt_jax.rl.losses import ObjectiveConfig
from rlt_jax.rl.policy_update import PolicyBatch
from rlt_jax.rl.rlt_reward import RLTRewardConfig
from rlt_jax.rl.scorer import StudentsConfig
from rlt_jax.settings import build
from rlt_jax.stages import plan_shapes as shapes
from rlt_jax.stages import policy_programs, rl, sft
from rlt_jax.stages.plan_shapes import Lengths, Shape
from rlt_jax.stages.roles import jit_log_probs, load_rows, students_of
from rlt_jax.training import sharding
from rlt_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlt_jax.training.state import abstract_state, state_shardings
from rlt_jax.types import ScoringBatch

Section = Mapping[str, Any]


class Program(NamedTuple):
    """One device program.

    Attributes:
      name: of it.
      jitted: has `lower`.
      args: of it, as shapes.
      resident: arrays that are on the devices beside its arguments.
      runs: how often it runs in a step of its stage.
      flops: model flops of a run, over all devices.
      trips: of the loops whose length depends on the data, from the outermost in.
      hbm_bytes: of a run on a device, where the compiled text does not tell.
    """

    name: str
    jitted: Any
    args: tuple
    resident: Any
    runs: float
    flops: float
    trips: tuple[int, ...] = ()
    hbm_bytes: float | None = None


def sft_programs(
    section: Section, recipe: Section, mesh: Mesh, _: Lengths
) -> list[Program]:
    """The update of supervised training, on full rows."""
    c = build(sft.SFTConfig, section["sft"], "sft")
    sft.check_rows(c, mesh)
    model, params = shapes.load_shape(section["model"], recipe, mesh)
    tx = _optimizer(section, c.steps)
    state = abstract_state(model, params, tx, mesh)
    ids = shapes.per_row(mesh, (c.batch_size, c.row_length), jnp.int32)
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), ids)
    batch["loss_mask"] = shapes.per_row(mesh, ids.shape, jnp.bool_)
    placed, parts = state_shardings(model, tx, mesh), c.batch_size // c.rows_at_once
    update = sft.jit_update(model, tx, mesh, placed, parts)
    tokens = c.batch_size * c.row_length
    C = chunk_length(c.rows_at_once, c.row_length, model.config.vocab_size, mesh.size)
    flops = train_flops(model.config, tokens, c.row_length / 2, tokens)
    trips = (-(-c.row_length // C),)
    return [Program("update", update, (state, batch, None), (), 1, flops, trips)]


def rl_programs(
    section: Section, recipe: Section, mesh: Mesh, lengths: Lengths
) -> list[Program]:
    """Rollout, scores, log-probs of the reference, update and mixing."""
    c = build(rl.RLConfig, section["loop"], "loop")
    objective = build(ObjectiveConfig, section["objective"], "objective")
    sampling = build(SamplingConfig, section["sampling"], "sampling")
    rows, N = load_rows(section, mesh), c.batch_size * c.group_size
    policy = shapes.load_shape(section["policy"], recipe, mesh)
    students = [policy] if c.self_teaching else _students(section, recipe, mesh)
    tx = _optimizer(section, c.steps * c.updates_per_rollout)
    state = abstract_state(*policy, tx, mesh)
    reference = policy.params if objective.beta else ()
    # Offloaded, each is on the devices for as long as it is used.
    others = [student.params for student in students] + [reference]
    others = [] if c.offload else others

    trips = shapes.micro_batches(policy.model.config, mesh, N, rows, lengths)
    batch = shapes.scoring_batch(mesh, N, rows)
    programs = _rollout(section, policy, sampling, mesh, rows.row_length, N, lengths)
    beside = (state.opt_state, *others)
    programs = [p._replace(resident=(p.resident, beside)) for p in programs]
    if students:
        score = _score(section, policy, students, sampling, mesh, batch, lengths)
        beside = (state.opt_state, () if c.offload else reference)
        programs.append(score._replace(resident=beside, trips=trips))
    if objective.beta:
        log_probs = jit_log_probs(policy.model, sampling.temperature, mesh)
        args = (reference, batch.teacher, batch.completion)
        beside = (state, others[:-1])
        flops = _flops(forward_flops, policy, N, lengths)
        programs.append(Program("reference", log_probs, args, beside, 1, flops, trips))

    known = bool(students) or c.updates_per_rollout > 1
    policy_batch = _policy_batch(mesh, batch, known, bool(objective.beta))
    placed = state_shardings(policy.model, tx, mesh)
    update = policy_programs.jit_update(
        policy.model, tx, sampling, objective, mesh, placed
    )
    args = state, policy_batch, None
    flops = _flops(train_flops, policy, N, lengths)
    programs.append(
        Program("update", update, args, others, c.updates_per_rollout, flops, trips)
    )
    if objective.beta and c.sync_every:
        mix = policy_programs.jit_mix()
        args = (reference, state.params, c.sync_alpha)
        beside = (state.opt_state, others[:-1])
        programs.append(Program("mix", mix, args, beside, 1 / c.sync_every, 0))
    return programs


def collect_programs(
    section: Section, recipe: Section, mesh: Mesh, lengths: Lengths
) -> list[Program]:
    """Rollout and scores of a batch of explanations."""
    sampling = build(SamplingConfig, section["sampling"], "sampling")
    rows, N = load_rows(section, mesh), section["collect"]["batch_size"]
    teacher = shapes.load_shape(section["teacher"], recipe, mesh)
    students = _students(section, recipe, mesh)
    resident = [student.params for student in students]
    programs = _rollout(section, teacher, sampling, mesh, rows.row_length, N, lengths)
    weights_and_cache = programs[-1].args[:2]
    batch = shapes.scoring_batch(mesh, N, rows)
    score = _score(section, teacher, students, sampling, mesh, batch, lengths)
    trips = shapes.micro_batches(teacher.model.config, mesh, N, rows, lengths)
    return [
        *(p._replace(resident=(p.resident, resident)) for p in programs),
        score._replace(resident=weights_and_cache, trips=trips),
    ]


def evaluate_programs(
    section: Section, recipe: Section, mesh: Mesh, lengths: Lengths
) -> list[Program]:
    """The rollout of a batch of answers."""
    sampling = build(SamplingConfig, section["sampling"], "sampling")
    model = shapes.load_shape(section["model"], recipe, mesh)
    longest = model.model.config.max_length
    N = section["evaluate"]["batch_size"]
    return _rollout(section, model, sampling, mesh, longest, N, lengths)


PROGRAMS = {
    "sft": sft_programs,
    "rl": rl_programs,
    "collect": collect_programs,
    "evaluate": evaluate_programs,
}


def _rollout(
    section: Section,
    policy: Shape,
    sampling: SamplingConfig,
    mesh: Mesh,
    longest_row: int,
    N: int,
    lengths: Lengths,
) -> list[Program]:
    """Weights to decode with, prefill of a part of prompts, steps of decoding.

    All slots are taken to be busy all the time.
    """
    model, params = policy
    config = build(EngineConfig, section["engine"], "engine")
    engine = make_engine(model, sampling, (0,), config, mesh, longest_row)
    layout = engine.layout
    _, to_decode, axes = decode_weights(model, config.weights)
    decoded = jax.eval_shape(to_decode, params)
    weights = sharding.abstract(decoded, sharding.decoding_shardings(axes, mesh))
    cache, slots = jax.eval_shape(engine.new_cache)
    cache = jax.tree.map(sharding.abstract, cache, cache_shardings(mesh))
    slots = sharding.abstract(slots, sharding.batch_sharding(mesh))
    B = layout.shards * layout.slots

    def ids(*shape: int) -> Any:
        return shapes.per_row(mesh, shape, jnp.int32)

    replaced = shapes.per_row(mesh, (B,), jnp.bool_)
    table = ids(B, layout.columns)
    refill = Refill(replaced, slots, table, ids(B), ids(B), ids(layout.shards))
    size = engine.chunks[-1]
    part = ids(layout.shards, layout.columns), ids(layout.shards, size)
    fill = (weights, cache, *part, ids(layout.shards))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = sharding.abstract(key, sharding.replicated(mesh))
    draw = (weights, cache, slots, refill, key)

    c, steps = model.config, layout.steps
    context = lengths.prompt + lengths.completion / 2
    stored = context * page_bytes(c, 1) * layout.slots / mesh.shape["tensor"]
    read = steps * (sharding.device_bytes(weights) + stored)
    prompts = N / section.get("loop", {}).get("group_size", 1)
    parts = prompts * -(-lengths.prompt // size) / layout.shards
    filled = forward_flops(c, layout.shards * size, lengths.prompt / 2, 0)
    drawn = forward_flops(c, B * steps, context, B * steps)
    dispatches = N * lengths.completion / (B * steps)
    return [
        Program("weights", engine.to_decode, (params,), (), 1, 0),
        Program("prefill", engine.prefill, fill, params, parts, filled),
        Program(
            "decode", engine.decode, draw, params, dispatches, drawn, (steps,), read
        ),
    ]


def _policy_batch(
    mesh: Mesh, batch: ScoringBatch, known: bool, beta: bool
) -> PolicyBatch:
    """What an update takes; `known`: whether the old log-probs are computed before."""
    per_token = shapes.per_row(mesh, batch.teacher.tokens.shape, jnp.float32)
    return PolicyBatch(
        batch.teacher,
        batch.completion,
        shapes.per_row(mesh, batch.closed.shape, jnp.float32),
        per_token if known else None,
        per_token if beta else None,
        batch.closed,
        per_token,
    )


def _score(
    section: Section,
    policy: Shape,
    students: Sequence[Shape],
    sampling: SamplingConfig,
    mesh: Mesh,
    batch: ScoringBatch,
    lengths: Lengths,
) -> Program:
    """The reward of a batch of completions."""
    jitted = jit_score(
        build(RLTRewardConfig, section["reward"], "reward"),
        build(StudentsConfig, section["students"], "students"),
        policy.model,
        [student.model for student in students],
        sampling.temperature,
        mesh,
    )
    params = tuple(student.params for student in students)
    batches, coef = (batch,) * len(students), shapes.per_row(mesh, (), jnp.float32)
    (N,) = batch.closed.shape
    flops = sum(_flops(forward_flops, x, N, lengths) for x in (policy, *students))
    return Program(
        "score", jitted, (policy.params, params, batches, coef), (), 1, flops
    )


def _students(section: Section, recipe: Section, mesh: Mesh) -> list[Shape]:
    several = students_of(section["student"])
    return [shapes.load_shape(one, recipe, mesh) for one in several]


def _optimizer(section: Section, steps: int) -> Any:
    if section["lora"].get("rank"):
        raise UserError("plan: stages with lora.rank > 0 cannot be planned yet.")
    return make_optimizer(
        build(OptimizerConfig, section["optimizer"], "optimizer"), steps
    )


def _flops(
    count: Callable[..., float], shape: Shape, N: int, lengths: Lengths
) -> float:
    """Of N rows, of which the completions get logits."""
    tokens, head = N * lengths.row, N * lengths.completion
    return count(shape.model.config, tokens, lengths.row / 2, head)
