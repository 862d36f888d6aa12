"""Scores explanations that are given as text: by the RLT reward, whole and token by token."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlt_jax.data import examples, rows, templates, tokenizer
from rlt_jax.data.examples import Example, Renderer
from rlt_jax.errors import UserError
from rlt_jax.inference import log_probs
from rlt_jax.models.transformer import Transformer
from rlt_jax.ranges import Checked, Temperature
from rlt_jax.records import Problem, Trace
from rlt_jax.report.statistics import SOLUTION_LOG_PROBS
from rlt_jax.rl import rlt_reward
from rlt_jax.rl.rlt_reward import OVER_VOCABULARY, EnsembleConfig, RLTRewardConfig
from rlt_jax.training import checkpoint, sharding
from rlt_jax.types import Array, Batch, Reward

Models = Sequence[checkpoint.LoadedModel]  # the teacher, then the students
Means = list[dict[str, float | None]]  # of each completion, by `SOLUTION_LOG_PROBS`
Masked = tuple[Array, Array]  # values, and whether they count
BUCKETS = [2**n for n in range(7, 18)]
TOKENS_PER_MICRO_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class ScoringConfig(Checked):
    """How explanations that are given as text are scored.

    Attributes:
      rlt_reward: weights of the reward; the published ones by default.
      ensemble: how the rewards of several students become one.
      teacher_temperature: divides the teacher's logits.
      assume_closed: completions without a closing tag are not penalised.
      per_token: also return tokens and per-token arrays, of the first student.
    """

    rlt_reward: RLTRewardConfig = dataclasses.field(default_factory=RLTRewardConfig)
    ensemble: EnsembleConfig = dataclasses.field(default_factory=EnsembleConfig)
    teacher_temperature: Temperature = 0.7
    assume_closed: bool = False
    per_token: bool = False


class TextCompletion(NamedTuple):
    """A teacher's completion that is given as text.

    Attributes:
      text: the completion, after the explanation's opening tag.
      trace: the problem with the explanation.
      closed: whether it counts as closed.
    """

    text: str
    trace: Trace
    closed: bool


def text_completion(
    template: templates.Template, problem: Problem, text: str, assume_closed: bool
) -> TextCompletion:
    """Parses a teacher's completion of a problem."""
    body, closed = template.parse_completion(text)
    return TextCompletion(text, Trace(problem, body), closed or assume_closed)


def make_renderers(models: Models, template: templates.Template) -> list[Renderer]:
    """A renderer for the teacher, then one for every student."""
    teacher, *students = [model.tokenizer for model in models]
    of_students = examples.student_renderers(students, template)
    return [Renderer(teacher, template, "teacher"), *of_students]


def make_sequences(
    models: Models, renderers: Sequence[Renderer], given: Sequence[TextCompletion]
) -> list[list[Example]]:
    """Sequences of completions for each model, the teacher's first.

    Students with the same renderer share one list.

    Raises:
      UserError: a sequence is longer than the context of its model.
    """
    traces, texts = [one.trace for one in given], [one.text for one in given]
    problems = [trace.problem for trace in traces]
    made = {r: examples.student_examples(r, traces) for r in set(renderers[1:])}
    made[renderers[0]] = examples.text_examples(renderers[0], problems, texts)
    for renderer, (model, _, _) in zip(renderers, models, strict=True):
        limit = min(BUCKETS[-1], model.config.max_length)
        for one, trace in zip(made[renderer], traces, strict=True):
            if len(one.tokens) > limit:
                raise UserError(
                    f"the {renderer.role} sequence of the question "
                    f"{trace.problem.question[:60]!r} has {len(one.tokens)} tokens, the "
                    f"context of the {renderer.role} is {limit} (max_length in its config)."
                )
    return [made[renderer] for renderer in renderers]


def make_scorer(
    models: Models, renderers: Sequence[Renderer], scoring: ScoringConfig, mesh: Mesh
) -> Callable[..., list[dict[str, Any]]]:
    """A function from completions to their scores; see `rlt_jax.score_explanations`.

    It compiles once for each bucket of sequence lengths and of rows, and number of
    completions. Besides the completions it takes the weight of the explanation KL,
    `per_token`, and a number of completions to compile for, where there may be fewer.

    Args:
      models: the teacher, then the students.
      renderers: of the models, from `make_renderers`.
      scoring: settings.
      mesh: where everything runs.
    """
    reward, transformers = scoring.rlt_reward, [model.model for model in models]
    check_tokenizers(reward, *[model.tokenizer for model in models])
    args = scoring.teacher_temperature, reward, mesh
    programs = compile_log_probs(transformers[0], transformers[1:], *args)
    compute = jit_rlt_reward(reward, scoring.ensemble, len(models) - 1, mesh)
    values_of_tokens = _replicated(functools.partial(_values_of_tokens, reward), mesh)
    teacher, *students = [model.params for model in models]

    def score(
        given: Sequence[TextCompletion],
        kl_coef: float | None = None,
        per_token: bool = False,
        count: int | None = None,
    ) -> list[dict[str, Any]]:
        policy, *of_students = make_sequences(models, renderers, given)
        closed = np.array([one.closed for one in given])
        shape = row_shape([policy, *of_students], sharding.num_groups(mesh))
        packed = rows.pack_examples(shape, policy, of_students, closed, count)
        batch = sharding.put_rows(packed, mesh)
        batch = log_probs.fill(programs, batch, teacher, students)
        coef = reward.explanation_kl_coef if kl_coef is None else kl_coef
        rewards = jax.device_get(compute(batch, jnp.float32(coef)))
        rewards = {name: x[: len(given)] for name, x in rewards.items()}
        check_finite(rewards, [one.trace.problem.question for one in given])
        values = jax.device_get(values_of_tokens(batch)) if per_token else {}
        segments = packed.students[0].explanation.segment
        records = []
        for n, (one, example) in enumerate(zip(given, of_students[0], strict=True)):
            terms = {name: float(x[n]) for name, x in rewards.items()}
            record = {"reward": terms.pop("value"), "terms": terms}
            record["student_tokens"] = len(example.tokens)
            if per_token:
                _, mask = values["explanation_kl_tokens"]
                record |= _texts_of_tokens(example, one.trace, segments[n], mask[n])
            record |= {name: x[n][m[n]].tolist() for name, (x, m) in values.items()}
            records.append(record)
        return records

    return score


def compile_log_probs(
    policy: Transformer,
    students: Sequence[Transformer],
    temperature: float,
    reward: RLTRewardConfig,
    mesh: Mesh,
) -> log_probs.LogProbPrograms:
    """The programs of the policy at a temperature, and of the reward's students."""
    return log_probs.compile_programs(
        (policy, temperature or 1.0),  # log-probs of greedy decoding are those at 1
        [(student, reward.student_temperature) for student in students],
        mesh,
        reward.kl_top_k if reward.kl_estimator == "top_k" else None,
        reward.kl_estimator in OVER_VOCABULARY and reward.kl_teacher_term,
    )


def jit_rlt_reward(
    reward: RLTRewardConfig, ensemble: EnsembleConfig, num_students: int, mesh: Mesh
) -> Callable[[Batch, Array], Reward]:
    """Compiles (batch with log-probs, KL weight) -> reward on a mesh.

    Raises:
      UserError: the ensemble has weights for another number of students.
    """
    ensemble.check(num_students)
    program = functools.partial(rlt_reward.ensemble_reward, reward, ensemble)
    return _replicated(program, mesh)


def check_finite(reward: Reward, questions: Sequence[str]) -> None:
    """Raises UserError for a NaN or infinity among the rewards.

    The message names the first such completion and the quantity.
    """
    for name, values in reward.items():
        if (bad := ~np.isfinite(values)).any():
            n = int(bad.argmax())
            raise UserError(
                f"completion {n} (question {questions[n][:80]!r}): {name} is not finite; "
                "the weights or the dtype of a model are at fault."
            )


def check_tokenizers(reward: RLTRewardConfig, *tokenizers: tokenizer.Tokenizer) -> None:
    """Raises UserError for a KL over the vocabulary of models with other tokenizers."""
    if reward.kl_estimator not in OVER_VOCABULARY or not reward.kl_teacher_term:
        return
    teacher, *students = tokenizers
    for student in students:
        if student.pieces != teacher.pieces:
            raise UserError(
                f"rlt_reward.kl_estimator={reward.kl_estimator!r} compares whole "
                f"vocabularies, but {teacher.path} and {student.path} differ. Use k1."
            )


def row_shape(sequences: Sequence[Sequence[Example]], groups: int) -> rows.RowShape:
    """A shape from few: the bucket of the longest sequence, and the rows that are needed.

    Args:
      sequences: of every model.
      groups: the rows of a micro-batch are a multiple of it.
    """
    lengths = [[len(one.tokens) for one in some] for some in sequences]
    longest = max(map(max, lengths))
    T = next(bucket for bucket in BUCKETS if bucket >= longest)
    most = max(1, TOKENS_PER_MICRO_BATCH // (T * groups))
    needed = max(row for some in lengths for row, _ in rows.first_fit(some, T)) + 1
    size = 1 << (-(-needed // groups) - 1).bit_length()
    return rows.RowShape(min(size, most) * groups, T)


def make_solution_scorer(
    loaded: checkpoint.LoadedModel, renderer: Renderer, count: int, mesh: Mesh
) -> Callable[[Sequence[Problem], Sequence[str]], Means]:
    """A function from problems and a student's completions to log-probs of the solutions.

    They are those of the problem's own solution, after the thought in the completion and
    after none: means over the solution's tokens, in nats, at temperature 1; None where no
    token is wholly inside the solution. A thought with which the sequence is longer than
    the model's context counts as empty.

    Args:
      loaded: the student.
      renderer: of its sequences.
      count: the most completions that it is given.
      mesh: where everything runs.
    """
    limit = min(BUCKETS[-1], loaded.model.config.max_length)
    model = loaded.model, 1.0
    programs = log_probs.compile_programs(model, [model], mesh)
    of_solutions = _replicated(rlt_reward.solution_log_probs, mesh)

    def means(traces: Sequence[Trace]) -> list[float | None]:
        made, _ = rows.fitting_examples(renderer, traces, limit)
        shape = row_shape([made], sharding.num_groups(mesh))
        closed = np.ones(len(made), bool)
        packed = rows.pack_examples(shape, made, [made], closed, count)
        (student,) = sharding.put_rows(packed, mesh).students
        found = programs.students[0](loaded.params, student)
        values, mask = jax.device_get(of_solutions(student._replace(log_probs=found)))
        pairs = zip(values[: len(made)], mask[: len(made)], strict=True)
        return [float(x[m].mean()) if m.any() else None for x, m in pairs]

    def score(problems: Sequence[Problem], completions: Sequence[str]) -> Means:
        texts = [renderer.opened + text for text in completions]
        thoughts = map(renderer.template.own_thought, texts)
        after = means([Trace(*pair) for pair in zip(problems, thoughts, strict=True)])
        alone = [Trace(problem, "") for problem in dict.fromkeys(problems)]
        without = dict(zip(dict.fromkeys(problems), means(alone), strict=True))
        pairs = zip(after, map(without.get, problems), strict=True)
        return [dict(zip(SOLUTION_LOG_PROBS, pair, strict=True)) for pair in pairs]

    return score


def _replicated(program: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The program, compiled; its results are on every device."""
    return sharding.jit(program, mesh, out_shardings=sharding.replicated(mesh))


def _values_of_tokens(config: RLTRewardConfig, batch: Batch) -> dict[str, Masked]:
    """Values [E, S] of the first student's tokens and segments, with their masks."""
    student = batch.students[0]
    in_teacher, in_student, segments = rlt_reward.explanation_log_probs(batch, student)
    divergence, _ = rlt_reward.explanation_divergence(config, batch, student)
    return {
        "student_log_probs_explanation": (in_student, segments),
        "teacher_log_probs_explanation": (in_teacher, segments),
        "explanation_kl_tokens": (divergence, segments),
        "student_log_probs_solution": rlt_reward.solution_log_probs(student),
    }


def _texts_of_tokens(
    example: Example, trace: Trace, segments: np.ndarray, mask: np.ndarray
) -> dict[str, list[str]]:
    """Texts of a completion, one a segment of the mask or a token of the solution."""
    offsets = example.explanation.offsets
    pieces = [offsets[segments[: len(offsets)] == i] for i in np.flatnonzero(mask)]
    told = [trace.explanation[x[:, 0].min() : x[:, 1].max()] for x in pieces]
    solution = [trace.problem.solution[a:b] for a, b in example.solution.offsets]
    return {"explanation_tokens": told, "solution_tokens": solution}
