"""The pytrees that modules pass to each other.

Axis letters mean the same everywhere: B rows, P prompts, R completions per prompt,
T length of a row, S length of keys, L layers, K key/value heads, H head dim, M
micro-batches, N (in this file) completions = P * R.
"""

from typing import Any, NamedTuple

import jax

Array = jax.Array
Params = Any


class PagedCache(NamedTuple):
    """Keys and values of growing rows; see `models/paged_cache.py`.

    Attributes:
      keys: [K, L, pages, C, H] activation dtype, C tokens a page.
      values: the same.
      table: [B, S / C] int32, the pages of each row in order; 0 where there is none.
    """

    keys: Array
    values: Array
    table: Array


class PackedRows(NamedTuple):
    """Rows with one or more segments each, cut into micro-batches.

    Attributes:
      tokens: [M, B, T] int32.
      segment_ids: [M, B, T] int32; 1, 2, ... within a row, 0 is padding.
      positions: [M, B, T] int32, counted from 0 within each segment.
      num_micro_batches: [] int32, how many of the M hold anything.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    num_micro_batches: Array


class TokenSpans(NamedTuple):
    """Where one span (explanation or solution) of every completion lies.

    Attributes:
      index: [N, T] int32 into the flattened [M * B * T] per-token arrays.
      segment: [N, T] int32, to which segment of the span the token belongs.
      mask: [N, T] bool, True where there is a token.
    """

    index: Array
    segment: Array
    mask: Array


class ScoringBatch(NamedTuple):
    """Student and teacher rows of N completions, with the spans the reward reads.

    Attributes:
      student: packed student rows.
      teacher: packed teacher rows.
      student_explanation: tokens of the explanation in the student rows.
      teacher_explanation: the same text in the teacher rows; `segment` is shared.
      student_solution: tokens of the solution in the student rows.
      completion: every sampled token in the teacher rows, for the policy loss.
      closed: [N] bool, False where the closing tag is missing.
    """

    student: PackedRows
    teacher: PackedRows
    student_explanation: TokenSpans
    teacher_explanation: TokenSpans
    student_solution: TokenSpans
    completion: TokenSpans
    closed: Array


class Reward(NamedTuple):
    """The reward of N completions and what it is made of.

    Attributes:
      value: [N] float32.
      terms: name -> [N] float32, each already reduced to one number a completion.
    """

    value: Array
    terms: dict[str, Array]


class Completion(NamedTuple):
    """What a model wrote after a prompt; NumPy arrays on the host.

    Attributes:
      tokens: [T] int32, up to and including the stop token.
      log_probs: [T] float32 of each token at the sampling temperature.
      finished: whether it ended by itself and not at its longest length.
    """

    tokens: Any
    log_probs: Any
    finished: bool


class TrainState(NamedTuple):
    """What an optimizer step reads and writes.

    Attributes:
      step: [] int32, completed optimizer steps.
      params: model parameters.
      opt_state: optax state.
      skipped: [] int32, steps that changed nothing since the last that did.
    """

    step: Array
    params: Params
    opt_state: Any
    skipped: Array
