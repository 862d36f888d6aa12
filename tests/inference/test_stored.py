"""Completions on disk, with an engine that counts what it is asked for."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from rlt_jax.errors import UserError
from rlt_jax.inference import stored
from rlt_jax.inference.layout import Request
from rlt_jax.inference.stored import complete_stored, in_order, roll_out
from rlt_jax.types import Completion

REQUESTS = [Request(np.arange(1, 3 + n, dtype=np.int32), 7 * n, 9) for n in range(6)]
KEY = jax.random.key(0)


def completion_of(request: Request) -> Completion:
    rng = np.random.default_rng(request.request_id)
    tokens = rng.integers(0, 50, 4, np.int32)
    log_probs = np.log(rng.random(4)).astype(np.float32)
    return Completion(tokens, log_probs, bool(request.request_id % 2))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of the requests that were completed; the last of them ends first."""
    ids: list[int] = []

    def complete(
        engine: object, params: object, requests: Sequence[Request], *_: object
    ) -> Iterator[tuple[int, Completion]]:
        for n in reversed(range(len(requests))):
            ids.append(requests[n].request_id)
            yield n, completion_of(requests[n])

    monkeypatch.setattr(stored, "complete", complete)
    return ids


def run(file: Path, requests: Sequence[Request] = REQUESTS) -> Iterator:
    return complete_stored(file, None, None, requests, KEY)


def same(ours: Completion, expected: Completion) -> bool:
    pairs = zip(ours[:2], expected[:2], strict=True)
    equal = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    return equal and ours.finished is expected.finished


def test_completions_come_back_bit_for_bit(tmp_path: Path, asked: list[int]) -> None:
    file = tmp_path / "completions.jsonl"
    first = dict(run(file))
    assert sorted(first) == list(range(6)) and len(asked) == 6
    again = dict(run(file))
    assert len(asked) == 6, "nothing is made twice"
    for n, request in enumerate(REQUESTS):
        assert same(first[n], completion_of(request))
        assert same(again[n], completion_of(request))


def test_only_what_is_missing_is_made(tmp_path: Path, asked: list[int]) -> None:
    whole, file = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    list(run(whole))
    part = run(file)
    assert [next(part)[0] for _ in range(3)] == [5, 4, 3]
    part.close()
    with file.open("a") as lines:
        lines.write('{"request": 14, "prom')  # cut off in writing
    asked.clear()
    resumed = list(run(file))
    assert asked == [14, 7, 0]
    assert [n for n, _ in resumed] == [5, 4, 3, 2, 1, 0]  # what is there comes first
    for n, completion in resumed:
        assert same(completion, completion_of(REQUESTS[n]))
    assert sorted(file.read_text().splitlines()) == sorted(
        whole.read_text().splitlines()
    )


def test_a_completion_is_on_disk_before_it_is_yielded(
    tmp_path: Path, asked: list[int]
) -> None:
    file = tmp_path / "completions.jsonl"
    for count, (n, _) in enumerate(run(file), start=1):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == count and rows[-1]["request"] == REQUESTS[n].request_id


def test_rows_of_other_requests_are_left_alone(
    tmp_path: Path, asked: list[int]
) -> None:
    file = tmp_path / "completions.jsonl"
    list(run(file, REQUESTS[:4]))
    done = dict(run(file, REQUESTS[2:]))
    assert asked == [21, 14, 7, 0, 35, 28]
    assert all(same(done[n], completion_of(REQUESTS[n + 2])) for n in range(4))


@pytest.mark.parametrize(
    "other",
    [
        REQUESTS[3]._replace(prompt=REQUESTS[2].prompt),
        REQUESTS[3]._replace(longest=10),
    ],
)
def test_another_prompt_or_length_is_refused(
    tmp_path: Path, asked: list[int], other: Request
) -> None:
    file = tmp_path / "completions.jsonl"
    list(run(file))
    before = file.read_text()
    with pytest.raises(UserError, match="request 21 has another prompt than this run"):
        list(run(file, [*REQUESTS[:3], other, *REQUESTS[4:]]))
    assert file.read_text() == before


def test_roll_out_keeps_the_order_of_the_requests(
    tmp_path: Path, asked: list[int]
) -> None:
    file = tmp_path / "a" / "folder" / "completions.jsonl"
    for _ in range(2):
        rolled = roll_out(None, None, REQUESTS, KEY, file=file)
        for ours, request in zip(rolled, REQUESTS, strict=True):
            assert same(ours, completion_of(request))
    assert len(asked) == 6
    roll_out(None, None, REQUESTS, KEY)
    assert len(asked) == 12


def test_batches_come_in_order_and_as_soon_as_they_are_whole() -> None:
    given: list[int] = []

    def done() -> Iterator[tuple[int, Completion]]:
        for n in (3, 1, 0, 6, 2, 4, 5):
            given.append(n)
            yield n, Completion(np.array([n], np.int32), np.zeros(1), True)

    seen = [
        ([int(completion.tokens[0]) for completion in batch], len(given))
        for batch in in_order(done(), 2)
    ]
    assert seen == [([0, 1], 3), ([2, 3], 5), ([4, 5], 7), ([6], 7)]
    assert list(in_order(iter([]), 2)) == []
