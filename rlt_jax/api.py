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
written = rlt_jax.generate(model, params, prompts, {"max_new_tokens": 8}, seed=0)
tokenizer.decode(written[0].tokens)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlt_jax.data import examples, scoring
from rlt_jax.data.stop_texts import stop_finder
from rlt_jax.data.templates import Problem, Template, Trace, load_template
from rlt_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import Engine, EngineConfig, make_engine
from rlt_jax.inference.layout import check_memory
from rlt_jax.inference.log_probs import token_log_probs
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.scheduler import Request
from rlt_jax.inference.stored import roll_out
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl import scorer
from rlt_jax.rl.rlt_reward import RLTRewardConfig
from rlt_jax.rl.scorer import Scored, StudentsConfig
from rlt_jax.settings import build
from rlt_jax.training import checkpoint, sharding
from rlt_jax.types import Completion, Params, ScoringBatch, TokenSpans

__all__ = [
    "generate",
    "load_model",
    "load_tokenizer",
    "score_explanations",
    "token_log_probs",
]

Role = tuple[Transformer, Params, Tokenizer]
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
    stop_ids: Sequence[int] = (),
    engine: EngineConfig | None = None,
) -> list[Completion]:
    """Completes prompts; equal ones share their part of the cache.

    A second call with the same settings and prompts of about the same lengths compiles
    nothing.

    Args:
      model: from `load_model`.
      params: likewise.
      prompts: token ids of each, at least one.
      sampling: a `SamplingConfig`, or a mapping of its fields, in which `max_new_tokens`
        may be a list, one number a prompt.
      seed: prompt n draws by the seed and n, whatever else is asked for.
      tokenizer: its stop tokens end a completion, and texts of `sampling.stop` need it.
      stop_ids: other tokens that end a completion.
      engine: sizes of the engine; by default a slot a prompt, up to 32.

    Returns:
      For each prompt `tokens` and `log_probs` [T], stop token included, and `finished`,
      False where it was cut off at `max_new_tokens`.

    Raises:
      UserError: a prompt is empty, too long for the model, or a setting is wrong.
    """
    if not prompts:
        return []
    longest: Any = None
    if isinstance(sampling, Mapping):
        longest = sampling["max_new_tokens"]
        if not isinstance(longest, int):
            sampling = {**sampling, "max_new_tokens": max(longest)}
        sampling = build(SamplingConfig, sampling, "sampling")
    limits = np.broadcast_to(longest or sampling.max_new_tokens, len(prompts))
    requests = [
        Request(np.asarray(prompt, np.int32), n, int(limit))
        for n, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    if sampling.stop and tokenizer is None:
        raise UserError("sampling.stop: texts need a tokenizer.")
    devices = jax.device_count()
    slots = -(-min(len(prompts), 32) // devices) * devices
    engine = engine or EngineConfig(slots=slots)
    rows = [len(request.prompt) + request.longest for request in requests]
    pages = 1 << (-(-max(rows) // engine.page_size) - 1).bit_length()
    row = min(pages * engine.page_size, model.config.max_length)
    stops = (*stop_ids, *(tokenizer.stop_ids if tokenizer else ()))
    limits = dataclasses.replace(sampling, max_new_tokens=1)  # one program for any
    made = _cached_engine(model, limits, stops, engine, max(row, max(rows)), tokenizer)
    return roll_out(made, params, requests, jax.random.key(seed))


@functools.lru_cache(maxsize=8)
def _cached_engine(
    model: Transformer,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    config: EngineConfig,
    longest_row: int,
    tokenizer: Tokenizer | None,
) -> Engine:
    find_stop = stop_finder(tokenizer, sampling.stop) if tokenizer else None
    mesh = sharding.make_mesh(sharding.MeshConfig())
    made = make_engine(model, sampling, stop_ids, config, mesh, longest_row, find_stop)
    check_memory(model, made.layout, mesh)
    return made


def score_explanations(
    problems: Sequence[Problem | Mapping[str, str]],
    completions: Sequence[Sequence[str]],
    teacher: Role,
    students: Sequence[Role],
    template: str | Template = "rlt",
    reward: RLTRewardConfig | None = None,
    combine: StudentsConfig | None = None,
    teacher_temperature: float = 0.7,
    assume_closed: bool = False,
    per_token: bool = False,
) -> list[list[dict[str, Any]]]:
    """The RLT reward of explanations given as text.

    Args:
      problems: question and solution of each.
      completions: for each problem, what teachers wrote after the explanation's opening
        tag, with or without its closing tag.
      teacher: model, parameters and tokenizer.
      students: likewise, one or more.
      template: name or path of a template, or one.
      reward: weights; the published ones by default.
      combine: how several students become one reward.
      teacher_temperature: divides the teacher's logits.
      assume_closed: completions without a closing tag are not penalised.
      per_token: also return tokens and per-token arrays, of the first student.

    Returns:
      For each problem, for each completion: `reward`, `terms` and, if asked, the arrays.

    Raises:
      UserError: a row is longer than the models allow, or a number is not finite.
    """
    if not isinstance(template, Template):
        template = load_template(template)
    traces, sizes = [], []
    for problem, texts in zip(problems, completions, strict=True):
        if not isinstance(problem, Problem):
            problem = Problem(problem["question"], problem["solution"])
        traces += [written(template, problem, text, assume_closed) for text in texts]
        sizes.append(len(texts))
    score = make_scorer(
        teacher,
        students,
        template,
        reward or RLTRewardConfig(),
        combine or StudentsConfig(),
        teacher_temperature,
        sharding.make_mesh(sharding.MeshConfig()),
    )
    flat = score(traces, per_token=per_token) if traces else []
    ends = np.cumsum(sizes)
    return [flat[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def written(
    template: Template, problem: Problem, completion: str, assume_closed: bool
) -> scoring.WrittenTrace:
    """The trace that a completion's text makes of a problem."""
    body, closed = template.explanation_of(completion)
    return scoring.WrittenTrace(
        completion, Trace(problem, body), closed or assume_closed
    )


def make_scorer(
    teacher: Role,
    students: Sequence[Role],
    template: Template,
    reward: RLTRewardConfig,
    combine: StudentsConfig,
    teacher_temperature: float,
    mesh: Mesh,
) -> Callable[..., list[dict[str, Any]]]:
    """A function from written traces to their scores; see `score_explanations`.

    It compiles once for each bucket of row lengths and number of traces. Besides the
    traces it takes the weight of the explanation KL and `per_token`.
    """
    scored = jit_score(
        reward,
        combine,
        teacher[0],
        [student[0] for student in students],
        teacher_temperature,
        mesh,
        per_token=True,
    )
    groups = sharding.num_groups(mesh)
    params = tuple(student[1] for student in students)

    def score(
        traces: Sequence[scoring.WrittenTrace],
        kl_coef: float | None = None,
        per_token: bool = False,
    ) -> list[dict[str, Any]]:
        tokenizers = [s[2] for s in students]
        batches, rows = _batches(teacher[2], tokenizers, template, traces, groups)
        batches = sharding.put_rows(batches, mesh)
        coef = reward.explanation_kl_coef if kl_coef is None else kl_coef
        result = scored(teacher[1], params, batches, jnp.float32(coef))
        # These stay on the devices of their rows, which may be another host's.
        result = jax.device_get(result._replace(teacher_log_probs=None))
        check_finite(result, [trace.trace.problem.question for trace in traces])
        spans = batches[0].student_explanation
        return [
            {
                "reward": float(result.reward.value[n]),
                "terms": {k: float(v[n]) for k, v in result.reward.terms.items()},
            }
            | (_arrays(result, spans, rows[n], traces[n], n) if per_token else {})
            for n in range(len(traces))
        ]

    return score


def jit_score(
    config: RLTRewardConfig,
    students: StudentsConfig,
    teacher_model: Transformer,
    student_models: Sequence[Transformer],
    teacher_temperature: float,
    mesh: Mesh,
    per_token: bool = False,
) -> Callable[..., Scored]:
    """Compiles `score` on a mesh; per-token values are large, () unless asked for."""
    if students.combine == "weights" and len(students.weights) != len(student_models):
        raise UserError(
            f"students.weights has {len(students.weights)} numbers for "
            f"{len(student_models)} students."
        )
    whole = sharding.replicated(mesh)
    models = teacher_model, tuple(student_models)

    def program(*args: Any) -> Scored:
        scored = scorer.score(config, students, *models, teacher_temperature, *args)
        return scored if per_token else scored._replace(tokens=())

    return sharding.jit(
        program,
        mesh,
        out_shardings=Scored(whole, sharding.batch_sharding(mesh, 1), whole),
    )


def check_finite(result: Scored, questions: Sequence[str]) -> None:
    """Refuses a NaN or infinity anywhere in the scores.

    Raises:
      UserError: names the first such completion and the quantity.
    """
    values = {"reward": result.reward.value, **result.reward.terms}
    for i, tokens in enumerate(result.tokens):
        values |= {f"{k} of student {i}": v for k, v in tokens._asdict().items()}
    for name, value in values.items():
        bad = ~np.isfinite(value.reshape(len(questions), -1)).all(axis=1)
        if bad.any():
            n = int(bad.argmax())
            raise UserError(
                f"completion {n} (question {questions[n][:80]!r}): {name} is not finite; "
                "the weights or the dtype of a model are at fault."
            )


def _batches(
    teacher: Tokenizer,
    students: Sequence[Tokenizer],
    template: Template,
    traces: Sequence[scoring.WrittenTrace],
    groups: int,
) -> tuple[tuple[ScoringBatch, ...], list[examples.Row]]:
    """A batch for each student in the bucket of the longest row; the first's rows.

    The lines of a micro-batch are a multiple of `groups`.
    """
    in_teacher = [
        examples.written_teacher_row(teacher, template, t.trace.problem, t.completion)
        for t in traces
    ]
    in_students = [
        [examples.student_row(student, template, t.trace) for t in traces]
        for student in students
    ]
    lengths = [len(row.tokens) for rows in (in_teacher, *in_students) for row in rows]
    longest = max(lengths)
    if longest > BUCKETS[-1]:
        raise UserError(f"a row has {longest} tokens, the limit is {BUCKETS[-1]}.")
    length = next(bucket for bucket in BUCKETS if bucket >= longest)
    lines = max(1, TOKENS_PER_MICRO_BATCH // (length * groups)) * groups
    shape = scoring.RowShape(lines, length)
    closed = np.array([trace.closed for trace in traces])
    batches = [
        scoring.batch_of_rows(shape, rows, in_teacher, closed) for rows in in_students
    ]
    return tuple(batches), in_students[0]


def _arrays(
    result: Scored,
    spans: TokenSpans,
    row: examples.Row,
    trace: scoring.WrittenTrace,
    n: int,
) -> dict[str, Any]:
    """Texts and per-token values of the first student, one entry a segment or token."""
    tokens = result.tokens[0]
    explained, solved = tokens.explanation_mask[n], tokens.solution_mask[n]
    segment = spans.segment[n][spans.mask[n]]
    offsets = row.explanation.offsets[spans.mask[n][: len(row.explanation.offsets)]]
    pieces = [
        trace.trace.explanation[part[:, 0].min() : part[:, 1].max()]
        for part in (offsets[segment == i] for i in np.flatnonzero(explained))
    ]
    solution = trace.trace.problem.solution

    def listed(values: np.ndarray, mask: np.ndarray) -> list[float]:
        return values[n][mask].tolist()

    return {
        "explanation_tokens": pieces,
        "student_log_probs_explanation": listed(tokens.student_explanation, explained),
        "teacher_log_probs_explanation": listed(tokens.teacher_explanation, explained),
        "explanation_kl_tokens": listed(tokens.divergence, explained),
        "solution_tokens": [solution[a:b] for a, b in row.solution.offsets],
        "student_log_probs_solution": listed(tokens.solution, solved),
    }
