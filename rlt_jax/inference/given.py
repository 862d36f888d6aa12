"""A sampler that takes part of the completions from traces."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlt_jax.data.examples import Renderer, student_examples
from rlt_jax.errors import UserError
from rlt_jax.inference.sampler import Sampler, decode, join
from rlt_jax.records import Problem, Trace
from rlt_jax.types import Array, Params, Requests, Rollout


@dataclasses.dataclass(frozen=True)
class GivenSampler(Sampler):
    """Every completion is sampled with a probability, else that of a trace.

    The probability is lambda of GKD (arXiv 2306.13649, algorithm 1). The log-probs of the
    tokens of a trace are 0, as nothing has sampled them.

    Attributes:
      sampler: samples completions.
      own: the probability.
      given: `Problem.asked` -> completions of its traces.
      renderer: of the model.
    """

    sampler: Sampler
    own: float
    given: Mapping[Any, Sequence[np.ndarray]]
    renderer: Renderer

    def generate(self, params: Params, requests: Requests, key: Array) -> Rollout:
        """See `Sampler`."""
        taken: dict[int, np.ndarray] = {}
        for n, request in enumerate(requests):
            seed = [*map(int, jax.random.key_data(key)), request.request_id]
            rng = np.random.default_rng(seed)
            if rng.random() >= self.own:
                traces = self.given[request.problem.asked]
                taken[n] = traces[rng.integers(len(traces))]
        given, tokens = [requests[n] for n in taken], list(taken.values())
        log_probs = [np.zeros(len(one), np.float32) for one in tokens]
        rollout = Rollout(given, tokens, log_probs, np.ones(len(taken), bool))
        parts = [([*taken], decode(rollout, self.renderer.tokenizer))]
        if left := [n for n in range(len(requests)) if n not in taken]:
            own = [requests[n] for n in left]
            parts.append((left, self.sampler.generate(params, own, key)))
        return join(parts)


def given_completions(
    renderer: Renderer, traces: Sequence[Trace], problems: Sequence[Problem], limit: int
) -> dict[Any, list[np.ndarray]]:
    """`Problem.asked` -> completions that a student would have written, one or more for each.

    Raises:
      UserError: a problem has no trace of at most `limit` tokens.
    """
    given: dict[Any, list[np.ndarray]] = {}
    for trace, one in zip(traces, student_examples(renderer, traces), strict=True):
        tokens = one.tokens[one.loss_mask]
        if len(tokens) <= limit:
            given.setdefault(trace.problem.asked, []).append(tokens)
    if missing := [p.question for p in problems if p.asked not in given]:
        raise UserError(
            f"teaching.traces: {len(missing)} of {len(problems)} questions have no trace "
            f"of at most sampling.max_new_tokens={limit} tokens, such as "
            f"{missing[0]!r}. Set teaching.own_samples=1, or leave them out of the data."
        )
    return given
