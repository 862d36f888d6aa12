"""The containers that modules pass to each other.

One RL step is carried by two of them: `Rollout` on the host, `Batch` on the device. Later
verbs fill in what is None with `_replace`. Axis letters mean the same everywhere: B rows,
P prompts, R completions per prompt, E examples (the P * R completions of a step), T length
of a row, S length of a span, L layers, K key/value heads, H head dim, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlt_jax.records import Problem

Array = jax.Array
Params = Any  # a pytree of arrays
Reward = dict[str, Array]  # name -> [E] float32; "value" is the reward, the rest terms
Metrics = dict[str, Array]  # "area/name" -> scalar on the device


class PagedCache(NamedTuple):
    """Keys and values of growing sequences; see `models/paged_cache.py`.

    Attributes:
      keys: [K, L, pages, C, H] activation dtype, C tokens a page.
      values: [K, L, pages, C, H] activation dtype.
      table: [B, S / C] int32, the pages of each sequence in order; 0 where there is none.
    """

    keys: Array
    values: Array
    table: Array


class Request(NamedTuple):
    """A completion to sample.

    Attributes:
      prompt: [T] int32 token ids, at least one.
      request_id: with the key it decides which tokens are sampled.
      max_new_tokens: maximum tokens of the completion, stop token included.
      problem: the problem that the prompt was rendered from, if any.
    """

    prompt: np.ndarray
    request_id: int
    max_new_tokens: int
    problem: Problem | None = None


Requests = Sequence[Request]


class Rollout(NamedTuple):
    """E completions on the host, as a `Sampler` returns them.

    Attributes:
      requests: the request of each completion.
      tokens: ids of each completion, [t] int32, up to and including the stop token.
      log_probs: log-prob of each token at the sampling temperature, [t] float32.
      finished: [E] bool, False where a completion was cut off at its maximum length.
      texts: text of each completion without its stop token; () without a tokenizer.
      offsets: [t, 2] int32 for each completion, the characters of its text that each token
        stands for; () without a tokenizer.
      steps_used: decode steps of slots that sampled a token of a completion.
      steps_computed: decode steps of slots that were computed.
    """

    requests: Requests
    tokens: Sequence[np.ndarray]
    log_probs: Sequence[np.ndarray]
    finished: np.ndarray
    texts: Sequence[str] = ()
    offsets: Sequence[np.ndarray] = ()
    steps_used: int = 0
    steps_computed: int = 0


class Spans(NamedTuple):
    """One span of tokens (completion, explanation or solution) of each of E examples.

    Attributes:
      start: [E] int32, index of the first token in the flattened [M * B * T] arrays.
      segment: [E, S] int32, the segment that each token belongs to, from 0; -1 where the
        span has no token.
    """

    start: Array
    segment: Array


class Batch(NamedTuple):
    """Packed sequences, and what is known of their tokens.

    Sequences of several examples share a row; `segment_ids` keeps them apart. The policy's
    batch carries a batch for every student, with the student's own sequences of the same
    examples. Within an update the fields [M, B, T] become [B, T], one micro-batch.

    Attributes:
      tokens: [M, B, T] int32.
      positions: [M, B, T] int32, counted from 0 within each sequence.
      segment_ids: [M, B, T] int32; 1, 2, ... within a row, 0 is padding.
      num_micro_batches: [] int32, how many of the M hold any sequence.
      completion: tokens that the policy sampled.
      explanation: tokens of the explanation, in a student's sequences.
      policy_explanation: the same text in the policy's sequences; equal segment numbers
        stand for equal text. In the batch of a student.
      solution: tokens of the solution, in a student's sequences.
      closed: [E] bool, False where the explanation's closing tag is missing.
      finished: [E] bool, False where the completion was cut off.
      overlong: [E] bool, examples too long for a student, scored without explanation.
      students: a batch for every student of the reward.
      log_probs: [M, B, T] float32 of the model that the batch is for; the policy's are
        those at the time of the rollout. None where nothing needs them.
      sampler_log_probs: [M, B, T] float32 as the sampler returned them.
      ref_log_probs: [M, B, T] float32 under the reference.
      vocabulary_kl: [E, S] float32, KL(policy || student) at the first token of each
        segment of the explanation.
      teacher_states: [M, B, T, D] hidden state of a teacher that predicts each token, in a
        sequence of its own.
      teacher_kernel: weights of the teacher's head.
      taught: [M, B, T] float32, of a student's own attempts: the advantage of each token
        by its teacher; or 1 on tokens whose distribution the teacher has, else 0.
      advantages: [M, B, T] float32, the advantage of each token's completion.
      inverse_length: [M, B, T] float32, 1 / length of the completion on its tokens, else 0.
      loss_weights: [M, B, T] float32, weight of each token's loss in the loss of the batch.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    num_micro_batches: Array | None
    completion: Spans | None = None
    explanation: Spans | None = None
    policy_explanation: Spans | None = None
    solution: Spans | None = None
    closed: Array | None = None
    finished: Array | None = None
    overlong: Array | None = None
    students: tuple[Batch, ...] = ()
    log_probs: Array | None = None
    sampler_log_probs: Array | None = None
    ref_log_probs: Array | None = None
    vocabulary_kl: Array | None = None
    teacher_states: Array | None = None
    teacher_kernel: Array | None = None
    taught: Array | None = None
    advantages: Array | None = None
    inverse_length: Array | None = None
    loss_weights: Array | None = None

    def micro_batch(self, m: Array | int) -> Batch:
        """The fields [M, B, T] of micro-batch m as [B, T]; spans and examples left out."""
        fields = self._asdict().items()
        per_token = {k: x[m] for k, x in fields if getattr(x, "ndim", 0) >= 3}
        kernel = self.teacher_kernel
        return Batch(num_micro_batches=None, teacher_kernel=kernel, **per_token)


class TrainState(NamedTuple):
    """What an optimizer step reads and writes.

    Attributes:
      step: [] int32, completed optimizer steps.
      params: model parameters.
      opt_state: optax state.
      skipped: [] int32, steps skipped since the last one that changed the parameters.
    """

    step: Array
    params: Params
    opt_state: Any
    skipped: Array
