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

import functools
import itertools
from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlt_jax.data.templates import Template, load_template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError, as_user_error
from rlt_jax.inference.engine import Engine, EngineConfig, make_engine
from rlt_jax.inference.layout import check_memory
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.transformer import Transformer
from rlt_jax.ranges import NonNegativeInt, Size, check_value
from rlt_jax.records import Problem
from rlt_jax.scoring import ScoringConfig, make_renderers, make_scorer, text_completion
from rlt_jax.settings import Section, build
from rlt_jax.training import checkpoint, sharding
from rlt_jax.types import Params, Request, Rollout

Model = tuple[Transformer, Params, Tokenizer]


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
    name, mesh = jnp.dtype(dtype).name, sharding.make_mesh(sharding.MeshConfig())
    source = checkpoint.ModelSource(str(path), dtype=name, param_dtype=name)
    model = Transformer(checkpoint.shape_of(source))
    return model, checkpoint.load_params(source, model, mesh, jax.random.key(0))


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
    check_value("seed", NonNegativeInt, seed)
    check_value("sampling", SamplingConfig | Section, sampling)
    given = vars(sampling) if isinstance(sampling, SamplingConfig) else sampling
    with as_user_error("sampling.max_new_tokens", TypeError, ValueError):
        limits = np.broadcast_to(given.get("max_new_tokens"), len(prompts)).tolist()
    check_value("sampling.max_new_tokens", Sequence[Size], limits)
    # One program for any length: each request has its own limit.
    sampling = build(SamplingConfig, {**given, "max_new_tokens": 1}, "sampling")
    V = model.config.vocab_size
    with as_user_error("prompts: give the token ids of each", TypeError, ValueError):
        ids = [np.asarray(prompt) for prompt in prompts]
    for n, prompt in enumerate(ids):
        if prompt.ndim != 1 or (len(prompt) and prompt.dtype.kind not in "iu"):
            raise UserError(f"prompt {n} is {short(prompts[n])}; give its token ids.")
        if len(prompt) and not 0 <= prompt.min() <= prompt.max() < V:
            raise UserError(
                f"prompt {n} has the ids {prompt.min()} to {prompt.max()}, the model those "
                f"from 0 to {V - 1}. Use the tokenizer of the model."
            )
    ids = [prompt.astype(np.int32) for prompt in ids]
    requests = list(map(Request, ids, range(len(ids)), limits))
    if sampling.stop and tokenizer is None:
        raise UserError("sampling.stop: texts need a tokenizer.")
    devices = jax.device_count()
    slots = -(-min(len(prompts), 32) // devices) * devices
    engine = engine or EngineConfig(slots=slots)
    lengths = [len(request.prompt) + request.max_new_tokens for request in requests]
    pages = 1 << (-(-max(lengths) // engine.page_size) - 1).bit_length()
    bucket = min(pages * engine.page_size, model.config.max_length)
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
      problems: question and solution of each problem, and other fields of `Problem`.
      completions: for each problem, teachers' completions after the explanation's opening
        tag, with or without its closing tag.
      teacher: model, parameters and tokenizer.
      students: likewise, one or more.
      template: name or path of a template, or one.
      scoring: settings.

    Returns:
      For each problem, for each completion: `reward`, `terms`, `student_tokens` (of the
      first student's sequence) and, if asked, the arrays.

    Raises:
      UserError: problems and completions do not fit together, there are no students, a
        sequence is longer than the models allow, or a number is not finite.
    """
    scoring = scoring or ScoringConfig()
    if not isinstance(template, Template):
        template = load_template(template)
    check_value("completions", Sequence[Sequence[str]], completions)
    if not students or len(problems) != len(completions):
        raise UserError("give students, and a list of completions for every problem.")
    given = []
    for problem, texts in zip(problems, completions, strict=True):
        values = problem._asdict() if isinstance(problem, Problem) else problem
        problem = build(Problem, values, "problems")
        closed = scoring.assume_closed
        given += [text_completion(template, problem, text, closed) for text in texts]
    mesh = sharding.make_mesh(sharding.MeshConfig())
    models = [checkpoint.LoadedModel(*model) for model in (teacher, *students)]
    score = make_scorer(models, make_renderers(models, template), scoring, mesh)
    scores = iter(score(given, per_token=scoring.per_token) if given else ())
    return [list(itertools.islice(scores, len(texts))) for texts in completions]
