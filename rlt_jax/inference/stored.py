"""A sampler that keeps completions on disk, and never samples one twice."""

import dataclasses
import itertools
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError, as_user_error
from rlt_jax.inference.sampler import Part, Sampler, decode
from rlt_jax.training import hosts, metrics
from rlt_jax.types import Array, Params, Request, Requests, Rollout

# Types in a record; the numbers in its lists are looked at when they are arrays.
KINDS = {"request": int, "prompt": int, "tokens": list, "log_probs": list}
KINDS |= {"finished": bool}


@dataclasses.dataclass(frozen=True)
class StoredSampler(Sampler):
    """Wraps a sampler: its completions are appended to a JSONL file as they end.

    Completions that the file holds already are read from it, which continues a run that
    was cut off, or replays one.

    Attributes:
      sampler: samples what the file lacks.
      file: of the completions; its folder is made.
      tokenizer: decodes the completions of the file.
      bar: progress bar that shows the tokens sampled per second.
      vocab_size: of the model; token ids of the file are smaller.
    """

    sampler: Sampler
    file: Path
    tokenizer: Tokenizer | None = None
    bar: tqdm.tqdm | None = None
    vocab_size: int = 2**31

    def stream(self, params: Params, requests: Requests, key: Array) -> Iterator[Part]:
        """First the completions that the file holds, then the others as they end.

        Raises:
          UserError: the file is damaged, or holds a completion of another prompt under a
            request's id.
        """
        stored, rollout = self._read(requests)
        if stored:
            yield stored, rollout
        left = sorted(set(range(len(requests))) - set(stored))
        if not left:
            return
        if hosts.is_first():
            self.file.parent.mkdir(parents=True, exist_ok=True)
        began, sampled = time.monotonic(), 0
        missing = [requests[n] for n in left]
        for indices, part in self.sampler.stream(params, missing, key):
            if indices:
                metrics.append_jsonl(self.file, _records(part))
            sampled += sum(map(len, part.tokens))
            if self.bar is not None:
                rate = sampled / (time.monotonic() - began)
                self.bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            yield [left[i] for i in indices], part

    def _read(self, requests: Requests) -> Part:
        """The completions of these requests that the file holds."""
        numbers = {request.request_id: n for n, request in enumerate(requests)}
        found, tokens, log_probs = {}, [], []
        for record in self._records_now():
            n = numbers.get(record["request"])
            if n is None or n in found:
                continue
            if record["prompt"] != _fingerprint(requests[n]):
                raise UserError(
                    f"{self.file}: request {record['request']} has another prompt than "
                    "this run, so the settings differ. Remove the file or name another."
                )
            ids, values = self._arrays(record)
            tokens.append(ids)
            log_probs.append(values)
            found[n] = record["finished"]
        finished = np.array(list(found.values()), bool)
        rollout = Rollout([requests[n] for n in found], tokens, log_probs, finished)
        return list(found), decode(rollout, self.tokenizer)

    def _arrays(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probs of a record, as many of one as of the other."""
        where = f"{self.file}: the completion of request {record['request']} is damaged"
        with as_user_error(f"{where}, remove its line", TypeError, ValueError):
            ids, values = np.array(record["tokens"]), np.array(record["log_probs"])
            if ids.ndim != 1 or ids.shape != values.shape:
                raise ValueError("it needs as many tokens as log-probs")
            if ids.size and not (ids.dtype.kind == "i" and values.dtype.kind in "if"):
                raise TypeError("tokens are integers, log-probs are numbers")
            if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
                raise ValueError(f"the model has the tokens 0 to {self.vocab_size - 1}")
        return ids.astype(np.int32), values.astype(np.float32)

    def _records_now(self) -> list[dict[str, Any]]:
        """What the file holds, in every process; process 0 is about to append to it."""
        number = hosts.from_first(
            lambda: self.file.read_bytes().count(b"\n") if self.file.is_file() else 0
        )
        stream = metrics.stream_jsonl(self.file, KINDS) if number else ()
        records = list(itertools.islice(stream, number))
        hosts.agree_on_items(f"the records of {self.file}", records)
        return records


def _records(part: Rollout) -> list[dict[str, Any]]:
    columns = part.requests, part.tokens, part.log_probs, part.finished
    return [
        {
            "request": request.request_id,
            "prompt": _fingerprint(request),
            "tokens": tokens.tolist(),
            "log_probs": log_probs.tolist(),
            "finished": bool(finished),
        }
        for request, tokens, log_probs, finished in zip(*columns, strict=True)
    ]


def _fingerprint(request: Request) -> int:
    prompt = np.asarray(request.prompt, np.int32)
    return zlib.crc32(prompt.tobytes() + bytes(str(request.max_new_tokens), "ascii"))
