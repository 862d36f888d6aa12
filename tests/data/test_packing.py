"""Rows into lines of a fixed shape, and the way back."""

import itertools

import numpy as np
import pytest
from rlt_jax.data.packing import first_fit, gather_spans, pack

from rlt_jax.errors import UserError


def rows_of(*lengths: int) -> list[np.ndarray]:
    """Rows of different tokens, none of them 0."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(a, b) + 1 for a, b in itertools.pairwise(ends)]


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
        for (line, start), length in zip(places, lengths, strict=True):
            assert start + length <= 20
            taken[line, start : start + length] += 1
        assert taken.max() == 1
        assert taken.sum() == sum(lengths)
        # Bins are filled from the left and numbered without a gap.
        used = taken.sum(-1)
        assert (used > 0).sum() == 1 + max(line for line, _ in places)
        assert (np.diff(taken, axis=-1) <= 0).all()


def test_packed_rows_can_be_read_back() -> None:
    rng = np.random.default_rng(1)
    rows = rows_of(*rng.integers(1, 13, 11))
    packed, starts = pack(rows, micro_batch_size=3, row_length=12)
    for row, start in zip(rows, starts, strict=True):
        place = slice(start, start + len(row))
        np.testing.assert_array_equal(packed.tokens.reshape(-1)[place], row)
        positions = packed.positions.reshape(-1)[place]
        np.testing.assert_array_equal(positions, np.arange(len(row)))
        assert len(set(packed.segment_ids.reshape(-1)[place].tolist())) == 1
    filled = packed.segment_ids > 0
    assert filled.sum() == sum(map(len, rows))
    np.testing.assert_array_equal(filled, packed.tokens > 0)
    assert not packed.positions[~filled].any()


def test_segments_of_a_line_count_from_one() -> None:
    packed, starts = pack(rows_of(2, 3, 2), micro_batch_size=1, row_length=8)
    # The longest row comes first; numbers follow the order of the rows.
    assert starts.tolist() == [3, 0, 5]
    assert packed.segment_ids[0, 0].tolist() == [2, 2, 2, 1, 1, 3, 3, 0]
    assert packed.positions[0, 0].tolist() == [0, 1, 2, 0, 1, 0, 1, 0]


def test_the_shape_depends_on_the_number_of_rows_alone() -> None:
    short, _ = pack(rows_of(*[1] * 5), micro_batch_size=2, row_length=8)
    long, _ = pack(rows_of(*[8] * 5), micro_batch_size=2, row_length=8)
    assert short.tokens.shape == long.tokens.shape == (3, 2, 8)
    assert short.num_micro_batches == 1
    assert long.num_micro_batches == 3
    for array in short:
        assert array.dtype == np.int32


def test_only_the_counted_micro_batches_hold_anything() -> None:
    rng = np.random.default_rng(2)
    for count in (1, 4, 9):
        packed, _ = pack(rows_of(*rng.integers(1, 9, count)), 2, 8)
        filled = (packed.segment_ids > 0).any((1, 2))
        M = np.arange(len(filled))
        np.testing.assert_array_equal(filled, packed.num_micro_batches > M)


def test_a_row_that_is_too_long_is_named() -> None:
    with pytest.raises(UserError, match="row 1 has 9 tokens, more than row_length=8"):
        pack(rows_of(3, 9), micro_batch_size=1, row_length=8)


def test_gathered_spans_by_hand() -> None:
    segments = [np.array([0, 0, 1]), np.array([-1, 0]), np.array([], int)]
    spans = gather_spans(np.array([5, 20, 7]), segments, width=4)
    np.testing.assert_array_equal(
        spans.mask, [[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    )
    assert spans.index[spans.mask].tolist() == [5, 6, 7, 21]
    assert spans.segment[spans.mask].tolist() == [0, 0, 1, 0]
    assert spans.index.dtype == spans.segment.dtype == np.int32


def test_gathered_spans_find_their_tokens_in_packed_rows() -> None:
    rows = rows_of(5, 3, 7, 4)
    packed, starts = pack(rows, micro_batch_size=2, row_length=9)
    # The last two tokens of every row.
    firsts = starts + np.array([len(row) - 2 for row in rows])
    spans = gather_spans(firsts, [np.arange(2)] * 4, width=9)
    gathered = packed.tokens.reshape(-1)[spans.index]
    for row, values, mask in zip(rows, gathered, spans.mask, strict=True):
        np.testing.assert_array_equal(values[mask], row[-2:])


def test_a_span_wider_than_its_room_is_named() -> None:
    with pytest.raises(UserError, match="span of 3 tokens in completion 1, room for 2"):
        gather_spans(np.zeros(2, int), [np.arange(2), np.arange(3)], width=2)
