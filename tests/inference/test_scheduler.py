"""Slots and pages, with a device that samples known tokens."""

import collections
from collections.abc import Sequence

import numpy as np
import pytest

from rlt_jax.inference.decode import Refill, Sampled
from rlt_jax.inference.layout import Layout, check_requests
from rlt_jax.inference.sampler import join
from rlt_jax.inference.scheduler import Prefill, Scheduler
from rlt_jax.types import Request, Rollout

STOP = 1
LAYOUT = Layout(shards=1, slots=4, pages=40, page_size=4, columns=8, steps=3)


class Device:
    """Carries out plans, and fails for pages that it was not given.

    Token t of request r is `100 + 10 r + t`, the last one STOP where the request's length
    is below its maximum. Every page records which tokens of which sequence it holds.
    """

    def __init__(
        self, requests: Sequence[Request], layout: Layout, lengths: Sequence[int]
    ) -> None:
        self.layout, self.requests = layout, {r.request_id: r for r in requests}
        self.lengths = {r.request_id: n for r, n in zip(requests, lengths, strict=True)}
        rows = layout.shards * layout.slots
        self.active = np.zeros(rows, bool)
        self.position, self.num_sampled = np.zeros(rows, int), np.zeros(rows, int)
        self.request, self.max_new_tokens = np.zeros(rows, int), np.zeros(rows, int)
        self.pages: dict[tuple[int, int], list] = {}
        self.prefills: list[Prefill] = []

    def token(self, request: int, t: int) -> int:
        """The token at place t of the prompt and completion of a request."""
        prompt = self.requests[request].prompt
        if t < len(prompt):
            return int(prompt[t])
        n = t - len(prompt)
        ends = n + 1 == self.lengths[request] < self.requests[request].max_new_tokens
        return STOP if ends else 100 + 10 * request + n

    def store(self, shard: int, table: np.ndarray, t: int, token: int) -> None:
        C = self.layout.page_size
        page = (shard, int(table[t // C]))
        assert 0 < page[1] < self.layout.pages, "a token without a page"
        self.pages.setdefault(page, [None] * C)[t % C] = token

    def run(self, prefills: Sequence[Prefill], refill: Refill) -> Sampled:
        layout = self.layout
        self.prefills += prefills
        for one in prefills:
            for t, token in enumerate(one.tokens):
                self.store(one.shard, one.pages, t, int(token))
        copies = (
            refill.source.reshape(layout.shards, -1),
            refill.target.reshape(layout.shards, -1),
        )
        for shard, count in enumerate(refill.copies):
            for old, new in zip(*(x[shard, :count] for x in copies), strict=True):
                self.pages[shard, int(new)] = list(self.pages[shard, int(old)])
        new = refill.slots
        for mine, theirs in (
            (self.active, new.active),
            (self.position, new.position),
            (self.num_sampled, new.num_sampled),
            (self.request, new.request),
            (self.max_new_tokens, new.max_new_tokens),
        ):
            mine[refill.replaced] = theirs[refill.replaced]
        fed = refill.replaced & self.active
        for b in np.flatnonzero(fed):
            assert new.token[b] == self.token(self.request[b], self.position[b])
        self.no_page_is_written_by_two(refill.table)
        steps = [self.step(refill.table) for _ in range(layout.steps)]
        tokens, mask = (np.stack(x) for x in zip(*steps, strict=True))
        return Sampled(tokens, tokens / 1000, mask)

    def no_page_is_written_by_two(self, table: np.ndarray) -> None:
        owners = collections.Counter()
        for b in np.flatnonzero(self.active):
            shard, own = b // self.layout.slots, self.position[b] // 4
            owners.update((shard, p) for p in table[b, own:] if p)
        assert max(owners.values(), default=1) == 1

    def step(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mask, tokens = self.active.copy(), np.zeros(len(self.active), int)
        for b in np.flatnonzero(mask):
            r, at, shard = self.request[b], self.position[b], b // self.layout.slots
            self.store(shard, table[b], at, self.token(r, at))
            held = [
                self.pages[shard, int(table[b, t // 4])][t % 4] for t in range(at + 1)
            ]
            assert held == [self.token(r, t) for t in range(at + 1)]
            tokens[b] = self.token(r, at + 1)
            self.position[b] += 1
            self.num_sampled[b] += 1
            at_limit = self.num_sampled[b] == self.max_new_tokens[b]
            self.active[b] = tokens[b] != STOP and not at_limit
        return tokens, mask


def serve(
    requests: Sequence[Request],
    layout: Layout,
    lengths: Sequence[int] | None = None,
    find_stop: object = None,
) -> tuple[list[int], Rollout, Device, int]:
    """The order in which requests end, their completions, and restarts of requests."""
    check_requests(layout, requests)
    lengths = [r.max_new_tokens for r in requests] if lengths is None else lengths
    device = Device(requests, layout, lengths)
    scheduler = Scheduler(requests, layout, (STOP,), find_stop)
    parts, under_way, starts = [], None, 0
    for _ in range(10_000):
        if not scheduler.unfinished:
            break
        prefills, refill, owners = scheduler.plan()
        starts += int(refill.slots.active.sum())
        drawn = device.run(prefills, refill)
        pages_add_up(scheduler, layout)
        if under_way is not None:  # results come a dispatch later
            parts.append(scheduler.absorb(*under_way))
        under_way = drawn, owners
    assert not scheduler.unfinished
    pages_add_up(scheduler, layout)
    assert not any(prompt.users for prompt in scheduler._prompts.values())
    assert not scheduler._running() and not scheduler._table.any()
    ended = [n for indices, _ in parts for n in indices]
    assert sorted(ended) == list(range(len(requests)))
    rollout = join(parts)
    assert list(rollout.requests) == list(requests)
    return ended, rollout, device, starts - len(requests)


def pages_add_up(scheduler: Scheduler, layout: Layout) -> None:
    """Every page but 0 is free, of one prompt, or of one request, never two."""
    for shard in range(layout.shards):
        pages = list(scheduler._free[shard])
        for (at, _), prompt in scheduler._prompts.items():
            pages += prompt.pages if at == shard else []
        for running in scheduler._slots[shard * layout.slots :][: layout.slots]:
            pages += running.pages if running is not None else []
        assert sorted(pages) == list(range(1, layout.pages))


def request(
    n: int, length: int, max_new_tokens: int, prompt: int | None = None
) -> Request:
    start = 10 * (n if prompt is None else prompt)
    tokens = np.arange(start, start + length, dtype=np.int32) + 2
    return Request(tokens, n, max_new_tokens)


def expected(requests: Sequence[Request], lengths: Sequence[int], n: int) -> list[int]:
    r, length = requests[n], min(lengths[n], requests[n].max_new_tokens)
    tokens = [100 + 10 * r.request_id + t for t in range(length)]
    return tokens[:-1] + [STOP] if length < r.max_new_tokens else tokens


def test_every_request_gets_its_tokens() -> None:
    requests = [request(n, 1 + n % 7, 1 + (5 * n) % 11) for n in range(13)]
    lengths = [1 + n % 5 for n in range(13)]
    _, rollout, _, put_off = serve(requests, LAYOUT, lengths)
    assert put_off == 0
    for n, tokens in enumerate(rollout.tokens):
        assert tokens.tolist() == expected(requests, lengths, n)
        assert rollout.finished[n] == (lengths[n] < requests[n].max_new_tokens)
        assert tokens.dtype == np.int32
        np.testing.assert_allclose(rollout.log_probs[n], tokens / 1000)


def test_a_short_request_makes_room_at_once() -> None:
    # Five requests in four slots: the shortest starts when the next shortest has ended.
    requests = [request(n, 3, most) for n, most in enumerate((20, 2, 20, 20, 4))]
    ended, _, _, _ = serve(requests, LAYOUT)
    assert ended == [4, 1, 0, 2, 3]


def test_equal_prompts_are_computed_once_and_kept_once() -> None:
    layout = LAYOUT._replace(slots=8, pages=60)
    requests = [request(n, 10, 3, prompt=n // 4) for n in range(8)]
    scheduler = Scheduler(requests, layout, (STOP,))
    prefills, refill, owners = scheduler.plan()
    assert [one.tokens.tolist() for one in prefills] == [
        requests[n].prompt[:9].tolist() for n in (0, 4)
    ]
    # Nine tokens a prompt: two full pages are shared, the third is copied.
    table = refill.table
    assert (table[:4, :2] == table[0, :2]).all()
    assert (table[4:, :2] == table[4, :2]).all()
    assert len(set(table[:, 2])) == 8 and refill.copies.tolist() == [8]
    assert refill.source.tolist() == [prefills[n // 4].pages[2] for n in range(8)]
    np.testing.assert_array_equal(refill.target, table[:, 2])
    assert len(scheduler._free[0]) == layout.pages - 1 - 2 * 3 - 8
    _, _, device, _ = serve(requests, layout)
    assert len(device.prefills) == 2
    assert owners.count(None) == 0


def test_a_prompt_stays_until_its_pages_are_needed() -> None:
    requests = [request(n, 9, 8 - n, prompt=n % 2) for n in range(8)]
    layout = LAYOUT._replace(slots=1, pages=2 * 2 + 3)
    _, _, device, _ = serve(requests, layout)
    assert len(device.prefills) == 2
    _, _, device, _ = serve(requests, layout._replace(pages=2 + 3))
    assert len(device.prefills) == 8


def test_a_prompt_of_full_pages_needs_no_copy() -> None:
    requests = [request(n, 9, 2, prompt=0) for n in range(3)]  # eight are stored
    _, refill, _ = Scheduler(requests, LAYOUT, (STOP,)).plan()
    assert refill.copies.tolist() == [0]
    assert len(set(refill.table[:3, 2])) == 3


def test_a_prompt_of_one_token_has_nothing_to_compute() -> None:
    requests = [request(n, 1, 5) for n in range(6)]
    ended, _, device, _ = serve(requests, LAYOUT)
    assert not device.prefills and len(ended) == 6


def test_the_youngest_is_put_off_and_comes_first_again() -> None:
    # Six pages for three requests that need three each in the end.
    layout = LAYOUT._replace(pages=7, steps=4)
    requests = [request(n, 1, 12) for n in range(4)]
    scheduler = Scheduler(requests, layout, (STOP,))
    _, _, owners = scheduler.plan()
    assert [o and o.index for o in owners] == [0, 1, 2, 3]  # a page each
    _, refill, owners = scheduler.plan()
    # The two pages left are for 0 and 1; 3 makes room for 2.
    assert [o and o.index for o in owners] == [0, 1, 2, None]
    assert refill.replaced.tolist() == [False, False, False, True]
    assert not refill.slots.active.any() and not refill.table[3].any()
    _, _, owners = scheduler.plan()
    assert [o and o.index for o in owners] == [0, 1, None, None]
    assert list(scheduler._queue) == [2, 3]
    ended, _, _, put_off = serve(requests, layout)
    assert put_off >= 2
    assert ended == [0, 1, 2, 3]


def test_tokens_sampled_before_a_request_was_put_off_are_discarded() -> None:
    layout = LAYOUT._replace(pages=7, steps=4)
    requests = [request(n, 1, 12) for n in range(4)]
    _, rollout, _, _ = serve(requests, layout)
    for n, tokens in enumerate(rollout.tokens):
        assert tokens.tolist() == expected(requests, [12] * 4, n)


def test_shards_have_pages_and_prompts_of_their_own() -> None:
    layout = LAYOUT._replace(shards=2, slots=2, pages=20)
    requests = [request(n, 6, 4, prompt=0) for n in range(4)]
    prefills, refill, _ = Scheduler(requests, layout, (STOP,)).plan()
    assert [one.shard for one in prefills] == [0, 1]
    np.testing.assert_array_equal(refill.table[:2], refill.table[2:])
    assert refill.copies.tolist() == [2, 2]
    ended, _, _, _ = serve(requests, layout)
    assert len(ended) == 4


def test_a_stop_text_ends_a_request_while_the_device_continues() -> None:
    def third(tokens: list[int], new: int) -> int | None:
        return 3 if len(tokens) - new < 3 <= len(tokens) else None

    requests = [request(n, 2, most) for n, most in enumerate((20, 2, 3, 20, 20))]
    _, rollout, _, _ = serve(requests, LAYOUT, find_stop=third)
    assert list(map(len, rollout.tokens)) == [3, 2, 3, 3, 3]
    assert list(map(len, rollout.log_probs)) == [3, 2, 3, 3, 3]
    assert rollout.finished.tolist() == [True, False, True, True, True]


def test_seen_marks_the_prompt() -> None:
    layout = LAYOUT._replace(seen_size=40)
    _, refill, _ = Scheduler([request(1, 3, 2)], layout, (STOP,)).plan()
    assert np.flatnonzero(refill.slots.seen[0]).tolist() == [12, 13, 14]
    assert not refill.slots.seen[1:].any()


def test_nothing_to_do() -> None:
    scheduler = Scheduler([], LAYOUT, (STOP,))
    assert not scheduler.unfinished
    prefills, refill, owners = scheduler.plan()
    assert not prefills and not refill.slots.active.any() and not any(owners)


@pytest.mark.parametrize("seed", range(30))
def test_any_requests_in_any_sizes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 30))
    requests = [
        request(n, *rng.integers(1, (14, 15)), prompt=int(rng.integers(0, 6)))
        for n in range(count)
    ]
    lengths = rng.integers(1, 20, count).tolist()
    worst = 4 + 7  # pages of the largest prompt and completion
    layout = Layout(
        shards=int(rng.integers(1, 4)),
        slots=int(rng.integers(1, 7)),
        pages=1 + worst + int(rng.integers(0, 12)),
        page_size=4,
        columns=7,
        steps=int(rng.integers(1, 9)),
    )
    _, rollout, _, _ = serve(requests, layout, lengths)
    for n, tokens in enumerate(rollout.tokens):
        assert tokens.tolist() == expected(requests, lengths, n)


def test_the_random_requests_are_put_off_sometimes() -> None:
    layout = LAYOUT._replace(pages=12, slots=6, columns=7)
    rng = np.random.default_rng(0)
    requests = [request(n, *rng.integers(1, (14, 15))) for n in range(20)]
    _, _, _, put_off = serve(requests, layout)
    assert put_off > 3
