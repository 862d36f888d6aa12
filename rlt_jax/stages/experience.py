"""What a policy writes and what it gets for it: one batch of experience."""

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlt_jax.data import examples
from rlt_jax.data.packing import on_spans
from rlt_jax.data.scoring import sampled_rows
from rlt_jax.data.templates import Problem
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import Engine, Occupancy
from rlt_jax.inference.stored import roll_out
from rlt_jax.report.statistics import mean_and_error
from rlt_jax.rl.metrics import rollout_metrics
from rlt_jax.rl.reward_terms import (
    Term,
    Written,
    correctness,
    make_terms,
    total_reward,
)
from rlt_jax.rl.scorer import Scored, balanced_kl_coef
from rlt_jax.stages.roles import (
    Roles,
    jit_log_probs,
    jit_scorer,
    load_policy_engine,
    requests_of,
    sample_rows,
    scoring_batches,
)
from rlt_jax.training import offload, sharding
from rlt_jax.training.metrics import phase_metrics
from rlt_jax.types import PackedRows, Params, Reward, TokenSpans

_LOG = logging.getLogger("rlt_jax")


class Writing(NamedTuple):
    """How a policy is asked and rewarded, fixed for a run.

    Attributes:
      form: "teacher" or "student", the prompt and the rows.
      engine: of the policy.
      terms: of the reward.
      score: RLT reward: policy and student params, batches, KL weight -> Scored; None
        where no student scores.
      log_probs: policy params, packed rows, spans -> [M, B, T].
      mesh: where all of it runs.
      updates: on the same completions; of several, the later ones need the log-probs
        of the policy that wrote them.
    """

    form: str
    engine: Engine
    terms: tuple[Term, ...]
    score: Any
    log_probs: Any
    mesh: Mesh
    updates: int


class Experience(NamedTuple):
    """N completions, rewarded.

    Attributes:
      completions: ids of each, [t] int32.
      rows: packed rows of prompts and completions.
      spans: the completions in them.
      num_tokens: of the rows, padding apart.
      log_probs: [M, B, T] of the policy that wrote them; None where the only update
        finds them itself.
      sampler_log_probs: [M, B, T] as the engine gave them.
      finished: [N] bool.
      reward: value and terms.
      written: the completions as texts and answers.
      metrics: of the rollout, and seconds of each phase.
    """

    completions: list[np.ndarray]
    rows: PackedRows
    spans: TokenSpans
    num_tokens: int
    log_probs: jax.Array | None
    sampler_log_probs: jax.Array
    finished: np.ndarray
    reward: Reward
    written: Written
    metrics: dict[str, float]


def load_writing(
    config: Mapping[str, Any], form: str, roles: Roles, mesh: Mesh, updates: int = 1
) -> tuple[Writing, float | None]:
    """How the policy is asked and rewarded; and the KL weight, None to balance it."""
    terms = make_terms(config["terms"])
    scored = any(term.name == "rlt" for term in terms)
    if scored != bool(roles.students) or (scored and form != "teacher"):
        raise UserError(
            f"the reward's terms are {[term.name for term in terms]}, loop.format is "
            f"{form!r} and there are {len(roles.students)} students: the term `rlt` "
            "needs a student (or loop.self_teaching) and loop.format='teacher', and a student "
            "needs that term."
        )
    engine = load_policy_engine(roles, config, mesh, form)
    temperature = engine.sampling.temperature
    log_probs = jit_log_probs(roles.teacher.model, temperature, mesh)
    if not scored:
        return Writing(form, engine, terms, None, log_probs, mesh, updates), 0.0
    jitted, reward = jit_scorer(roles, config, temperature, mesh)

    def score(params: Params, students: tuple[Params, ...], *rest: Any) -> Scored:
        return jitted(params, offload.fetch(students), *rest)

    kl_coef = reward.explanation_kl_coef
    writing = Writing(form, engine, terms, score, log_probs, mesh, updates)
    return writing, None if kl_coef == "auto" else kl_coef


def gather_experience(
    writing: Writing,
    roles: Roles,
    params: Params,
    student_params: tuple[Params, ...],
    problems: Sequence[Problem],
    key: jax.Array,
    kl_coef: float,
    file: Path | None = None,
) -> Experience:
    """Rollout, rows, scores and reward of one completion a problem.

    Args:
      writing: programs and settings.
      roles: tokenizers, template, row shape.
      params: of the policy.
      student_params: of the reward's students.
      problems: N; repeated for several completions of each.
      key: PRNG key of the rollout.
      kl_coef: weight of the explanation KL.
      file: where completions are kept, or taken from.
    """
    began, occupancy = time.monotonic(), Occupancy()
    longest = writing.engine.sampling.max_new_tokens
    requests = requests_of(roles, problems, longest, form=writing.form)
    rollout = roll_out(writing.engine, params, requests, key, occupancy, file)
    completions = [one.tokens for one in rollout]
    finished = np.array([one.finished for one in rollout])
    metrics = rollout_metrics(rollout, occupancy)
    rolled_out = time.monotonic()

    scored, overlong = None, 0
    if writing.score:
        batches, overlong = scoring_batches(roles, problems, completions)
        rows, spans = batches[0].teacher, batches[0].completion
        batches = sharding.put_rows(batches, writing.mesh)
        scored = writing.score(params, student_params, batches, jnp.float32(kl_coef))
        on_device = batches[0].teacher, batches[0].completion
        log_probs = scored.teacher_log_probs
    else:
        prompts = [request.prompt for request in requests]
        rows, spans = sampled_rows(roles.rows, prompts, completions)
        on_device = sharding.put_rows((rows, spans), writing.mesh)
        log_probs = None
        if writing.updates > 1:
            log_probs = writing.log_probs(params, *on_device)
    tokenizer, template = roles.teacher.tokenizer, roles.template
    texts = [examples.completion_text(tokenizer, ids)[0] for ids in completions]
    answers = [template.solution_of(text) for text in texts]
    written = Written(problems, texts, completions, answers, finished)
    reward = total_reward(
        writing.terms, written._replace(scored=scored and scored.reward)
    )
    jax.block_until_ready((log_probs, reward))
    drawn = sum(map(len, completions))
    metrics |= {"rollout/overlong": overlong}
    metrics |= phase_metrics("rollout", drawn, rolled_out - began)
    taken = time.monotonic() - rolled_out
    num_tokens = np.count_nonzero(rows.segment_ids)
    metrics |= phase_metrics("score", num_tokens, taken)
    sampler = on_spans([one.log_probs for one in rollout], spans, rows.tokens.shape)
    return Experience(
        completions,
        *on_device,
        num_tokens,
        log_probs,
        sharding.put_rows(sampler, writing.mesh),
        finished,
        reward,
        written,
        metrics,
    )


def evaluate_held_out(
    writing: Writing,
    roles: Roles,
    params: Params,
    student_params: tuple[Params, ...],
    problems: Sequence[Problem],
    rows: int,
    key: jax.Array,
    kl_coef: float | None,
) -> tuple[float, dict[str, float], list[dict[str, Any]]]:
    """Mean reward and terms on held-out problems, one completion each.

    The batch has as many rows as a training step, so nothing new is compiled, and calls
    with the same key differ by the policy alone. Without a `kl_coef` the explanation KL
    is balanced to the solution score.

    Returns:
      The weight of the KL; means and standard errors of the reward, its terms and, where
      it can be told, the accuracy; and what was written, as JSON rows.
    """
    padded = [problems[i % len(problems)] for i in range(rows)]
    gather = functools.partial(
        gather_experience, writing, roles, params, student_params, padded, key
    )
    if kl_coef is None:
        terms = jax.device_get(gather(0.0).reward.terms)
        kl_coef = balanced_kl_coef(terms["solution_score"], terms["explanation_kl"])
    found = gather(kl_coef)
    chosen = slice(0, min(32, len(problems)))
    written = sample_rows(
        roles, writing.form, padded, found.completions, found.reward, chosen
    )
    values = jax.device_get({"reward": found.reward.value, **found.reward.terms})
    answered = all(problem.answer is not None for problem in padded)
    if writing.form == "student" and answered:
        values["accuracy"] = correctness(
            found.written, right=1.0, wrong=0.0, unreadable=0.0
        )
    result = {}
    for name, value in values.items():
        mean, error = mean_and_error(value[: len(problems)])
        result |= {name: mean, f"{name}_standard_error": error}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
    _LOG.info("held out, explanation KL weighed by %.4g: %s", kl_coef, shown)
    return float(kl_coef), result, written
