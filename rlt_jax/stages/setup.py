"""From the config of a stage to typed values: models, template, sampler, reward."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlt_jax.data import examples, pipeline
from rlt_jax.data.examples import Renderer
from rlt_jax.data.rows import RowShape
from rlt_jax.data.templates import Template, load_template
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import Engine, EngineConfig, make_engine
from rlt_jax.inference.log_probs import LogProbPrograms
from rlt_jax.inference.sampler import Sampler
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.stored import StoredSampler
from rlt_jax.models.transformer import Transformer
from rlt_jax.ranges import check_value
from rlt_jax.records import Problem, Record, Trace, problem_record
from rlt_jax.rl.rewards import RLT, RewardFunction, Term
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig
from rlt_jax.scoring import Models, check_tokenizers, compile_log_probs, jit_rlt_reward
from rlt_jax.settings import Section, build
from rlt_jax.training import checkpoint, hosts, lora, optimizer, sharding, state
from rlt_jax.training.checkpoint import LoadedModel, ModelSource
from rlt_jax.training.learner import Learner, LossFn, make_learner
from rlt_jax.training.provenance import template_hash, tokenizer_hash, weights_hash
from rlt_jax.types import Request, Reward, Rollout, TrainState


def check_students(given: Any, where: str = "students") -> list[ModelSource]:
    """The models of the students.

    Raises:
      UserError: they are no tuple of models, or an invalid one.
    """
    check_value(where, Sequence[Section], given)
    return [build(ModelSource, one, f"{where}[{n}]") for n, one in enumerate(given)]


# Sections that `load_run` reads, with the owners of their keys.
SECTIONS = {
    "students": check_students,
    "ensemble": EnsembleConfig,
    "template": str,
    "rows": RowShape,
    "sampling": SamplingConfig,
    "engine": EngineConfig,
    "rlt_reward": RLTRewardConfig,
    "mesh": sharding.MeshConfig,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What rollouts, log-probs and rewards of a stage are made with, fixed for the stage.

    Attributes:
      role: "teacher" or "student", the role of the policy.
      policy: model, parameters (None while they are trained) and tokenizer.
      students: students of the reward; parameters are None in self-teaching.
      template: system prompts, tags and delimiters.
      row_shape: shape of the packed rows.
      sampling: how completions are sampled.
      sampler: samples completions of the policy.
      rlt_reward: weights of the RLT reward.
      reward: the reward function.
      programs: compiled programs for the log-probs.
      mesh: where everything runs.
    """

    role: str
    policy: LoadedModel
    students: tuple[LoadedModel, ...]
    template: Template
    row_shape: RowShape
    sampling: SamplingConfig
    sampler: Sampler
    rlt_reward: RLTRewardConfig
    reward: RewardFunction
    programs: LogProbPrograms
    mesh: Mesh

    @functools.cached_property
    def renderer(self) -> Renderer:
        """Renders the prompts and sequences of the policy."""
        return Renderer(self.policy.tokenizer, self.template, self.role)

    @property
    def student_limit(self) -> int:
        """Longest sequence of a student, in a row and in every student's context."""
        contexts = [student.model.config.max_length for student in self.students]
        return min([self.row_shape.row_length, *contexts])

    @functools.cached_property
    def student_renderers(self) -> tuple[Renderer, ...]:
        """Render the sequences of the students; see `examples.student_renderers`."""
        tokenizers = [student.tokenizer for student in self.students]
        return examples.student_renderers(tokenizers, self.template)

    def requests(self, problems: Sequence[Problem], first: int = 0) -> list[Request]:
        """A request for a completion of every problem; ids count from `first`."""
        return requests_of(self.renderer, problems, self.sampling.max_new_tokens, first)

    def stored(self, file: Path | None, **options: Any) -> Sampler:
        """The sampler, which keeps its completions in a file if there is one."""
        if file is None:
            return self.sampler
        options["vocab_size"] = self.policy.model.config.vocab_size
        return StoredSampler(self.sampler, file, self.policy.tokenizer, **options)


def load_run(config: Section, role: str, models: Models, terms: Sequence[Term]) -> Run:
    """The run of a stage with a policy, from the sections in `SECTIONS`.

    Args:
      config: of the stage.
      role: of the policy.
      models: the policy and the students of the reward, from `open_models`; their weights
        are not needed yet.
      terms: of the reward.

    Raises:
      UserError: settings contradict each other, or do not fit the mesh or the models.
    """
    policy, *students = models
    mesh, template = load_mesh(config), load_template(config["template"])
    row_shape, names = load_row_shape(config, mesh), [term.name for term in terms]
    if (RLT in names) != bool(students) or (students and role != "teacher"):
        raise UserError(
            f"reward_terms are {names}, the role is {role!r} and "
            f"there are {len(students)} students: the term `rlt` needs students (or "
            "loop.self_teaching) and the role 'teacher', and students need that term."
        )
    rlt_reward = build(RLTRewardConfig, config["rlt_reward"], "rlt_reward")
    check_tokenizers(rlt_reward, *(one.tokenizer for one in models))
    # An explanation's closing tag ends a teacher's completion.
    stop = (template.explanation_tags[1],) if role == "teacher" else ()
    of_students = [student.model for student in students]
    programs, rlt = load_reward(config, policy.model, of_students, mesh)
    return Run(
        role=role,
        policy=policy,
        students=tuple(students),
        template=template,
        row_shape=row_shape,
        sampling=build(SamplingConfig, config["sampling"], "sampling"),
        sampler=load_sampler(policy, config, mesh, row_shape.row_length, stop),
        rlt_reward=rlt_reward,
        reward=RewardFunction(tuple(terms), template, rlt),
        programs=programs,
        mesh=mesh,
    )


def load_reward(
    config: Section, policy: Transformer, students: Sequence[Transformer], mesh: Mesh
) -> tuple[LogProbPrograms, jax.stages.Wrapped | None]:
    """Programs for the log-probs, and for the RLT reward where there are students."""
    reward = build(RLTRewardConfig, config["rlt_reward"], "rlt_reward")
    sampling = build(SamplingConfig, config["sampling"], "sampling")
    programs = compile_log_probs(policy, students, sampling.temperature, reward, mesh)
    if not students:
        return programs, None
    ensemble = build(EnsembleConfig, config["ensemble"], "ensemble")
    return programs, jit_rlt_reward(reward, ensemble, len(students), mesh)


def load_mesh(config: Section, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the section `mesh`, over some devices or, by default, over all."""
    sizes = build(sharding.MeshConfig, config["mesh"], "mesh")
    return sharding.make_mesh(sizes, devices)


def load_learner(
    config: Section,
    loss_fn: LossFn,
    loaded: LoadedModel,
    mesh: Mesh,
    steps: int,
    seed: int,
    max_norm: float | None = None,
) -> tuple[Learner, lora.Tuning, TrainState]:
    """The learner of sections `lora` and `optimizer`, and the first train state.

    Args:
      config: of the stage.
      loss_fn: loss of a micro-batch.
      loaded: the model; the state has copies of its parameters.
      mesh: where everything runs.
      steps: optimizer steps of the whole stage.
      seed: of the adapters' initial weights.
      max_norm: a step with a longer gradient is skipped; None for never.
    """
    low_rank, key = build(lora.LoRAConfig, config["lora"], "lora"), jax.random.key(seed)
    tuning, params = lora.make_tuning(low_rank, loaded.model, loaded.params, mesh, key)
    tx = load_optimizer(config, steps)
    shardings = state.state_shardings(tuning.model, tx, mesh)
    learner = make_learner(loss_fn, tuning, tx, mesh, shardings, max_norm)
    return learner, tuning, state.new_state(params, tx, shardings)


def load_optimizer(config: Section, steps: int) -> state.Optimizer:
    """The section `optimizer` for a number of steps."""
    c = build(optimizer.OptimizerConfig, config["optimizer"], "optimizer")
    return optimizer.make_optimizer(c, steps)


def load_row_shape(config: Section, mesh: Mesh) -> RowShape:
    """The section `rows`; raises UserError where the mesh cannot split it."""
    rows = build(RowShape, config["rows"], "rows")
    names = "rows.micro_batch_size, rows.row_length"
    sharding.check_rows(mesh, rows.micro_batch_size, rows.row_length, names)
    return rows


def model_sources(config: Section, name: str) -> list[ModelSource]:
    """The model of the section `name`, then those of `students`."""
    own = build(ModelSource, config[name], name)
    return [own, *check_students(config["students"])]


def open_models(config: Section, name: str) -> list[LoadedModel]:
    """The models of `model_sources` without their weights."""
    return [checkpoint.open_model(source) for source in model_sources(config, name)]


def load_weights(
    config: Section, name: str, models: Models, mesh: Mesh, seed: int
) -> list[LoadedModel]:
    """Models from `open_models` with their weights."""
    sources, key = model_sources(config, name), jax.random.key(seed)
    loaded = []
    for n, (source, opened) in enumerate(zip(sources, models, strict=True)):
        args = source, opened.model, mesh, jax.random.fold_in(key, n)
        loaded.append(opened._replace(params=checkpoint.load_params(*args)))
    return loaded


def load_problems(
    config: Any, template: Template, seed: int, where: str = "data"
) -> list[Problem]:
    """Problems of a section named `where`, one at least, the same on every host."""
    problems = pipeline.load_problems(config, template, seed, where)
    hosts.agree_on_items(f"the problems of {where}", problems)
    return problems


def load_sampler(
    model: LoadedModel,
    config: Section,
    mesh: Mesh,
    max_length: int,
    stop: Sequence[str] = (),
) -> Engine:
    """The engine of sections `sampling` and `engine`, with further stop texts."""
    sampling = build(SamplingConfig, config["sampling"], "sampling")
    sampling = dataclasses.replace(sampling, stop=(*stop, *sampling.stop))
    sizes = build(EngineConfig, config["engine"], "engine")
    return make_engine(model.model, model.tokenizer, sampling, sizes, mesh, max_length)


def requests_of(
    renderer: Renderer, problems: Sequence[Problem], max_new_tokens: int, first: int = 0
) -> list[Request]:
    """A request for a completion of every problem; ids count from `first`."""
    return [
        Request(renderer.prompt(problem)[1].ids, first + n, max_new_tokens, problem)
        for n, problem in enumerate(problems)
    ]


def check_fit(run: Run, problems: Sequence[Problem]) -> None:
    """Raises UserError where a problem does not fit, whatever the completion.

    A prompt has to leave room for the longest completion in its row, and the question
    and solution of a problem in the row and the context of every student.
    """
    new, T = run.sampling.max_new_tokens, run.row_shape.row_length
    prompts = [len(request.prompt) for request in run.requests(problems)]
    check_room(prompts, new, T, f"{run.role} prompt", "rows.row_length")
    traces = [Trace(problem, "") for problem in problems]
    lengths = {
        renderer: [len(x.tokens) for x in examples.student_examples(renderer, traces)]
        for renderer in set(run.student_renderers)
    }
    for n, (student, renderer) in enumerate(zip(run.students, run.student_renderers)):
        what = f"sequence of students[{n}] without an explanation"
        context = student.model.config.max_length
        check_room(lengths[renderer], 0, T, what, "rows.row_length")
        check_room(lengths[renderer], new, context, what, "the student's context")


def check_room(lengths: list[int], new: int, limit: int, what: str, where: str) -> None:
    """Raises UserError unless sequences leave room for a completion.

    Args:
      lengths: tokens of each sequence.
      new: maximum tokens of the completion.
      limit: tokens that sequence and completion may have together.
      what: names a sequence in the message.
      where: names the limit.
    """
    longest = int(np.argmax(lengths))
    tokens, room = lengths[longest], limit - lengths[longest]
    if room < max(new, 0):
        fix = f"Set max_new_tokens to at most {room}, or raise" if room > 0 else "Raise"
        raise UserError(
            f"{what} {longest} has {tokens} tokens, with sampling.max_new_tokens={new} up "
            f"to {tokens + new}, more than {where}={limit}. {fix} the limit, or drop the "
            "problem."
        )


def is_due(done: int, every: int, total: int) -> bool:
    """Whether to do now what is done every so many steps (0: never) and at the end."""
    return done == total or (every > 0 and done % every == 0)


def provenance_of(
    models: Models, template: Template, temperatures: tuple[float, float]
) -> Record:
    """What a reward depends on: fingerprints of weights, tokenizers and template.

    `models` are the teacher, then the students; `temperatures` those of the teacher and of
    the students.
    """
    weights, *students_weights = (weights_hash(model.params) for model in models)
    tokenizer, *others = (tokenizer_hash(model.tokenizer) for model in models)
    return {
        "teacher": weights,
        "teacher_tokenizer": tokenizer,
        "students": students_weights,
        "student_tokenizers": others,
        "template": template_hash(template),
        "teacher_temperature": temperatures[0],
        "student_temperature": temperatures[1],
    }


def sample_records(
    run: Run, rollout: Rollout, reward: Reward, chosen: slice = slice(None)
) -> list[Record]:
    """Completions and their rewards as JSON records."""
    values, records = jax.device_get(reward), []
    for n in range(len(rollout.requests))[chosen]:
        record, text = problem_record(rollout.requests[n].problem), rollout.texts[n]
        if run.role == "teacher":
            explanation, closed = run.template.parse_completion(text)
            record |= {"reasoning_trace": explanation, "closed": closed}
        else:
            record["completion"] = text
        terms = {name: float(term[n]) for name, term in values.items()}
        records.append(record | {"reward": terms.pop("value"), "terms": terms})
    return records
