"""Sequences into rows of a fixed shape, and back."""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import pytest

from rlt_jax.data import examples, rows
from rlt_jax.data.examples import Renderer
from rlt_jax.data.rows import (
    PackedBatches,
    RowShape,
    first_fit,
    make_spans,
    pack,
    pack_sequences,
)
from rlt_jax.data.templates import Template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.inference import spans as on_rows
from rlt_jax.inference.sampler import decode
from rlt_jax.records import Problem, Trace
from rlt_jax.types import Batch, Request, Rollout, Spans

SHAPE = RowShape(micro_batch_size=2, row_length=64)
CLOSING = "<|end_of_explanation|>"
PROBLEMS = [Problem(f"{n}+1?", str(n + 1)) for n in range(5)]
TEXTS = [
    f"0+1=1{CLOSING}<|end|>",
    "never closed",
    f"{CLOSING}<|end|>",
    f"3+1=4{CLOSING} and more<|end|>",
    "",
]
EXPLANATIONS = ["0+1=1", "never closed", "", "3+1=4", ""]


class Run(NamedTuple):
    """What `pack` reads of a run."""

    row_shape: RowShape
    renderer: Renderer
    student_renderers: Sequence[Renderer]
    student_limit: int = 64


class CountingTokenizer:
    """A tokenizer that keeps the arguments of every call of a method."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.calls: dict[str, list[tuple]] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tokenizer, name)
        if not callable(value):
            return value

        def method(*args: Any) -> Any:
            self.calls.setdefault(name, []).append(args)
            return value(*args)

        return method


def sequences_of(*lengths: int) -> list[np.ndarray]:
    """Sequences of different tokens, none of them 0."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(a, b) + 1 for a, b in itertools.pairwise(ends)]


def rollout_of(
    tokenizer: Tokenizer, problems: Sequence[Problem], completions: list[np.ndarray]
) -> Rollout:
    rng = np.random.default_rng(0)
    requests = [
        Request(np.ones(1, np.int32), n, 100, problem)
        for n, problem in enumerate(problems)
    ]
    log_probs = [-rng.random(len(tokens), np.float32) for tokens in completions]
    finished = np.array([tokenizer.eos_id in tokens for tokens in completions])
    return decode(Rollout(requests, completions, log_probs, finished), tokenizer)


@pytest.fixture(scope="module")
def run(tokenizer: Tokenizer, tiny: Template) -> Run:
    teacher = Renderer(tokenizer, tiny, "teacher")
    return Run(SHAPE, teacher, [Renderer(tokenizer, tiny, "student")])


@pytest.fixture(scope="module")
def rollout(tokenizer: Tokenizer) -> Rollout:
    completions = [tokenizer.encode(text).ids for text in TEXTS]
    return rollout_of(tokenizer, PROBLEMS, completions)


@pytest.fixture(scope="module")
def batch(rollout: Rollout, run: Run) -> Batch:
    return pack(rollout, run)


def one_student(batch: Batch) -> Batch:
    (student,) = batch.students
    return student


def lengths_of(spans: Spans) -> list[int]:
    return np.asarray(on_rows.mask(spans)).sum(-1).tolist()


def texts(tokenizer: Tokenizer, batch: Batch, spans: Spans) -> list[str]:
    tokens = np.asarray(on_rows.gather(batch.tokens, spans))
    return [
        tokenizer.decode(ids[keep])
        for ids, keep in zip(tokens, spans.segment >= 0, strict=True)
    ]


def test_first_fit_by_hand() -> None:
    # Longest first: 7 opens bin 0, 6 opens bin 1, 4 joins 1, 3 joins 0, 1 opens 2.
    assert first_fit([3, 1, 7, 6, 4], 10) == [(0, 7), (2, 0), (0, 0), (1, 0), (1, 6)]
    assert first_fit([], 10) == []
    assert first_fit([10, 10], 10) == [(0, 0), (1, 0)]


def test_first_fit_never_overflows_and_never_overlaps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 21, rng.integers(1, 40)).tolist()
        places = first_fit(lengths, 20)
        taken = np.zeros((len(lengths), 20), int)
        for (row, start), length in zip(places, lengths, strict=True):
            assert start + length <= 20
            taken[row, start : start + length] += 1
        assert taken.max() == 1
        assert taken.sum() == sum(lengths)
        # Bins are filled from the left and numbered without a gap.
        used = taken.sum(-1)
        assert (used > 0).sum() == 1 + max(row for row, _ in places)
        assert (np.diff(taken, axis=-1) <= 0).all()


def test_packed_sequences_can_be_read_back() -> None:
    rng = np.random.default_rng(1)
    sequences = sequences_of(*rng.integers(1, 13, 11))
    packed, starts = pack_sequences(sequences, RowShape(3, 12))
    for tokens, start in zip(sequences, starts, strict=True):
        place = slice(start, start + len(tokens))
        np.testing.assert_array_equal(packed.tokens.reshape(-1)[place], tokens)
        positions = packed.positions.reshape(-1)[place]
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))
        assert len(set(packed.segment_ids.reshape(-1)[place].tolist())) == 1
    filled = packed.segment_ids > 0
    assert filled.sum() == sum(map(len, sequences))
    np.testing.assert_array_equal(filled, packed.tokens > 0)
    assert not packed.positions[~filled].any()


def test_segments_of_a_row_count_from_one() -> None:
    packed, starts = pack_sequences(sequences_of(2, 3, 2), RowShape(1, 8))
    # The longest comes first; segment ids follow the order of the sequences.
    assert starts.tolist() == [3, 0, 5]
    assert packed.segment_ids[0, 0].tolist() == [2, 2, 2, 1, 1, 3, 3, 0]
    assert packed.positions[0, 0].tolist() == [0, 1, 2, 0, 1, 0, 1, 0]


def test_the_shape_depends_on_the_number_of_sequences_alone() -> None:
    short, _ = pack_sequences(sequences_of(*[1] * 5), RowShape(2, 8))
    long, _ = pack_sequences(sequences_of(*[8] * 5), RowShape(2, 8))
    assert short.tokens.shape == long.tokens.shape == (3, 2, 8)
    assert short.num_micro_batches == 1
    assert long.num_micro_batches == 3
    assert {array.dtype for array in jax.tree.leaves(short)} == {np.dtype(np.int32)}


def test_the_number_of_rows_can_be_given() -> None:
    packed, _ = pack_sequences(sequences_of(3, 4), RowShape(2, 8), num_rows=6)
    assert packed.tokens.shape == (3, 2, 8)
    assert packed.num_micro_batches == 1


def test_only_the_counted_micro_batches_hold_tokens() -> None:
    rng = np.random.default_rng(2)
    for count in (1, 4, 9):
        sequences = sequences_of(*rng.integers(1, 9, count))
        packed, _ = pack_sequences(sequences, RowShape(2, 8))
        filled = (packed.segment_ids > 0).any((1, 2))
        M = np.arange(len(filled))
        np.testing.assert_array_equal(filled, packed.num_micro_batches > M)


def test_a_sequence_that_is_too_long_is_named() -> None:
    message = "sequence 1 has 9 tokens, more than row_length=8. Raise row_length"
    with pytest.raises(UserError, match=message):
        pack_sequences(sequences_of(3, 9), RowShape(1, 8))


def test_spans_by_hand() -> None:
    segments = [np.array([0, 0, 1]), np.array([-1, 0]), np.array([], int)]
    spans = make_spans(np.array([5, 20, 7]), segments, width=4)
    assert spans.segment.tolist() == [[0, 0, 1, -1], [-1, 0, -1, -1], [-1] * 4]
    assert spans.start.tolist() == [5, 20, 7]
    assert spans.start.dtype == spans.segment.dtype == np.int32
    places = on_rows.gather(np.arange(30), spans)
    np.testing.assert_array_equal(places, [[5, 6, 7, 0], [0, 21, 0, 0], [0] * 4])


def test_spans_lead_to_their_tokens_in_packed_rows() -> None:
    sequences = sequences_of(5, 3, 7, 4)
    packed, starts = pack_sequences(sequences, RowShape(2, 9))
    # The last two tokens of every sequence.
    firsts = starts + np.array([len(tokens) - 2 for tokens in sequences])
    spans = make_spans(firsts, [np.arange(2)] * 4, width=9)
    gathered = np.asarray(on_rows.gather(packed.tokens, spans))
    for tokens, values in zip(sequences, gathered, strict=True):
        np.testing.assert_array_equal(values[:2], tokens[-2:])
        assert not values[2:].any()


def test_a_span_wider_than_its_room_is_named() -> None:
    with pytest.raises(UserError, match="span of 3 tokens in completion 1, room for 2"):
        make_spans(np.zeros(2, int), [np.arange(2), np.arange(3)], width=2)


def test_spans_lead_to_their_texts(tokenizer: Tokenizer, batch: Batch) -> None:
    student = one_student(batch)
    assert texts(tokenizer, student, student.explanation) == EXPLANATIONS
    assert texts(tokenizer, batch, student.policy_explanation) == EXPLANATIONS
    solutions = texts(tokenizer, student, student.solution)
    assert solutions == [problem.solution for problem in PROBLEMS]
    assert texts(tokenizer, batch, batch.completion) == TEXTS
    assert batch.closed.tolist() == [True, False, True, True, False]
    assert batch.finished.tolist() == [True, False, True, True, False]
    assert not student.overlong.any()


def test_a_batch_is_filled_up_at_no_cost(
    rollout: Rollout, run: Any, batch: Batch
) -> None:
    filled = pack(rollout, run, count=9)
    assert filled.num_micro_batches == batch.num_micro_batches
    E = len(batch.closed)
    student, ours = one_student(filled), one_student(batch)
    for spans, expected in (
        (filled.completion, batch.completion),
        (student.explanation, ours.explanation),
        (student.solution, ours.solution),
    ):
        np.testing.assert_array_equal(spans.start[:E], expected.start)
        np.testing.assert_array_equal(spans.segment[:E], expected.segment)
        assert len(spans.start) == 9
        assert (spans.segment[E:] == -1).all()
    M = len(batch.tokens)
    np.testing.assert_array_equal(filled.tokens[:M], batch.tokens)
    assert not filled.tokens[M:].any()
    assert len(filled.closed) == len(filled.finished) == len(student.overlong) == 9


def test_the_policy_is_trained_on_every_sampled_token(
    batch: Batch, rollout: Rollout
) -> None:
    assert lengths_of(batch.completion) == [len(tokens) for tokens in rollout.tokens]


def test_sampler_log_probs_lie_on_their_tokens(batch: Batch, rollout: Rollout) -> None:
    gathered = np.asarray(on_rows.gather(batch.sampler_log_probs, batch.completion))
    for values, expected in zip(gathered, rollout.log_probs, strict=True):
        np.testing.assert_array_equal(values[: len(expected)], expected)
    outside = ~np.asarray(on_rows.on_tokens(batch.tokens.shape, batch.completion))
    assert not batch.sampler_log_probs[outside].any()
    assert batch.sampler_log_probs.dtype == np.float32


def test_segments_are_tokens_where_both_sequences_agree(batch: Batch) -> None:
    student = one_student(batch)
    ours, theirs = student.explanation.segment, student.policy_explanation.segment
    np.testing.assert_array_equal(ours, theirs)
    counted = np.broadcast_to(np.arange(SHAPE.row_length), ours.shape)
    np.testing.assert_array_equal(ours, np.where(ours >= 0, counted, -1))


def test_shapes_depend_on_the_number_of_completions_alone(
    batch: Batch, run: Run, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("x").ids
    other = pack(rollout_of(tokenizer, PROBLEMS, [ids] * len(PROBLEMS)), run)

    def shapes(batch: Batch) -> Any:
        return jax.tree.map(lambda x: (x.shape, x.dtype), batch)

    assert shapes(batch) == shapes(other)


def test_a_spelt_out_sample_is_aligned_by_segments(
    run: Run, tokenizer: Tokenizer
) -> None:
    # " is" is one token to the student, but was sampled as three.
    spelt = np.concatenate([tokenizer.encode(c).ids for c in ("it", " ", "i", "s")])
    completion = np.append(spelt, tokenizer.encode(f" 7{CLOSING}").ids)
    student = one_student(pack(rollout_of(tokenizer, PROBLEMS[:1], [completion]), run))
    ours, theirs = student.explanation.segment[0], student.policy_explanation.segment[0]
    assert ours[ours >= 0].tolist() == [0, 1, 2, 3]
    assert theirs[theirs >= 0].tolist() == [0, 1, 1, 1, 2, 3]


def test_text_too_long_for_the_student_counts_as_empty(
    run: Run, tokenizer: Tokenizer
) -> None:
    # A stray byte is one token to the teacher and three to the student.
    stray = tokenizer.encode("\u00e9").ids[:1]
    completions = [np.repeat(stray, 30), tokenizer.encode(TEXTS[0]).ids]
    batch = pack(rollout_of(tokenizer, PROBLEMS[:2], completions), run)
    student = one_student(batch)
    assert student.overlong.tolist() == [True, False]
    for spans in (student.explanation, student.policy_explanation):
        assert [length > 0 for length in lengths_of(spans)] == [False, True]
    assert lengths_of(batch.completion)[0] == 30
    assert all(lengths_of(student.solution))


def test_a_policy_sequence_that_is_too_long_is_an_error(
    run: Run, tokenizer: Tokenizer
) -> None:
    completion = np.repeat(tokenizer.encode("7").ids, SHAPE.row_length)
    with pytest.raises(UserError, match="Raise row_length"):
        pack(rollout_of(tokenizer, PROBLEMS[:1], [completion]), run)


def test_student_sequences_are_those_of_distillation(
    run: Run, tokenizer: Tokenizer, rollout: Rollout
) -> None:
    alone = pack(rollout_of(tokenizer, PROBLEMS[:1], rollout.tokens[:1]), run)
    trace = Trace(PROBLEMS[0], EXPLANATIONS[0])
    (example,) = examples.student_examples(run.student_renderers[0], [trace])
    packed = one_student(alone).tokens[0, 0, : len(example.tokens)]
    np.testing.assert_array_equal(packed, example.tokens)


def test_prompts_are_encoded_and_completions_decoded_once(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    counting = CountingTokenizer(tokenizer)
    student = Renderer(counting, tiny, "student")
    run = Run(SHAPE, Renderer(counting, tiny, "teacher"), [student, student])
    problems = [problem for problem in PROBLEMS[:4] for _ in range(8)]
    completions = [
        tokenizer.encode(f"{n} is{CLOSING}<|end|>").ids for n in range(len(problems))
    ]
    pack(rollout_of(counting, problems, completions), run)
    calls = counting.calls
    # A prompt of the teacher and one of the student for each of four problems.
    # Of each renderer also a question that shows how its prompts end.
    assert len(calls["render"]) == (4 + 1) + (4 + 1)
    # The student's are encoded with what follows them.
    prompts = [text for (text,) in calls["encode"]]
    assert len(prompts) == len(set(prompts)) == 4
    prefixes = [prefix for prefix, _ in calls["encode_with_prefix"]]
    assert len(prefixes) == len(set(prefixes)) == 4
    assert [len(turns) for _, turns in calls["encode_with_prefix"]] == [8] * 4
    assert len(calls["decode_with_offsets"]) == 32
    assert "decode" not in calls


def test_students_of_one_tokenizer_share_packed_arrays(
    rollout: Rollout, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: Any) -> tuple[Batch, np.ndarray]:
        calls.append(args)
        return pack_sequences(*args)

    monkeypatch.setattr(rows, "pack_sequences", counted)
    batch = pack(rollout, run._replace(student_renderers=run.student_renderers * 2))
    first, second = map(jax.tree.leaves, batch.students)
    assert len(first) == len(second) > 0
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert len(calls) == 2, "the policy's sequences once, the students' once"


def records(lengths: Sequence[int], seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Record n holds token n + 1 alone and learns about half of its tokens."""
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": np.full(length, n + 1, np.int32),
            "loss_mask": rng.random(length) < 0.5,
        }
        for n, length in enumerate(lengths)
    ]


def numbers(batch: Batch) -> list[int]:
    """Numbers of the records in a batch, from 1."""
    first = (batch.positions == 0) & (batch.segment_ids > 0)
    return batch.tokens[first].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_batches_hold_whole_sequences_once_and_are_well_filled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = records(rng.integers(1, 65, 400))
    stream = grain.MapDataset.source(made)
    batches = list(PackedBatches(stream, SHAPE, num_rows=8))
    assert sorted(n for batch in batches for n in numbers(batch)) == [*range(1, 401)]
    for batch in batches:
        assert batch.tokens.shape == (4, 2, 64)
        for m, b in np.ndindex(4, 2):
            tokens, segment_ids = batch.tokens[m, b], batch.segment_ids[m, b]
            for segment in range(1, segment_ids.max() + 1):
                place = segment_ids == segment
                expected = made[tokens[place][0] - 1]["tokens"]
                np.testing.assert_array_equal(tokens[place], expected)
                positions = batch.positions[m, b][place]
                np.testing.assert_array_equal(positions, np.arange(len(expected)))
                assert np.ptp(np.flatnonzero(place)) == len(expected) - 1
    full = batches[:-1]  # the last has what is left
    fill = np.mean([batch.segment_ids > 0 for batch in full])
    assert fill >= 0.85


def test_every_sequence_is_seen_once_in_each_pass() -> None:
    made = records(np.random.default_rng(0).integers(1, 65, 30))
    stream = grain.MapDataset.source(made).seed(3).shuffle().repeat()
    batches, seen = PackedBatches(stream, SHAPE, num_rows=4), Counter()
    while seen.total() < 5 * len(made):
        seen.update(numbers(next(batches)))
        counts = [seen[n + 1] for n in range(len(made))]
        # What was seen is whole passes and a part of the next.
        assert min(counts) == seen.total() // len(made)
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("num_rows", [2, 4, 16])
def test_batches_until_a_number_of_sequences(num_rows: int) -> None:
    made = records(np.random.default_rng(4).integers(1, 65, 30))
    stream = grain.MapDataset.source(made).seed(3).shuffle().repeat()
    batches = PackedBatches(stream, SHAPE, num_rows)
    ends = [0]  # sequences after so many batches
    while ends[-1] < 100:
        assert batches.get_state() == {"next": ends[-1]}
        ends.append(ends[-1] + len(numbers(next(batches))))
    state = batches.get_state()
    for sequences in (0, 1, 2, 7, 30, 31, 55, 99, 100, ends[1], ends[2], ends[-2]):
        count = batches.count_until(sequences)
        assert ends[count] >= sequences, "all have been seen"
        assert count == 0 or ends[count - 1] < sequences, "and no batch is too many"
    assert batches.get_state() == state
    short = PackedBatches(grain.MapDataset.source(made), SHAPE, num_rows)
    assert short.count_until(1000) == len(list(short))


def test_loss_weights_are_those_of_a_mean_over_learned_tokens() -> None:
    made = records(np.random.default_rng(1).integers(1, 65, 60))
    made[7]["loss_mask"][:] = True
    for batch in PackedBatches(grain.MapDataset.source(made), SHAPE, num_rows=4):
        weights = batch.loss_weights
        assert weights.dtype == np.float32 and weights.shape == batch.tokens.shape
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
        assert len(np.unique(weights[weights > 0])) == 1
        assert not weights[batch.positions == 0].any()
        learned = np.zeros(weights.shape, bool)
        filled = batch.segment_ids > 0
        learned[filled] = [
            made[n - 1]["loss_mask"][t]
            for n, t in zip(batch.tokens[filled], batch.positions[filled], strict=True)
        ]
        np.testing.assert_array_equal(weights > 0, learned & (batch.positions > 0))


def test_a_batch_in_which_no_token_is_learned_has_no_weights() -> None:
    made = [{"tokens": np.ones(3, np.int32), "loss_mask": np.zeros(3, bool)}]
    (batch,) = PackedBatches(grain.MapDataset.source(made), SHAPE, num_rows=2)
    assert not batch.loss_weights.any()


@pytest.mark.parametrize("before", range(5))
def test_batches_depend_on_the_position_alone(before: int) -> None:
    made = records(np.random.default_rng(2).integers(1, 65, 50))
    stream = grain.MapDataset.source(made).seed(1).shuffle().repeat()
    first = PackedBatches(stream, SHAPE, num_rows=4)
    for _ in range(before):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    expected = [next(first) for _ in range(4)]
    second = PackedBatches(stream, SHAPE, num_rows=4)
    for _ in range(2):  # what it did before does not matter
        next(second)
    second.set_state(state)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(second), batch)


def test_sequences_that_fit_in_the_order_of_the_stream_alone_are_packed() -> None:
    # Longest first they need three rows: 4 3, 3 2 2, 2.
    made = records([4, 2, 2, 3, 3, 2])
    stream = grain.MapDataset.source(made)
    (batch,) = PackedBatches(stream, RowShape(2, 8), num_rows=2)
    assert (batch.segment_ids > 0).all()
    first, second = [1] * 4 + [2] * 2 + [3] * 2, [4] * 3 + [5] * 3 + [6] * 2
    assert batch.tokens.tolist() == [[first, second]]


def test_text_beyond_the_context_of_a_student_counts_as_empty(
    run: Run, rollout: Rollout
) -> None:
    whole = one_student(pack(rollout, run))
    assert not whole.overlong.any()
    ends = whole.segment_ids.reshape(-1, SHAPE.row_length)
    longest = max(np.bincount(row[row > 0]).max() for row in ends if row.any())
    short = one_student(pack(rollout, run._replace(student_limit=int(longest) - 1)))
    assert 0 < short.overlong.sum() < len(short.overlong)
    lengths = np.array(lengths_of(short.explanation))
    assert not lengths[np.asarray(short.overlong)].any()


def test_parts_of_a_character_are_compared_by_their_ids() -> None:
    def spelled(*ids: int) -> examples.Example:
        offsets = np.array([[0, 1], [1, 2], [1, 2], [2, 3]], np.int32)
        tokens = np.array(ids, np.int32)
        span = examples.Span(0, 4, offsets)
        return examples.Example(tokens, np.ones(4, bool), span, examples.EMPTY)

    canonical, sampled = spelled(1, 2, 3, 4), spelled(1, 5, 6, 4)
    for student, segments in ((canonical, [0, 1, 2, 3]), (sampled, [0, 1, 1, 2])):
        batch = rows.pack_examples(SHAPE, [canonical], [[student]], np.array([True]))
        student_batch = one_student(batch)
        for span in (student_batch.explanation, student_batch.policy_explanation):
            assert span.segment[0, :4].tolist() == segments
