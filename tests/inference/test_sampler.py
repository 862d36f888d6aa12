"""The sampler protocol, with a backend that implements nothing but `generate`."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.inference.sampler import (
    Part,
    Sampler,
    decode,
    in_order,
    join,
    take,
)
from rlt_jax.inference.stored import StoredSampler
from rlt_jax.types import Params, Request, Rollout

KEY = jax.random.key(4)
REQUESTS = [Request(np.arange(1, 3 + n, dtype=np.int32), n, 5 + n) for n in range(7)]


class StubSampler(Sampler):
    """A completion repeats the last token of its prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def generate(
        self, params: Params, requests: Sequence[Request], key: jax.Array
    ) -> Rollout:
        self.calls += 1
        counts = [1 + 2 * n.request_id % n.max_new_tokens for n in requests]
        tokens = [
            np.full(count, request.prompt[-1], np.int32)
            for count, request in zip(counts, requests, strict=True)
        ]
        log_probs = [
            -np.arange(1, 1 + count, dtype=np.float32) / (3 + request.request_id)
            for count, request in zip(counts, requests, strict=True)
        ]
        finished = np.array([request.request_id % 3 > 0 for request in requests], bool)
        rollout = Rollout(requests, tokens, log_probs, finished)
        steps = sum(counts)
        return decode(rollout, self.tokenizer)._replace(
            steps_used=steps, steps_computed=2 * steps
        )


@pytest.fixture
def sampler(tokenizer: Tokenizer) -> StubSampler:
    return StubSampler(tokenizer)


@pytest.fixture
def rollout(sampler: StubSampler) -> Rollout:
    return sampler.generate(None, REQUESTS, KEY)


def assert_same(ours: Rollout, expected: Rollout, counts: bool = True) -> None:
    """Equal bits; `counts` also compares the numbers of decode steps."""
    for name in ("tokens", "log_probs", "offsets"):
        pairs = zip(getattr(ours, name), getattr(expected, name), strict=True)
        for a, b in pairs:
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    np.testing.assert_array_equal(ours.finished, expected.finished)
    assert ours.finished.dtype == bool
    assert list(ours.texts) == list(expected.texts)
    assert list(ours.requests) == list(expected.requests)
    if counts:
        assert ours.steps_used == expected.steps_used
        assert ours.steps_computed == expected.steps_computed


def test_the_default_stream_is_one_part(sampler: StubSampler, rollout: Rollout) -> None:
    ((indices, part),) = sampler.stream(None, REQUESTS, KEY)
    assert list(indices) == list(range(7))
    assert_same(part, rollout)


def test_join_restores_the_order_of_the_requests(
    sampler: StubSampler, rollout: Rollout
) -> None:
    parts = [
        (chosen, sampler.generate(None, [REQUESTS[n] for n in chosen], KEY))
        for chosen in ([6, 2], [], [0, 5, 1], [4], [3])
    ]
    assert_same(join(parts), rollout)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_what_is_taken_apart_can_be_joined(rollout: Rollout, size: int) -> None:
    order = np.random.default_rng(size).permutation(7).tolist()
    parts = [order[n : n + size] for n in range(0, 7, size)]
    joined = join((part, take(rollout, part)) for part in parts)
    assert_same(joined, rollout, counts=False)


def test_take_keeps_the_order_of_the_indices(rollout: Rollout) -> None:
    taken = take(rollout, [4, 0, 4])
    assert [request.request_id for request in taken.requests] == [4, 0, 4]
    assert [len(x) for x in taken.tokens] == [len(rollout.tokens[n]) for n in (4, 0, 4)]
    assert not take(rollout, []).tokens


def test_no_requests_are_an_empty_rollout() -> None:
    empty = join([])
    assert not len(empty.tokens) and empty.finished.shape == (0,)
    assert empty.finished.dtype == bool
    assert list(in_order([], 2)) == []


def test_the_stub_can_be_stored(
    tmp_path: Path, sampler: StubSampler, rollout: Rollout, tokenizer: Tokenizer
) -> None:
    stored = StoredSampler(sampler, tmp_path / "completions.jsonl", tokenizer)
    sampler.calls = 0
    # Half of the requests first; the rest is one more call, a replay none.
    assert_same(
        stored.generate(None, REQUESTS[::2], KEY),
        take(rollout, range(0, 7, 2)),
        counts=False,
    )
    assert sampler.calls == 1
    for _ in range(2):
        whole = stored.generate(None, REQUESTS, KEY)
        assert_same(whole, rollout, counts=False)
        assert sampler.calls == 2


def test_the_stub_can_be_read_in_batches(
    tmp_path: Path, sampler: StubSampler, rollout: Rollout, tokenizer: Tokenizer
) -> None:
    file = tmp_path / "completions.jsonl"
    for source in (sampler, StoredSampler(sampler, file, tokenizer)):
        batches = list(in_order(source.stream(None, REQUESTS, KEY), 3))
        assert [len(batch.tokens) for batch in batches] == [3, 3, 1]
        starts = itertools.accumulate([len(b.tokens) for b in batches], initial=0)
        for start, batch in zip(starts, batches, strict=False):
            chosen = range(start, start + len(batch.tokens))
            assert_same(batch, take(rollout, chosen), counts=False)


def test_batches_come_in_order_and_as_soon_as_they_are_complete(
    rollout: Rollout,
) -> None:
    given: list[int] = []

    def parts() -> Iterator[Part]:
        for chosen in ([3], [1, 0], [], [6, 2], [4], [5]):
            given.append(len(chosen))
            yield chosen, take(rollout, chosen)

    seen = [
        ([request.request_id for request in batch.requests], sum(given))
        for batch in in_order(parts(), 2)
    ]
    assert seen == [([0, 1], 3), ([2, 3], 5), ([4, 5], 7), ([6], 7)]
