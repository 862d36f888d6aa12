"""Completions on disk, with a sampler that counts what it is asked for."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.inference.sampler import Part, Sampler, join, take
from rlt_jax.inference.stored import StoredSampler
from rlt_jax.types import Params, Request, Rollout

REQUESTS = [Request(np.arange(1, 3 + n, dtype=np.int32), 7 * n, 9) for n in range(6)]
KEY = jax.random.key(0)


def rollout_of(requests: Sequence[Request]) -> Rollout:
    tokens, log_probs = [], []
    for request in requests:
        rng = np.random.default_rng(request.request_id)
        tokens.append(rng.integers(0, 50, 4, np.int32))
        log_probs.append(np.log(rng.random(4)).astype(np.float32))
    finished = np.array([bool(request.request_id % 2) for request in requests])
    return Rollout(requests, tokens, log_probs, finished)


class CountingSampler(Sampler):
    """Streams one completion at a time, that of the last request first."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(
        self, params: Params, requests: Sequence[Request], key: jax.Array
    ) -> Rollout:
        return join(self.stream(params, requests, key))

    def stream(
        self, params: Params, requests: Sequence[Request], key: jax.Array
    ) -> Iterator[Part]:
        for n in reversed(range(len(requests))):
            self.asked.append(requests[n].request_id)
            yield [n], rollout_of([requests[n]])


@pytest.fixture
def sampler() -> CountingSampler:
    return CountingSampler()


def stored(
    sampler: Sampler, file: Path, requests: Sequence[Request] = REQUESTS
) -> Iterator[Part]:
    return StoredSampler(sampler, file).stream(None, requests, KEY)


def assert_same(ours: Rollout, expected: Rollout) -> None:
    for name in ("tokens", "log_probs"):
        pairs = zip(getattr(ours, name), getattr(expected, name), strict=True)
        for a, b in pairs:
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    np.testing.assert_array_equal(ours.finished, expected.finished)
    assert ours.finished.dtype == bool
    assert list(ours.requests) == list(expected.requests)


def test_completions_are_read_back_bit_for_bit(
    tmp_path: Path, sampler: CountingSampler
) -> None:
    file = tmp_path / "completions.jsonl"
    first = join(stored(sampler, file))
    assert len(sampler.asked) == 6
    again = join(stored(sampler, file))
    assert len(sampler.asked) == 6, "a completion was sampled twice"
    assert_same(first, rollout_of(REQUESTS))
    assert_same(again, rollout_of(REQUESTS))


def test_only_what_is_missing_is_sampled(
    tmp_path: Path, sampler: CountingSampler
) -> None:
    whole, file = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    list(stored(sampler, whole))
    part = stored(sampler, file)
    assert [next(part)[0] for _ in range(3)] == [[5], [4], [3]]
    part.close()
    with file.open("a") as lines:
        lines.write('{"request": 14, "prom')  # the process was stopped here
    sampler.asked.clear()
    resumed = list(stored(sampler, file))
    assert sampler.asked == [14, 7, 0]
    # What the file holds comes first.
    assert [n for indices, _ in resumed for n in indices] == [5, 4, 3, 2, 1, 0]
    assert_same(join(resumed), rollout_of(REQUESTS))
    assert sorted(file.read_text().splitlines()) == sorted(
        whole.read_text().splitlines()
    )


def test_a_completion_is_on_disk_before_it_is_yielded(
    tmp_path: Path, sampler: CountingSampler
) -> None:
    file = tmp_path / "completions.jsonl"
    for count, ((n,), _) in enumerate(stored(sampler, file), start=1):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(records) == count
        assert records[-1]["request"] == REQUESTS[n].request_id


def test_records_of_other_requests_are_left_alone(
    tmp_path: Path, sampler: CountingSampler
) -> None:
    file = tmp_path / "completions.jsonl"
    list(stored(sampler, file, REQUESTS[:4]))
    rollout = join(stored(sampler, file, REQUESTS[2:]))
    assert sampler.asked == [21, 14, 7, 0, 35, 28]
    assert_same(rollout, rollout_of(REQUESTS[2:]))


@pytest.mark.parametrize(
    "other",
    [
        REQUESTS[3]._replace(prompt=REQUESTS[2].prompt),
        REQUESTS[3]._replace(max_new_tokens=10),
    ],
)
def test_another_prompt_or_length_is_refused(
    tmp_path: Path, sampler: CountingSampler, other: Request
) -> None:
    file = tmp_path / "completions.jsonl"
    list(stored(sampler, file))
    before = file.read_text()
    with pytest.raises(UserError, match="request 21 has another prompt than this run"):
        list(stored(sampler, file, [*REQUESTS[:3], other, *REQUESTS[4:]]))
    assert file.read_text() == before


def test_generate_keeps_the_order_of_the_requests(
    tmp_path: Path, sampler: CountingSampler
) -> None:
    file = tmp_path / "a" / "folder" / "completions.jsonl"
    for _ in range(2):
        rollout = StoredSampler(sampler, file).generate(None, REQUESTS, KEY)
        assert_same(rollout, rollout_of(REQUESTS))
    assert len(sampler.asked) == 6
    sampler.generate(None, REQUESTS, KEY)
    assert len(sampler.asked) == 12


def test_completions_of_the_file_are_decoded(
    tmp_path: Path, sampler: CountingSampler, tokenizer: Tokenizer
) -> None:
    file = tmp_path / "completions.jsonl"
    list(stored(sampler, file))
    rollout = StoredSampler(sampler, file, tokenizer).generate(None, REQUESTS, KEY)
    stop = tokenizer.stop_ids
    for text, offsets, tokens in zip(
        rollout.texts, rollout.offsets, rollout.tokens, strict=True
    ):
        kept = tokens[:-1] if tokens[-1] in stop else tokens
        assert text == tokenizer.decode(kept)
        assert offsets.shape == (len(tokens), 2)
    assert len(rollout.texts) == 6
    empty = StoredSampler(sampler, tmp_path / "other.jsonl", tokenizer)
    assert_same(empty.generate(None, [], KEY), take(rollout, []))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", "abc"),
        ("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("tokens", [[1], [2]]),
        ("tokens", [[1], 2]),
        ("tokens", [-1]),
        ("tokens", [99_999]),
        ("tokens", [10**30]),
        ("tokens", [1.5]),
        ("log_probs", []),
        ("log_probs", ["x"]),
        ("log_probs", None),
        ("finished", 1),
        ("request", [1]),
        ("prompt", "x"),
    ],
)
def test_damaged_completions_are_refused(
    field: str, value: Any, tmp_path: Path, sampler: CountingSampler
) -> None:
    file = tmp_path / "completions.jsonl"
    list(stored(sampler, file))
    record = json.loads(file.read_text().splitlines()[0])
    record |= {"tokens": [1], "log_probs": [-1.0]} | {field: value}
    file.write_text(json.dumps(record) + "\n")
    again = StoredSampler(sampler, file, vocab_size=512)
    with pytest.raises(UserError, match=r"completions.jsonl.* is damaged"):
        list(again.stream(None, REQUESTS, KEY))
