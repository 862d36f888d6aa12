"""Between packed rows and spans, by hand."""

import numpy as np

from rlt_jax.inference import spans
from rlt_jax.types import Spans

# Three examples with spans of two, two and no tokens; the second token of the second
# belongs to no segment.
SPANS = Spans(
    start=np.array([1, 5, 0], np.int32),
    segment=np.array([[0, 0], [1, -1], [-1, -1]], np.int32),
)
MASK = [[True, True], [True, False], [False, False]]


def test_mask_marks_the_tokens_of_segments() -> None:
    np.testing.assert_array_equal(spans.mask(SPANS), MASK)


def test_gather_reads_the_tokens_of_spans() -> None:
    per_token = np.arange(8.0).reshape(2, 1, 4)
    gathered = spans.gather(per_token, SPANS)
    np.testing.assert_array_equal(gathered, [[1, 2], [5, 0], [0, 0]])


def test_segments_add_up() -> None:
    values = np.array([[1.0, 2.0], [5.0, np.nan], [np.nan, np.nan]])
    sums = spans.segment_sums(values, SPANS)
    np.testing.assert_array_equal(sums, [[3, 0], [0, 5], [0, 0]])
    np.testing.assert_array_equal(spans.segment_mask(SPANS), [[1, 0], [0, 1], [0, 0]])


def test_scatter_is_the_inverse_of_gather() -> None:
    scattered = spans.scatter(np.array([7, 8, 9], np.float32), SPANS, (2, 1, 4))
    np.testing.assert_array_equal(scattered.reshape(-1), [0, 7, 7, 0, 0, 8, 0, 0])
    each = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    scattered = spans.scatter(each, SPANS, (2, 1, 4))
    np.testing.assert_array_equal(spans.gather(scattered, SPANS), each * MASK)


def test_tokens_of_any_span_are_marked() -> None:
    other = Spans(np.array([6], np.int32), np.array([[0]], np.int32))
    marked = spans.on_tokens((2, 1, 4), SPANS, None, other)
    np.testing.assert_array_equal(marked.reshape(-1), [0, 1, 1, 0, 0, 1, 1, 0])
    assert not spans.on_tokens((2, 1, 4), None).any()
