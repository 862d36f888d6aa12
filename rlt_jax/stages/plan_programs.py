"""The device programs of each stage, ready to be lowered for devices elsewhere."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlt_jax.costs.flops import forward_flops, train_flops
from rlt_jax.inference.decode import Refill
from rlt_jax.inference.engine import EngineConfig, cache_shardings, make_engine
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.weights import decode_weights
from rlt_jax.models.paged_cache import page_bytes
from rlt_jax.rl.losses import ObjectiveConfig, policy_loss
from rlt_jax.settings import Section, build
from rlt_jax.stages import plan_shapes as shapes
from rlt_jax.stages import rl, setup, sft
from rlt_jax.stages.plan_shapes import Lengths, Shape
from rlt_jax.training import learner, sharding
from rlt_jax.training.state import abstract_state, state_shardings
from rlt_jax.types import Batch, Params


class Program(NamedTuple):
    """One device program.

    Attributes:
      name: name of the program.
      jitted: a `jax.jit` function.
      args: shapes of its arguments.
      resident: arrays that are on the devices beside its arguments.
      runs: executions in a step of its stage.
      flops: model flops of one execution, over all devices.
      trips: trip counts of loops whose length depends on the data, outermost first.
      kernel_flops: flops of kernels whose work depends on the data, of one execution over
        all devices.
      hbm_bytes: HBM traffic of one execution on a device, where it depends on the data.
    """

    name: str
    jitted: jax.stages.Wrapped
    args: tuple
    resident: Any = ()
    runs: float = 1
    flops: float = 0
    trips: tuple[int, ...] = ()
    kernel_flops: float = 0
    hbm_bytes: float | None = None


def sft_programs(
    section: Section, recipe: Section, mesh: Mesh, _: Lengths
) -> list[Program]:
    """The update of supervised training, on full rows."""
    c = build(sft.SFTConfig, section["sft"], "sft")
    sft.check_rows(c, mesh)
    shape = shapes.load_shape(section["model"], recipe, mesh)
    tx = setup.load_optimizer(section, c.steps)
    state = abstract_state(*shape, tx, mesh)
    batch = shapes.packed(mesh, c.batch_size, c.shape)
    weights = shapes.per_row(mesh, batch.tokens.shape, jnp.float32)
    placed = state_shardings(shape.model, tx, mesh)
    update = learner.jit_update(sft.next_token_loss, shape.model, tx, mesh, placed)
    args = state, batch._replace(loss_weights=weights), None
    full = Lengths(0, c.row_length)  # all of it is learned
    flops = _flops(train_flops, shape, c.batch_size, full)
    trips = shapes.micro_batches(shape.model.config, mesh, c.batch_size, c.shape, full)
    # A single micro-batch needs no loop.
    loops = trips[1:] if trips[0] == 1 else trips
    return [Program("update", update, args, flops=flops, trips=loops)]


def rl_programs(
    section: Section, recipe: Section, mesh: Mesh, lengths: Lengths
) -> list[Program]:
    """Rollout, log-probs, reward, update and mixing."""
    c = build(rl.RLConfig, section["loop"], "loop")
    objective = build(ObjectiveConfig, section["objective"], "objective")
    sampling = build(SamplingConfig, section["sampling"], "sampling")
    rows, E = setup.load_row_shape(section, mesh), c.batch_size * c.group_size
    policy = shapes.load_shape(section["policy"], recipe, mesh)
    students = [policy] if c.self_teaching else _students(section, recipe, mesh)
    tx = setup.load_optimizer(section, c.steps * c.updates_per_rollout)
    state = abstract_state(*policy, tx, mesh)
    reference = policy.params if objective.beta else ()
    # Offloaded, each is on the devices only while it is used.
    others = [] if c.offload else [*(one.params for one in students), reference]

    trips = shapes.micro_batches(policy.model.config, mesh, E, rows, lengths)
    batch = shapes.rollout_batch(mesh, E, rows, len(students))
    programs = _rollout(section, policy, mesh, rows.row_length, E, lengths)
    beside = (state.opt_state, *others)
    programs = [p._replace(resident=(p.resident, beside)) for p in programs]
    reads = (bool(students) or c.updates_per_rollout > 1) + bool(objective.beta)
    trained = policy._replace(params=state.params)
    first, *rest = _log_probs(section, [trained, *students], batch, mesh, lengths)
    readers = [first._replace(runs=reads), *rest] if reads else rest
    programs += _add_resident(readers, state.opt_state, (state.params, *others), trips)

    names = ["advantages", "inverse_length", "loss_weights"]
    names += ["log_probs"] * (reads > bool(objective.beta))
    names += ["ref_log_probs"] * bool(objective.beta)
    per_token = dict.fromkeys(names, batch.sampler_log_probs)
    filled = batch._replace(students=(), **per_token)
    loss_fn = policy_loss(objective, sampling.temperature, E)
    placed = state_shardings(policy.model, tx, mesh)
    limit = objective.skip_gradient_norm
    update = learner.jit_update(loss_fn, policy.model, tx, mesh, placed, limit)
    flops, runs = _flops(train_flops, policy, E, lengths), c.updates_per_rollout
    args = state, filled, None
    programs.append(Program("update", update, args, others, runs, flops, trips))
    if objective.beta and c.sync_every:
        args = (reference, state.params, c.sync_alpha)
        beside = (state.opt_state, others[:-1])
        programs.append(Program("mix", learner.mix, args, beside, 1 / c.sync_every))
    return programs


def collect_programs(
    section: Section, recipe: Section, mesh: Mesh, lengths: Lengths
) -> list[Program]:
    """Rollout, log-probs and reward of a batch of explanations."""
    rows, E = setup.load_row_shape(section, mesh), section["collect"]["batch_size"]
    teacher = shapes.load_shape(section["teacher"], recipe, mesh)
    students = _students(section, recipe, mesh)
    params = [student.params for student in students]
    programs = _rollout(section, teacher, mesh, rows.row_length, E, lengths)
    weights_and_cache = programs[-1].args[:2]
    batch = shapes.rollout_batch(mesh, E, rows, len(students))
    trips = shapes.micro_batches(teacher.model.config, mesh, E, rows, lengths)
    programs = [p._replace(resident=(p.resident, params)) for p in programs]
    readers = _log_probs(section, [teacher, *students], batch, mesh, lengths)
    params = (teacher.params, *params)
    return programs + _add_resident(readers, weights_and_cache, params, trips)


def evaluate_programs(
    section: Section, recipe: Section, mesh: Mesh, lengths: Lengths
) -> list[Program]:
    """The rollout of a batch of answers."""
    model = shapes.load_shape(section["model"], recipe, mesh)
    T, E = model.model.config.max_length, section["evaluate"]["batch_size"]
    return _rollout(section, model, mesh, T, E, lengths)


PROGRAMS = {
    "sft": sft_programs,
    "rl": rl_programs,
    "collect": collect_programs,
    "evaluate": evaluate_programs,
}


def _rollout(
    section: Section, policy: Shape, mesh: Mesh, T: int, E: int, lengths: Lengths
) -> list[Program]:
    """Decoding weights, prefill of a part of the prompts, decode steps.

    All slots are assumed to be busy all the time, with sequences of at most T tokens.
    """
    model, params = policy
    sampling = build(SamplingConfig, section["sampling"], "sampling")
    sampling = dataclasses.replace(sampling, stop=(), stop_ids=(0,))
    config = build(EngineConfig, section["engine"], "engine")
    engine = make_engine(model, None, sampling, config, mesh, T)
    layout, size = engine.layout, engine.chunks[-1]
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
    part = ids(layout.shards, layout.columns), ids(layout.shards, size)
    fill = (weights, cache, *part, ids(layout.shards))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = sharding.abstract(key, sharding.replicated(mesh))
    draw = (weights, cache, slots, refill, key)

    c, steps = model.config, layout.steps
    completions = lengths.completions(E, sampling.max_new_tokens)
    runs, tokens = shapes.dispatches(completions, B, steps), completions.sum()
    context = lengths.prompt + (completions**2).sum() / tokens / 2
    stored = tokens * context * page_bytes(c, 1) / mesh.size
    read = steps * sharding.device_bytes(weights) + stored / runs
    groups = E / section.get("loop", {}).get("group_size", 1)
    parts = groups * math.ceil(lengths.prompt / size) / layout.shards
    filled = forward_flops(c, layout.shards * size, lengths.prompt / 2, 0)
    decoded = forward_flops(c, tokens / runs, context, tokens / runs)
    attention = decoded - forward_flops(c, tokens / runs, 0, tokens / runs)
    decode = draw, params, runs, decoded, (steps,), attention, read
    return [
        Program("weights", engine.to_decode, (params,)),
        Program("prefill", engine.prefill, fill, params, parts, filled),
        Program("decode", engine.decode, *decode),
    ]


def _log_probs(
    section: Section, models: list[Shape], batch: Batch, mesh: Mesh, lengths: Lengths
) -> list[Program]:
    """Log-probs of the policy and of each student; the reward, which reduces them."""
    policy, *students = [shape.model for shape in models]
    compiled, reward = setup.load_reward(section, policy, students, mesh)
    names = ["", "student_", *(f"student_{i}_" for i in range(1, len(students)))]
    functions = (compiled.policy, *compiled.students)
    batches, (E,) = (batch, *batch.students), batch.closed.shape
    programs = []
    for name, jitted, shape, own in zip(names, functions, models, batches):
        flops, args = _flops(forward_flops, shape, E, lengths), (shape.params, own)
        programs.append(Program(f"{name}log_probs", jitted, args, flops=flops))
    if reward:
        found = {"log_probs": batch.sampler_log_probs}
        if compiled.vocabulary_kl:
            segments = batch.completion.segment.shape
            found["vocabulary_kl"] = shapes.per_row(mesh, segments, jnp.float32)
        filled = tuple(student._replace(**found) for student in batch.students)
        batch = batch._replace(log_probs=batch.sampler_log_probs, students=filled)
        args = (batch, shapes.per_row(mesh, (), jnp.float32))
        programs.append(Program("reward", reward, args))
    return programs


def _add_resident(
    programs: Sequence[Program], kept: Any, models: Sequence[Params], trips: tuple
) -> list[Program]:
    """The programs with what stays beside their arguments: `kept`, the other models."""

    def others(program: Program) -> list[Params]:
        return [params for params in models if params is not program.args[0]]

    return [p._replace(resident=(kept, others(p)), trips=trips) for p in programs]


def _students(section: Section, recipe: Section, mesh: Mesh) -> list[Shape]:
    setup.check_students(section["students"])
    return [shapes.load_shape(one, recipe, mesh) for one in section["students"]]


def _flops(kind: Callable[..., float], shape: Shape, E: int, lengths: Lengths) -> float:
    """Model flops of E sequences whose completions get logits."""
    tokens, head = E * lengths.sequence, E * lengths.completion
    return kind(shape.model.config, tokens, lengths.sequence / 2, head)
