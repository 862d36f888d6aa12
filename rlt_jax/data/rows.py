"""Packing: several sequences in one row, rows in micro-batches of a fixed shape."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from grain import MapDataset

from rlt_jax.data import examples
from rlt_jax.data.examples import EMPTY, Example, Renderer
from rlt_jax.errors import UserError
from rlt_jax.ranges import Checked, Count, Size
from rlt_jax.records import Trace
from rlt_jax.types import Batch, Rollout, Spans


@dataclasses.dataclass(frozen=True)
class RowShape(Checked):
    """Fixed shape of packed rows.

    Attributes:
      micro_batch_size: B, packed rows computed at once, over all devices.
      row_length: T, tokens per packed row, and the longest single sequence.
    """

    micro_batch_size: Count
    row_length: Size


Examples = Sequence[Example]
Arrays = Sequence[np.ndarray]

# Fills up a batch.
ABSENT = Example(np.zeros(0, np.int32), np.zeros(0, bool), EMPTY, EMPTY)


class Renderers(Protocol):
    """What `pack` reads of a run.

    Attributes:
      row_shape: shape of the packed rows.
      renderer: renders the sequences of the policy, in its role.
      student_limit: longest sequence of a student.
      student_renderers: render the sequences of each student; one object for equal
        tokenizers.
    """

    row_shape: RowShape
    renderer: Renderer
    student_limit: int
    student_renderers: Sequence[Renderer]


def first_fit(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """Places items into bins of `capacity`, longest first.

    Returns:
      (bin, offset) for each item, in the order given.
    """
    used: list[int] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = capacity - lengths[item]
        number = next((n for n, filled in enumerate(used) if filled <= room), len(used))
        if number == len(used):
            used.append(0)
        places[item] = (number, used[number])
        used[number] += lengths[item]
    return places


def pack_sequences(
    sequences: Arrays,
    shape: RowShape,
    num_rows: int | None = None,
    places: Sequence[tuple[int, int]] | None = None,
) -> tuple[Batch, np.ndarray]:
    """Packs sequences into [M, B, T].

    The shape does not depend on the lengths of the sequences, so a program compiled for it
    is never compiled again; `num_micro_batches` says how many of the M hold any sequence.

    Args:
      sequences: token ids, [t] each with t <= row_length.
      shape: B and T.
      num_rows: M * B; by default enough for one sequence a row.
      places: (row, offset) of each sequence, rows used from 0 without a gap; by default
        those of `first_fit`.

    Returns:
      The packed rows, and for each sequence the index of its first token in the flattened
      [M * B * T] arrays, int32.

    Raises:
      UserError: a sequence is longer than row_length.
    """
    B, T = shape.micro_batch_size, shape.row_length
    lengths = [len(tokens) for tokens in sequences]
    if max(lengths, default=0) > T:
        raise UserError(
            f"packing: sequence {int(np.argmax(lengths))} has {max(lengths)} tokens, more "
            f"than row_length={T}. Raise row_length."
        )
    M = -(-(num_rows or len(sequences)) // B)
    tokens, positions, segment_ids = arrays = np.zeros((3, M * B, T), np.int32)
    segments = [0] * (M * B)  # sequences of each row so far
    places = first_fit(lengths, T) if places is None else places
    for sequence, (row, start) in zip(sequences, places, strict=True):
        end = start + len(sequence)
        segments[row] += 1
        tokens[row, start:end] = sequence
        segment_ids[row, start:end] = segments[row]
        positions[row, start:end] = np.arange(len(sequence))
    used = sum(count > 0 for count in segments)
    packed = Batch(*arrays.reshape(3, M, B, T), np.int32(-(-used // B)))
    return packed, np.array([row * T + start for row, start in places], np.int32)


def pack(rollout: Rollout, run: Renderers, count: int | None = None) -> Batch:
    """The batch of a rollout: the policy's sequences, and those of every student.

    The policy's sequences keep the sampled ids. A student's sequence is the canonical
    encoding of its text; explanation tokens of both are aligned on their finest common
    segmentation. An explanation that makes the student's sequence longer than a row (an
    untrained model samples bytes that are not valid UTF-8) counts as empty.

    Args:
      rollout: completions, decoded.
      run: row shape and renderers.
      count: E, see `pack_examples`.

    Returns:
      NumPy arrays, with sampler_log_probs and without any other log-probs.
    """
    problems = [request.problem for request in rollout.requests]
    columns = zip(problems, rollout.tokens, rollout.texts, rollout.offsets, strict=True)
    policy = [examples.completion_example(run.renderer, *each) for each in columns]
    parsed = [run.renderer.template.parse_completion(x) for x in rollout.texts]
    traces = [Trace(p, body) for p, (body, _) in zip(problems, parsed, strict=True)]
    absent = (0, (count or len(problems)) - len(problems))
    renderers, limit = run.student_renderers, run.student_limit
    fitted = {r: fitting_examples(r, traces, limit) for r in dict.fromkeys(renderers)}
    overlong = {r: np.pad(too_long, absent) for r, (_, too_long) in fitted.items()}
    closed = np.array([closed for _, closed in parsed])
    made = [fitted[renderer][0] for renderer in renderers]
    batch = pack_examples(run.row_shape, policy, made, closed, count)
    pairs = zip(batch.students, renderers, strict=True)
    starts = batch.completion.start[: len(closed)]
    return batch._replace(
        students=tuple(one._replace(overlong=overlong[r]) for one, r in pairs),
        finished=np.pad(np.asarray(rollout.finished, bool), absent),
        sampler_log_probs=_lay_out(rollout.log_probs, starts, batch.tokens.shape),
    )


def pack_examples(
    shape: RowShape,
    policy: Examples,
    students: Sequence[Examples],
    closed: np.ndarray,
    count: int | None = None,
) -> Batch:
    """Packs E examples of the policy and of every student, with their spans.

    Args:
      shape: of the rows.
      policy: the policy's sequences.
      students: sequences of the same examples for each student; one object where two
        students have the same tokenizer, which is then packed once.
      closed: bool, whether the explanation's closing tag is there.
      count: E, where it is to be more than the examples: the others have no tokens and
        cost nothing, and nothing is compiled for a smaller number.
    """
    absent = [ABSENT] * ((count or len(policy)) - len(policy))
    policy = [*policy, *absent]
    batch, starts = pack_sequences([one.tokens for one in policy], shape)
    first = [np.append(one.loss_mask, True).argmax() for one in policy]
    sampled = [np.arange(one.loss_mask.sum()) for one in policy]
    distinct = {id(one): [*one, *absent] for one in students}.items()
    packed = {key: pack_student(shape, one, policy, starts) for key, one in distinct}
    return batch._replace(
        completion=make_spans(starts + first, sampled, shape.row_length),
        closed=np.pad(closed, (0, len(absent))),
        students=tuple(packed[id(one)] for one in students),
    )


def pack_student(
    shape: RowShape, student: Examples, policy: Examples, policy_starts: np.ndarray
) -> Batch:
    """A student's batch; `policy_starts` are the policy's sequences in its own batch."""
    batch, starts = pack_sequences([one.tokens for one in student], shape)
    explanation = [one.explanation for one in student]
    in_policy = [one.explanation for one in policy]
    solution = [one.solution for one in student]
    same = [np.array_equal(*map(explained, pair)) for pair in zip(student, policy)]
    aligned = list(map(examples.align, explanation, in_policy, same))
    ours, theirs = [s for s, _ in aligned], [p for _, p in aligned]
    in_solution = [np.arange(len(span.offsets)) for span in solution]

    first_in_policy = policy_starts + [span.start for span in in_policy]
    T = shape.row_length
    return batch._replace(
        explanation=make_spans(starts + [x.start for x in explanation], ours, T),
        policy_explanation=make_spans(first_in_policy, theirs, T),
        solution=make_spans(starts + [x.start for x in solution], in_solution, T),
    )


def explained(one: Example) -> np.ndarray:
    """Ids of the explanation."""
    return one.tokens[one.explanation.start : one.explanation.end]


def fitting_examples(
    renderer: Renderer, traces: Sequence[Trace], limit: int
) -> tuple[list[Example], np.ndarray]:
    """A student's sequences, and [E] bool: those whose explanation did not fit."""
    made = examples.student_examples(renderer, traces)
    overlong = np.array([len(one.tokens) > limit for one in made])
    for i in np.flatnonzero(overlong):
        without = traces[i]._replace(explanation="")
        (shorter,) = examples.student_examples(renderer, [without])
        made[i] = shorter._replace(explanation=EMPTY)
    return made, overlong


def make_spans(starts: np.ndarray, segments: Arrays, width: int) -> Spans:
    """Spans from the place of each and the segments of its tokens.

    Args:
      starts: [E] flat index of the first token of each span.
      segments: for each span the segment of each token, -1 to leave a token out.
      width: S, room for the tokens of a span.

    Raises:
      UserError: a span has more than `width` tokens.
    """
    segment = np.full((len(segments), width), -1, np.int32)
    for e, numbers in enumerate(segments):
        if len(numbers) > width:
            raise UserError(
                f"span of {len(numbers)} tokens in completion {e}, room for {width}."
            )
        segment[e, : len(numbers)] = numbers
    return Spans(np.asarray(starts, np.int32), segment)


def _lay_out(values: Arrays, starts: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values [t] of each example from its start on: float32, elsewhere 0."""
    flat = np.zeros(np.prod(shape), np.float32)
    for start, of_example in zip(starts, values, strict=True):
        flat[start : start + len(of_example)] = of_example
    return flat.reshape(shape)


class PackedBatches(Iterator[Batch]):
    """Batches of packed rows from a stream of examples, for supervised training.

    The next sequences of the stream are taken for as long as they fit into the rows of a
    batch. The position in the stream is all the state there is.

    Args:
      stream: records {"tokens": [t] int32, "loss_mask": [t] bool}, perhaps endless.
      shape: of the rows.
      num_rows: rows of a batch.
    """

    def __init__(self, stream: MapDataset, shape: RowShape, num_rows: int) -> None:
        self._stream, self._shape, self._num_rows = stream, shape, num_rows
        self._next = 0

    def get_state(self) -> dict[str, int]:
        """The position, as JSON."""
        return {"next": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues at a position."""
        self._next = state["next"]

    def count_until(self, sequences: int) -> int:
        """Batches from the start of the stream that hold so many sequences, or more."""
        counted, count = PackedBatches(self._stream, self._shape, self._num_rows), 0
        while counted._next < sequences and counted._take()[0]:
            count += 1
        return count

    def __next__(self) -> Batch:
        taken, places = self._take()
        if not taken:
            raise StopIteration
        tokens = [one["tokens"] for one in taken]
        batch, starts = pack_sequences(tokens, self._shape, self._num_rows, places)
        masks = [one["loss_mask"] for one in taken]
        # Nothing predicts the first token of a sequence.
        learned = _lay_out(masks, starts, batch.tokens.shape) * (batch.positions > 0)
        # The loss is the mean over the tokens that are learned.
        total = np.float32(max(np.count_nonzero(learned), 1))
        return batch._replace(loss_weights=learned / total)

    def _take(self) -> tuple[list[Mapping[str, np.ndarray]], list[tuple[int, int]]]:
        """The records of the next batch and their places; moves the position."""
        T = self._shape.row_length
        taken, places, filled = [], [], [0] * self._num_rows
        while self._next < len(self._stream):
            one = self._stream[self._next]
            length = len(one["tokens"])
            row = next((i for i, used in enumerate(filled) if used + length <= T), None)
            if row is not None:
                places.append((row, filled[row]))
                filled[row] += length
            else:  # placed longest first, all may fit
                lengths = [*(len(each["tokens"]) for each in taken), length]
                again = first_fit(lengths, T)
                if max(row for row, _ in again) >= self._num_rows:
                    break
                places, filled = again, [0] * self._num_rows
                for (row, _), used in zip(places, lengths, strict=True):
                    filled[row] += used
            taken.append(one)
            self._next += 1
        return taken, places
