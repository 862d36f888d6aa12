"""What samples completions: a small protocol that every backend implements."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from rlt_jax.data.examples import decode_completion
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.types import Array, Params, Requests, Rollout

Part = tuple[Sequence[int], Rollout]  # indices of requests, and their completions

_LISTS = ("requests", "tokens", "log_probs", "texts", "offsets")


class Sampler(Protocol):
    """A sampling backend; `Engine` is the one that ships.

    A backend defines `generate` or `stream`; each has the other as its default.
    """

    def generate(self, params: Params, requests: Requests, key: Array) -> Rollout:
        """Samples a completion of every request, in the order of the requests.

        Args:
          params: of the policy.
          requests: prompts with their limits.
          key: PRNG key; a completion depends on it, its request and the parameters alone.
        """
        return join(self.stream(params, requests, key))

    def stream(self, params: Params, requests: Requests, key: Array) -> Iterator[Part]:
        """The same in parts, each as soon as it is complete; by default in one part."""
        yield range(len(requests)), self.generate(params, requests, key)


def decode(rollout: Rollout, tokenizer: Tokenizer | None) -> Rollout:
    """The rollout with the texts of its completions, and the offsets of their tokens.

    Without a tokenizer it is unchanged.
    """
    if tokenizer is None:
        return rollout
    decoded = [decode_completion(tokenizer, tokens) for tokens in rollout.tokens]
    return rollout._replace(
        texts=[text for text, _ in decoded], offsets=[offsets for _, offsets in decoded]
    )


def join(parts: Iterable[Part]) -> Rollout:
    """One rollout from parts that together hold every request once, in their order."""
    parts = list(parts)
    rollouts = [rollout for _, rollout in parts]
    merged = Rollout(
        **{name: [x for r in rollouts for x in getattr(r, name)] for name in _LISTS},
        finished=np.array([x for r in rollouts for x in r.finished], bool),
        steps_used=sum(rollout.steps_used for rollout in rollouts),
        steps_computed=sum(rollout.steps_computed for rollout in rollouts),
    )
    return take(merged, np.argsort([n for numbers, _ in parts for n in numbers]))


def take(rollout: Rollout, chosen: Sequence[int]) -> Rollout:
    """Some completions of a rollout, in the order of the indices."""
    values = {name: getattr(rollout, name) for name in _LISTS}
    return rollout._replace(
        finished=rollout.finished[list(chosen)],
        **{name: [x[i] for i in chosen] if x else x for name, x in values.items()},
    )


def in_order(parts: Iterable[Part], batch_size: int) -> Iterator[Rollout]:
    """Rollouts of consecutive requests, each as soon as it is complete."""
    waiting: dict[int, Rollout] = {}  # each completion by itself
    first = 0

    def batch(numbers: Sequence[int]) -> Rollout:
        return join(([n], waiting.pop(n)) for n in numbers)

    for indices, rollout in parts:
        waiting |= {n: take(rollout, [i]) for i, n in enumerate(indices)}
        while all(first + i in waiting for i in range(batch_size)):
            yield batch(range(first, first + batch_size))
            first += batch_size
    if waiting:
        yield batch(sorted(waiting))
