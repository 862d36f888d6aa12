"""Which request has which slot and which pages: the host's side of generation.

Equal prompts share their pages, which stay until others need them; a request gets pages
of its own as it grows. When no page is left, the youngest request gives its own back and
starts again later, with the same result, as a completion depends on nothing but its
request.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlt_jax.data.stop_texts import StopFinder
from rlt_jax.errors import UserError
from rlt_jax.inference.decode import Refill, Sampled, Slots
from rlt_jax.inference.layout import Layout
from rlt_jax.inference.sampler import Part
from rlt_jax.types import Request, Requests, Rollout


class Prefill(NamedTuple):
    """A prompt that has to be computed: its shard, its ids, and its pages [columns]."""

    shard: int
    tokens: np.ndarray
    pages: np.ndarray


_Name = tuple[int, bytes]  # of a prompt: its shard and its ids


@dataclasses.dataclass
class _Prompt:
    pages: list[int]
    users: int = 0


@dataclasses.dataclass
class _Running:
    index: int
    request: Request
    prompt: _Prompt
    age: int
    pages: list[int]
    reserved: int  # tokens that may have been stored after the steps under way
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    finished: bool = False


class Scheduler:
    """Hands slots and pages to requests, those that may become longest first.

    The slots then empty together: a long one that starts last would have the others wait.

    Args:
      requests: each must fit in the pages of a shard.
      layout: sizes.
      stop_ids: tokens that end a completion.
      find_stop: finds the texts that end a completion; see `stop_finder`.
    """

    def __init__(
        self,
        requests: Requests,
        layout: Layout,
        stop_ids: Sequence[int],
        find_stop: StopFinder | None = None,
    ) -> None:
        self._requests, self._layout = requests, layout
        self._stops, self._find_stop = frozenset(stop_ids), find_stop
        order = sorted(range(len(requests)), key=lambda n: -requests[n].max_new_tokens)
        self._queue = collections.deque(order)
        rows = layout.shards * layout.slots
        self._slots: list[_Running | None] = [None] * rows
        pages = range(layout.pages - 1, 0, -1)
        self._free = [list(pages) for _ in range(layout.shards)]
        self._prompts: dict[_Name, _Prompt] = {}
        self._table = np.zeros((rows, layout.columns), np.int32)
        self._admitted = 0

    @property
    def unfinished(self) -> bool:
        """Whether any request waits or is under way."""
        return bool(self._queue or self._running())

    def plan(self) -> tuple[list[Prefill], Refill, list[_Running | None]]:
        """What to compute next.

        Returns:
          Prompts to prefill, changes of the slots, and who will have which slot.
        """
        B, waiting = len(self._slots), len(self._queue)
        for b in sorted(self._running(), key=lambda b: self._slots[b].age):
            if self._slots[b] is not None:  # not put off by an older one
                self._grow(b)
        put_off = len(self._queue) > waiting
        replaced = np.array([running is None for running in self._slots])
        prefills: list[Prefill] = []
        seen = np.zeros((B, self._layout.seen_size), bool)
        slots = Slots(*np.zeros((5, B), np.int32), np.zeros(B, bool), seen)
        copies = *np.zeros((2, B), np.int32), np.zeros(self._layout.shards, np.int32)
        refill = Refill(replaced, slots, self._table, *copies)
        for b in np.flatnonzero(replaced):
            if self._queue and not put_off:
                self._admit(int(b), prefills, refill)
        return prefills, refill._replace(table=self._table.copy()), list(self._slots)

    def absorb(self, sampled: Sampled, owners: Sequence[_Running | None]) -> Part:
        """Takes the tokens of a dispatch; returns the completions that have ended."""
        done: list[_Running] = []
        for b, running in enumerate(owners):
            if running is None or self._slots[b] is not running:
                continue  # it ended, or was put off, in an earlier dispatch
            count = int(sampled.mask[:, b].sum())
            if not np.isfinite(sampled.log_probs[:count, b]).all():
                raise UserError(
                    f"generation: the logits of request {running.request.request_id} are "
                    "not finite; the weights or the dtype of the model are at fault."
                )
            running.tokens += sampled.tokens[:count, b].tolist()
            running.log_probs += sampled.log_probs[:count, b].tolist()
            if self._ends(running, count):
                self._release(b)
                done.append(running)
        return [running.index for running in done], self._rollout(done)._replace(
            steps_used=int(sampled.mask.sum()),
            steps_computed=int(sampled.mask.any(axis=1).sum()) * sampled.mask.shape[1],
        )

    def under_way(self) -> Rollout:
        """The completions that slots hold, as far as their tokens were taken."""
        return self._rollout([self._slots[b] for b in self._running()])

    def _rollout(self, completions: Sequence[_Running]) -> Rollout:
        return Rollout(
            requests=[running.request for running in completions],
            tokens=[np.array(running.tokens, np.int32) for running in completions],
            log_probs=[np.array(one.log_probs, np.float32) for one in completions],
            finished=np.array([running.finished for running in completions], bool),
        )

    def _running(self) -> list[int]:
        return [b for b, running in enumerate(self._slots) if running is not None]

    def _ends(self, running: _Running, new: int) -> bool:
        """Whether a completion has ended; cuts it after a stop text."""
        tokens = running.tokens
        keep = self._find_stop(tokens, new) if self._find_stop and new else None
        if keep is not None:
            del running.tokens[keep:], running.log_probs[keep:]
        at_stop_id = bool(tokens) and tokens[-1] in self._stops
        running.finished = keep is not None or at_stop_id
        return running.finished or len(tokens) >= running.request.max_new_tokens

    def _admit(self, b: int, prefills: list[Prefill], refill: Refill) -> None:
        """Gives slot b the next request if there are pages for its first steps."""
        layout, index = self._layout, self._queue[0]
        request, shard = self._requests[index], b // layout.slots
        C, free = layout.page_size, self._free[shard]
        stored = len(request.prompt) - 1  # the last token is fed by the first step
        name = (shard, request.prompt.tobytes())
        prompt = self._prompts.get(name)
        of_prompt = -(-stored // C) if prompt is None else 0
        first = min(stored + layout.steps, stored + request.max_new_tokens)
        own = -(-first // C) - stored // C
        if not self._make_room(shard, of_prompt + own, name):
            return
        self._queue.popleft()
        if prompt is None:
            prompt = _Prompt([free.pop() for _ in range(of_prompt)])
            self._prompts[name] = prompt
            if stored:
                pages = self._row(prompt.pages)
                prefills.append(Prefill(shard, request.prompt[:-1], pages))
        prompt.users += 1
        pages = [free.pop() for _ in range(own)]
        if stored % C:
            n = shard * layout.slots + refill.copies[shard]
            refill.source[n], refill.target[n] = prompt.pages[-1], pages[0]
            refill.copies[shard] += 1
        self._slots[b] = _Running(index, request, prompt, self._admitted, pages, first)
        self._admitted += 1
        self._table[b] = self._row(prompt.pages[: stored // C] + pages)
        fresh = refill.slots
        fresh.token[b] = request.prompt[-1]
        fresh.position[b] = stored
        fresh.max_new_tokens[b] = request.max_new_tokens
        fresh.request[b] = request.request_id
        fresh.active[b] = True
        if layout.seen_size:
            fresh.seen[b, request.prompt] = True

    def _grow(self, b: int) -> None:
        """Pages for the next steps of slot b; others, or itself, are put off for them."""
        layout, running = self._layout, self._slots[b]
        stored, shard = len(running.request.prompt) - 1, b // layout.slots
        most = stored + running.request.max_new_tokens
        running.reserved = min(running.reserved + layout.steps, most)
        shared = stored // layout.page_size
        while shared + len(running.pages) < -(-running.reserved // layout.page_size):
            if self._make_room(shard, 1):
                page = self._free[shard].pop()
                self._table[b, shared + len(running.pages)] = page
                running.pages.append(page)
                continue
            mates = [i for i in self._running() if i // layout.slots == shard]
            youngest = max(mates, key=lambda i: self._slots[i].age)
            self._queue.appendleft(self._slots[youngest].index)
            self._release(youngest)
            if youngest == b:
                return

    def _release(self, b: int) -> None:
        running = self._slots[b]
        self._free[b // self._layout.slots] += running.pages
        running.prompt.users -= 1
        self._slots[b] = None
        self._table[b] = 0

    def _make_room(self, shard: int, count: int, keep: _Name | None = None) -> bool:
        """Frees prompts that no slot uses until `count` pages are free; whether they are.

        The prompt named `keep` stays.
        """
        free = self._free[shard]
        for name in list(self._prompts):
            if len(free) >= count:
                break
            if name[0] == shard and name != keep and not self._prompts[name].users:
                free += self._prompts.pop(name).pages
        return len(free) >= count

    def _row(self, pages: list[int]) -> np.ndarray:
        return np.pad(np.array(pages, np.int32), (0, self._layout.columns - len(pages)))
