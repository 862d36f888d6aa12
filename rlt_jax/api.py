"""The Python interface for notebooks and programs, exported by `rlt_jax`.

import rlt_jax

model, params = rlt_jax.load_model("embedded")
tokenizer = rlt_jax.load_tokenizer("embedded")
scored = rlt_jax.score_explanations(
    problems=[{"question": "Start at 4: +3 *7. Last digit?", "solution": "9"}],
    completions=[["4+3=7 7*7=9<|end_of_explanation|>", "it is 9"]],
    teacher=(model, params, tokenizer),
    students=[(model, params, tokenizer)],
    template="tiny",
)
scored[0][0]["reward"], scored[0][1]["terms"]["explanation_kl"]

prompts = [tokenizer.encode("1+1").ids]
rollout = rlt_jax.generate(
    model, params, prompts, {"max_new_tokens": 8}, tokenizer=tokenizer
)
rollout.texts[0], rollout.tokens[0], rollout.log_probs[0], rollout.finished[0]
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlt_jax.data import examples, rows
from rlt_jax.data.examples import Example, Renderer
from rlt_jax.data.rows import RowShape
from rlt_jax.data.templates import Template, load_template
from rlt_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlt_jax.errors import UserError
from rlt_jax.inference import log_probs
from rlt_jax.inference.engine import Engine, EngineConfig, make_engine
from rlt_jax.inference.head import token_log_probs
from rlt_jax.inference.layout import check_memory
from rlt_jax.inference.log_probs import LogProbPrograms
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.transformer import Transformer
from rlt_jax.records import Problem, Trace
from rlt_jax.rl import rlt_reward
from rlt_jax.rl.rlt_reward import OVER_VOCABULARY, EnsembleConfig, RLTRewardConfig
from rlt_jax.settings import build
from rlt_jax.training import checkpoint, sharding
from rlt_jax.types import Array, Batch, Params, Request, Reward, Rollout

__all__ = [
    "ScoringConfig",
    "generate",
    "load_model",
    "load_tokenizer",
    "score_explanations",
    "token_log_probs",
]

Model = tuple[Transformer, Params, Tokenizer]
BUCKETS = [2**n for n in range(7, 18)]
TOKENS_PER_MICRO_BATCH = 4096


def load_model(path: str, dtype: Any = jnp.float32) -> tuple[Transformer, Params]:
    """Loads a model over all devices.

    Args:
      path: "embedded", a folder in Hugging Face layout, a stage's folder or a Hub id.
      dtype: of parameters and activations, float32 or bfloat16.

    Returns:
      The transformer, a stateless Linen module, and its parameters.

    Raises:
      UserError: there is no such model, or not one we support.
    """
    name = jnp.dtype(dtype).name
    mesh = sharding.make_mesh(sharding.MeshConfig())
    source = checkpoint.ModelSource(str(path), dtype=name, param_dtype=name)
    loaded = checkpoint.load(source, mesh, jax.random.key(0))
    return loaded.model, loaded.params


def generate(
    model: Transformer,
    params: Params,
    prompts: Sequence[Sequence[int] | np.ndarray],
    sampling: SamplingConfig | Mapping[str, Any],
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    engine: EngineConfig | None = None,
) -> Rollout:
    """Completes prompts; equal ones share their part of the cache.

    A second call with the same settings and prompts of about the same lengths compiles
    nothing.

    Args:
      model: from `load_model`.
      params: likewise.
      prompts: token ids of each prompt, at least one.
      sampling: a `SamplingConfig`, or a mapping of its fields, in which `max_new_tokens`
        may be a list, one number a prompt.
      seed: what is sampled for prompt n depends on the seed and n alone.
      tokenizer: its stop tokens end a completion, texts are decoded with it, and
        `sampling.stop` needs it.
      engine: sizes of the engine; by default a slot a prompt, up to 32.

    Returns:
      For each prompt `tokens` and `log_probs` [T], stop token included, and `finished`,
      False where it was cut off at `max_new_tokens`; `texts` with a tokenizer.

    Raises:
      UserError: a prompt is empty, too long for the model, or a setting is wrong.
    """
    if not prompts:
        return Rollout([], [], [], np.zeros(0, bool))
    if isinstance(sampling, Mapping):
        limits = sampling.get("max_new_tokens", 0)
        longest = {"max_new_tokens": int(np.max(limits))}
        sampling = build(SamplingConfig, {**sampling, **longest}, "sampling")
    else:
        limits = sampling.max_new_tokens
    limits = np.broadcast_to(limits, len(prompts)).tolist()
    requests = [
        Request(np.asarray(prompt, np.int32), n, limits[n])
        for n, prompt in enumerate(prompts)
    ]
    if sampling.stop and tokenizer is None:
        raise UserError("sampling.stop: texts need a tokenizer.")
    devices = jax.device_count()
    slots = -(-min(len(prompts), 32) // devices) * devices
    engine = engine or EngineConfig(slots=slots)
    lengths = [len(request.prompt) + request.max_new_tokens for request in requests]
    pages = 1 << (-(-max(lengths) // engine.page_size) - 1).bit_length()
    bucket = min(pages * engine.page_size, model.config.max_length)
    sampling = dataclasses.replace(sampling, max_new_tokens=1)  # one program for any
    args = model, tokenizer, sampling, engine, max(bucket, *lengths)
    return _cached_engine(*args).generate(params, requests, jax.random.key(seed))


@functools.lru_cache(maxsize=8)
def _cached_engine(
    model: Transformer,
    tokenizer: Tokenizer | None,
    sampling: SamplingConfig,
    config: EngineConfig,
    max_length: int,
) -> Engine:
    mesh = sharding.make_mesh(sharding.MeshConfig())
    made = make_engine(model, tokenizer, sampling, config, mesh, max_length)
    check_memory(model, made.layout, mesh)
    return made


@dataclasses.dataclass(frozen=True)
class ScoringConfig:
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
    teacher_temperature: float = 0.7
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


def score_explanations(
    problems: Sequence[Problem | Mapping[str, str]],
    completions: Sequence[Sequence[str]],
    teacher: Model,
    students: Sequence[Model],
    template: str | Template = "rlt",
    scoring: ScoringConfig | None = None,
) -> list[list[dict[str, Any]]]:
    """The RLT reward of explanations given as text.

    Args:
      problems: question and solution of each problem.
      completions: for each problem, teachers' completions after the explanation's opening
        tag, with or without its closing tag.
      teacher: model, parameters and tokenizer.
      students: likewise, one or more.
      template: name or path of a template, or one.
      scoring: settings.

    Returns:
      For each problem, for each completion: `reward`, `terms` and, if asked, the arrays.

    Raises:
      UserError: a sequence is longer than the models allow, or a number is not finite.
    """
    scoring = scoring or ScoringConfig()
    if not isinstance(template, Template):
        template = load_template(template)
    given = []
    for problem, texts in zip(problems, completions, strict=True):
        if not isinstance(problem, Problem):
            problem = Problem(problem["question"], problem["solution"])
        for text in texts:
            args = template, problem, text, scoring.assume_closed
            given.append(text_completion(*args))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    score = make_scorer(teacher, students, template, scoring, mesh)
    scores = iter(score(given, per_token=scoring.per_token) if given else ())
    return [list(itertools.islice(scores, len(texts))) for texts in completions]


def text_completion(
    template: Template, problem: Problem, text: str, assume_closed: bool
) -> TextCompletion:
    """Parses a teacher's completion of a problem."""
    body, closed = template.parse_completion(text)
    return TextCompletion(text, Trace(problem, body), closed or assume_closed)


def make_scorer(
    teacher: Model,
    students: Sequence[Model],
    template: Template,
    scoring: ScoringConfig,
    mesh: Mesh,
) -> Callable[..., list[dict[str, Any]]]:
    """A function from completions to their scores; see `score_explanations`.

    It compiles once for each bucket of sequence lengths and number of completions. Besides
    the completions it takes the weight of the explanation KL and `per_token`.
    """
    reward = scoring.rlt_reward
    models = [student[0] for student in students]
    programs = compile_log_probs(
        teacher[0], models, scoring.teacher_temperature, reward, mesh
    )
    compute = jit_rlt_reward(reward, scoring.ensemble, len(students), mesh)
    of_tokens = functools.partial(_values_of_tokens, reward)
    replicated = sharding.replicated(mesh)
    values_of_tokens = sharding.jit(of_tokens, mesh, out_shardings=replicated)
    params = [student[1] for student in students]
    tokenizers = [student[2] for student in students]
    of_students = examples.student_renderers(tokenizers, template)
    renderers = [Renderer(teacher[2], template, "teacher"), *of_students]
    groups = sharding.num_groups(mesh)
    limit = min(BUCKETS[-1], *(m.config.max_length for m in (teacher[0], *models)))

    def score(
        given: Sequence[TextCompletion],
        kl_coef: float | None = None,
        per_token: bool = False,
    ) -> list[dict[str, Any]]:
        packed, first_student = _pack(renderers, given, groups, limit)
        batch = sharding.put_rows(packed, mesh)
        batch = log_probs.fill(programs, batch, teacher[1], params)
        coef = reward.explanation_kl_coef if kl_coef is None else kl_coef
        rewards = jax.device_get(compute(batch, jnp.float32(coef)))
        check_finite(rewards, [one.trace.problem.question for one in given])
        records = []
        for n in range(len(given)):
            terms = {name: float(values[n]) for name, values in rewards.items()}
            records.append({"reward": terms.pop("value"), "terms": terms})
        if per_token:
            tokens = jax.device_get(values_of_tokens(batch))
            segments = packed.students[0].explanation.segment
            for n, record in enumerate(records):
                arrays = {name: (x[n], mask[n]) for name, (x, mask) in tokens.items()}
                parts = first_student[n], given[n].trace, segments[n]
                record |= _arrays(*parts, arrays)
        return records

    return score


def compile_log_probs(
    policy: Transformer,
    students: Sequence[Transformer],
    temperature: float,
    reward: RLTRewardConfig,
    mesh: Mesh,
) -> LogProbPrograms:
    """The programs of the policy at a temperature, and of the reward's students."""
    return log_probs.compile_programs(
        (policy, temperature),
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
    return sharding.jit(program, mesh, out_shardings=sharding.replicated(mesh))


def check_finite(reward: Reward, questions: Sequence[str]) -> None:
    """Raises UserError for a NaN or infinity among the rewards.

    The message names the first such completion and the quantity.
    """
    for name, values in reward.items():
        bad = ~np.isfinite(values)
        if bad.any():
            n = int(bad.argmax())
            raise UserError(
                f"completion {n} (question {questions[n][:80]!r}): {name} is not finite; "
                "the weights or the dtype of a model are at fault."
            )


def _pack(
    renderers: Sequence[Renderer],
    given: Sequence[TextCompletion],
    groups: int,
    limit: int,
) -> tuple[Batch, list[Example]]:
    """A batch in the bucket of the longest sequence; the first student's examples.

    The rows of a micro-batch are a multiple of `groups`; `limit` is in tokens.
    """
    problems = [one.trace.problem for one in given]
    policy = examples.text_examples(renderers[0], problems, [one.text for one in given])
    traces = [one.trace for one in given]
    made = {r: examples.student_examples(r, traces) for r in set(renderers[1:])}
    students = [made[renderer] for renderer in renderers[1:]]
    longest = max(len(one.tokens) for some in (policy, *students) for one in some)
    if longest > limit:
        raise UserError(f"a sequence has {longest} tokens, the limit is {limit}.")
    length = next(bucket for bucket in BUCKETS if bucket >= longest)
    size = max(1, TOKENS_PER_MICRO_BATCH // (length * groups)) * groups
    closed = np.array([one.closed for one in given])
    batch = rows.pack_examples(RowShape(size, length), policy, students, closed)
    return batch, students[0]


def _values_of_tokens(
    config: RLTRewardConfig, batch: Batch
) -> dict[str, tuple[Array, Array]]:
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


def _arrays(
    example: Example,
    trace: Trace,
    segments: np.ndarray,
    values: dict[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    """Texts and values of a completion, one entry a segment or a solution token."""
    offsets = example.explanation.offsets
    _, mask = values["explanation_kl_tokens"]
    pieces = [offsets[segments[: len(offsets)] == i] for i in np.flatnonzero(mask)]
    return {
        "explanation_tokens": [
            trace.explanation[part[:, 0].min() : part[:, 1].max()] for part in pieces
        ],
        "solution_tokens": [
            trace.problem.solution[start:end] for start, end in example.solution.offsets
        ],
        **{name: x[mask].tolist() for name, (x, mask) in values.items()},
    }
