"""Several rows in one: first-fit packing into micro-batches of a fixed shape."""

from collections.abc import Sequence

import numpy as np

from rlt_jax.errors import UserError
from rlt_jax.types import PackedRows, TokenSpans


def first_fit(lengths: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """Places items into bins of `capacity`, longest first.

    Returns:
      (bin, offset) for each item, in the order given.
    """
    used: list[int] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        for number, filled in enumerate(used):
            if filled + length <= capacity:
                break
        else:
            number, filled = len(used), 0
            used.append(0)
        places[item] = (number, filled)
        used[number] = filled + length
    return places


def pack(
    rows: Sequence[np.ndarray], micro_batch_size: int, row_length: int
) -> tuple[PackedRows, np.ndarray]:
    """Packs rows into [M, B, T], M large enough for one row a line.

    The shape depends on the number of rows only, not on their lengths, so a program
    compiled for it is never compiled again; `num_micro_batches` says how many of the M
    hold anything.

    Args:
      rows: token ids, [t] each with t <= row_length.
      micro_batch_size: B, lines per micro-batch.
      row_length: T, tokens per line.

    Returns:
      The packed rows, and for each row the index of its first token in the flattened
      [M * B * T] arrays, int32.

    Raises:
      UserError: a row is longer than row_length.
    """
    lengths = [len(row) for row in rows]
    if max(lengths, default=0) > row_length:
        raise UserError(
            f"packing: row {int(np.argmax(lengths))} has {max(lengths)} tokens, more "
            f"than row_length={row_length}. Raise row_length."
        )
    M = -(-len(rows) // micro_batch_size)
    lines = M * micro_batch_size
    tokens = np.zeros((lines, row_length), np.int32)
    segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    places = first_fit(lengths, row_length)
    for row, (line, start) in zip(rows, places, strict=True):
        end = start + len(row)
        tokens[line, start:end] = row
        segment_ids[line, start:end] = segment_ids[line].max() + 1
        positions[line, start:end] = np.arange(len(row))
    used = 1 + max((line for line, _ in places), default=-1)
    shape = (M, micro_batch_size, row_length)
    packed = PackedRows(
        tokens.reshape(shape),
        segment_ids.reshape(shape),
        positions.reshape(shape),
        np.int32(-(-used // micro_batch_size)),
    )
    starts = [line * row_length + start for line, start in places]
    return packed, np.array(starts, np.int32)


def gather_spans(
    starts: np.ndarray, segments: Sequence[np.ndarray], width: int
) -> TokenSpans:
    """Indices that gather one span per completion from packed per-token arrays.

    Args:
      starts: [N] flat index of the first token of each span.
      segments: for each span the segment of each of its tokens, -1 to leave one out.
      width: T of the result.

    Returns:
      Index, segment and mask, [N, width] each.
    """
    shape = (len(segments), width)
    index = np.zeros(shape, np.int32)
    segment = np.zeros(shape, np.int32)
    mask = np.zeros(shape, bool)
    for n, (start, numbers) in enumerate(zip(starts, segments, strict=True)):
        if len(numbers) > width:
            raise UserError(
                f"span of {len(numbers)} tokens in completion {n}, room for {width}."
            )
        t = len(numbers)
        index[n, :t] = start + np.arange(t)
        segment[n, :t] = np.maximum(numbers, 0)
        mask[n, :t] = numbers >= 0
    return TokenSpans(index, segment, mask)


def on_spans(
    values: Sequence[np.ndarray], spans: TokenSpans, shape: tuple[int, ...]
) -> np.ndarray:
    """Lays values [t] of each span on its tokens: float32 of `shape` [M, B, T], else 0."""
    flat = np.zeros(shape, np.float32).reshape(-1)
    for index, mask, row in zip(spans.index, spans.mask, values, strict=True):
        flat[index[mask]] = row[: mask.sum()]
    return flat.reshape(shape)
