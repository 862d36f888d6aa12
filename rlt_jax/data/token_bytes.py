"""What token ids stand for: their bytes, the text of these, and its characters."""

import codecs
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

Decoded = tuple[str, np.ndarray]  # a text, and int32 [T, 2]: the characters of each id


class Encoding(NamedTuple):
    """Token ids and the characters each came from.

    Attributes:
      ids: [T] int32.
      offsets: [T, 2] int32, half-open character ranges of the encoded string. Tokens
        that each hold a part of one character all name that whole character.
    """

    ids: np.ndarray
    offsets: np.ndarray


class TokenBytes:
    """The bytes of every id of a tokenizer.

    Args:
      pieces: bytes of each id from 0 on; b"" for an id that stands for nothing.
      byte_ids: ids that stand for one byte each, in a tokenizer that spells rare
        characters with such ids; () for one that works on bytes throughout.
      whole_runs: one invalid byte makes all bytes of its run of `byte_ids` invalid, as in
        the Hugging Face library; otherwise only the invalid ones, as in SentencePiece.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        byte_ids: Collection[int] = (),
        whole_runs: bool = False,
    ) -> None:
        self.pieces = list(pieces)
        self._pieces = [*pieces, b""]  # the last stands for ids beyond the vocabulary
        self._lengths = np.array([len(piece) for piece in self._pieces], np.int64)
        self._is_byte = np.isin(np.arange(len(self._pieces)), list(byte_ids))
        self._whole_runs = whole_runs

    def decode(self, ids: np.ndarray) -> Decoded:
        """Text of ids [T], and the characters that each stands for.

        Bytes that are not UTF-8 become U+FFFD as in the tokenizer's own library: one for
        every byte of `byte_ids`, else one for the longest beginning of a character.

        Returns:
          The text, and int32 offsets [T, 2].
        """
        ids = np.minimum(np.asarray(ids, np.int64), len(self._pieces) - 1)
        data = b"".join([self._pieces[i] for i in ids.tolist()])
        try:
            text, char_of_byte = data.decode("utf-8"), _chars_of_bytes(data)
        except UnicodeDecodeError:
            text, widths = _decode_invalid(*self._separated(ids))
            char_of_byte = np.repeat(np.arange(len(text)), widths)
        return text, self._offsets(ids, np.append(char_of_byte, len(text)))

    def encoding(self, text: str, ids: np.ndarray, given: np.ndarray) -> Encoding:
        """Encoding with offsets that follow from the bytes of the ids.

        Args:
          text: what was encoded.
          ids: [T] int32.
          given: [T, 2] int32 offsets by the tokenizer's library, which are used where the
            bytes are not the text: the tokenizer has changed it.
        """
        own = self.offsets_in(text, ids)
        if own is None:
            own, last = given, 0
            for (start, end), run in itertools.groupby(map(tuple, given.tolist())):
                first, last = last, last + len(list(run))
                # The library may give several characters to all tokens of their bytes.
                if last - first > 1 and end - start > 1:
                    part = self.offsets_in(text[start:end], ids[first:last])
                    if part is not None:
                        own[first:last] = part + start
        return Encoding(ids, own)

    def offsets_in(self, text: str, ids: np.ndarray) -> np.ndarray | None:
        """Offsets [T, 2] int32 of ids in the text; None if their bytes are another text."""
        data = text.encode("utf-8", "surrogatepass")
        if b"".join([self._pieces[i] for i in ids.tolist()]) != data:
            return None
        return self._offsets(ids, np.append(_chars_of_bytes(data), len(text)))

    def _offsets(self, ids: np.ndarray, char_of_byte: np.ndarray) -> np.ndarray:
        ends = np.cumsum(self._lengths[ids])
        starts = ends - self._lengths[ids]
        start = char_of_byte[starts]
        last = char_of_byte[np.maximum(ends - 1, starts)]
        end = np.where(ends > starts, last + 1, start)
        return np.stack([start, end], axis=-1).astype(np.int32)

    def _separated(self, ids: np.ndarray) -> tuple[bytes, np.ndarray]:
        """The bytes, and for each whether it is of `byte_ids`.

        In a run that is invalid as a whole each byte is made invalid by itself.
        """
        is_byte = self._is_byte[ids]
        parts = [self._pieces[i] for i in ids.tolist()]
        if self._whole_runs:
            present = np.flatnonzero(self._lengths[ids]).tolist()
            runs = itertools.groupby(present, is_byte.__getitem__)
            for run in [list(run) for of_bytes, run in runs if of_bytes]:
                try:
                    b"".join([parts[i] for i in run]).decode("utf-8")
                except UnicodeDecodeError:
                    for i in run:
                        parts[i] = b"\xff"
        return b"".join(parts), np.repeat(is_byte, self._lengths[ids])


def _chars_of_bytes(data: bytes) -> np.ndarray:
    """[bytes] the character that each byte of UTF-8 belongs to."""
    return np.cumsum((np.frombuffer(data, np.uint8) & 0xC0) != 0x80) - 1


def _decode_invalid(data: bytes, single: np.ndarray) -> tuple[str, list[int]]:
    """Text of bytes that are not UTF-8, and the number of bytes of every character.

    Args:
      data: the bytes.
      single: [bytes] bool, bytes that become a U+FFFD each where they are invalid.
    """
    texts, widths, start = [], [], 0
    while start < len(data):
        part, bad = data[start : start + 4096], 0  # an error has a copy of it
        try:
            text, _ = codecs.utf_8_decode(part, "strict", start + 4096 >= len(data))
        except UnicodeDecodeError as error:
            text = data[start : start + error.start].decode("utf-8")
            bad = error.end - error.start
        sizes = [len(char.encode("utf-8")) for char in text]
        start += sum(sizes)
        if bad:
            sizes += [1] * bad if single[start] else [bad]
        texts.append(text + "\ufffd" * (len(sizes) - len(text)))
        widths += sizes
        start += bad
    return "".join(texts), widths


def concatenate(parts: Sequence[Encoding], lengths: Iterable[int]) -> Encoding:
    """Encoding of a text from those of its parts; lengths are in characters."""
    starts = itertools.accumulate(lengths, initial=0)
    offsets = [part.offsets + np.int32(start) for part, start in zip(parts, starts)]
    ids = np.concatenate([part.ids for part in parts])
    return Encoding(ids, np.concatenate(offsets))
