"""The two kinds of tokenizer files: ids and offsets of a text, bytes of an id."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import tokenizers


class Encoding(NamedTuple):
    """Token ids and the characters each came from.

    Attributes:
      ids: [T] int32.
      offsets: [T, 2] int32, half-open character ranges of the encoded string. Tokens
        that each hold a part of one character all name that whole character.
    """

    ids: np.ndarray
    offsets: np.ndarray


class SentencePieceCodec:
    """A SentencePiece `tokenizer.model`.

    Attributes:
      added: text of every control piece by its id.
      separators: those at whose end a text can be split: text after them is encoded
        independently of the text before.
    """

    def __init__(self, file: Path) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        ids = range(self.size())
        self._is_byte = np.array([self._model.is_byte(i) for i in ids], bool)
        self.added = {
            i: self._model.id_to_piece(i) for i in ids if self._model.is_control(i)
        }
        self.separators = self.added
        longest_first = sorted(self.added.values(), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._control = re.compile(f"({pattern})")

    def encode(self, text: str) -> Encoding:
        """Ids and character offsets of the text; no special tokens are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """The same as `encode` of every text, on several threads."""
        # SentencePiece never makes control pieces such as </s> from text.
        split = [self._control.split(text) for text in texts]
        between = [part for parts in split for part in parts[::2]]
        encoded = iter(self._model.encode(between, return_type="offset_mapping"))
        return [self._join(parts, encoded) for parts in split]

    def _join(self, parts: list[str], encoded: Iterator[dict]) -> Encoding:
        """Encoding of the text that the parts make; every other part is a control."""
        encodings = [
            self._to_encoding(self._encode_control(part) if n % 2 else next(encoded))
            for n, part in enumerate(parts)
        ]
        return concatenate(encodings, map(len, parts))

    def _encode_control(self, piece: str) -> dict:
        return {"ids": [self._model.piece_to_id(piece)], "offsets": [(0, len(piece))]}

    def _to_encoding(self, encoded: dict) -> Encoding:
        ids = np.array(encoded["ids"], np.int32)
        offsets = _to_offsets(encoded["offsets"])
        # SentencePiece gives all of a character that fell apart into byte tokens to the
        # last of them.
        empty = offsets[:, 0] == offsets[:, 1]
        offsets[:, 1] += empty & self._is_byte[ids]
        return Encoding(ids, offsets)

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that an id in [0, id_limit) stands for, or a part of a character."""
        piece = self._model.id_to_piece(token)
        if token in self.added:
            return piece.encode("utf-8")
        if self._is_byte[token]:
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("\u2581", " ").encode("utf-8")

    def token_id(self, token: str) -> int | None:
        """Id of a token's text; None if it is not in the vocabulary."""
        token_id = self._model.piece_to_id(token)
        return None if token_id == self._model.unk_id() else token_id

    def size(self) -> int:
        """Number of ids, which have no gaps; none was added to the file's own."""
        return self._model.get_piece_size()

    base_size = id_limit = size


class FastCodec:
    """A Hugging Face `tokenizer.json`.

    Attributes:
      added: text of every added token by its id.
      separators: those at whose end a text can be split: text after them is encoded
        independently of the text before.
    """

    def __init__(self, file: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        # The file may hold the settings of whoever saved it last.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.added = {token_id: token.content for token_id, token in added.items()}
        spec = json.loads(file.read_text(encoding="utf-8"))
        self.separators = _separators(spec, added)
        decoders = _components(spec.get("decoder"), "decoders")
        self._byte_level = any(part["type"] == "ByteLevel" for part in decoders)

    def encode(self, text: str) -> Encoding:
        """Ids and character offsets of the text; no special tokens are added."""
        return self._to_encoding(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """The same as `encode` of every text, on several threads."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [self._to_encoding(encoding) for encoding in encoded]

    def _to_encoding(self, encoding: tokenizers.Encoding) -> Encoding:
        ids = np.array(encoding.ids, np.int32)
        return Encoding(ids, _to_offsets(encoding.offsets))

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that an id in [0, id_limit) stands for, or a part of a character."""
        if token in self.added:
            return self.added[token].encode("utf-8")
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            values = [_BYTE_OF_CHAR.get(char) for char in piece]
            # A piece outside the byte alphabet stands for itself, as in the library.
            return piece.encode("utf-8") if None in values else bytes(values)
        if _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("\u2581", " ").encode("utf-8")

    def token_id(self, token: str) -> int | None:
        """Id of a token's text; None if it is not in the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def size(self) -> int:
        """Number of ids."""
        return self._tokenizer.get_vocab_size()

    def base_size(self) -> int:
        """Number of ids without added tokens."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def id_limit(self) -> int:
        """One more than the largest id; ids may have gaps."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1


# Pre-tokenizers that treat a part of a text the same wherever it is. (Metaspace does
# unless it adds a space to the first part only.)
_LOCAL_PRE_TOKENIZERS = {
    "BertPreTokenizer",
    "ByteLevel",
    "CharDelimiterSplit",
    "Digits",
    "FixedLength",
    "Metaspace",
    "Punctuation",
    "Split",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
}
# Those that change nothing without special tokens, unless they trim offsets.
_LOCAL_POST_PROCESSORS = {
    "BertProcessing",
    "ByteLevel",
    "RobertaProcessing",
    "TemplateProcessing",
}


def _separators(spec: dict, added: dict[int, tokenizers.AddedToken]) -> dict[int, str]:
    """Added tokens at which the library splits a text before anything else.

    The parts are then normalized, pre-tokenized and encoded one by one. Tokens that are
    looked for after normalization separate only a text that is not normalized. There
    are no separators if a token's match depends on its neighbors, or a part's encoding
    on its place in the text.
    """
    if any(t.lstrip or t.rstrip or t.single_word for t in added.values()):
        return {}
    for part in _components(spec.get("pre_tokenizer"), "pretokenizers"):
        first_only = part.get("prepend_scheme") == "first"
        if part["type"] not in _LOCAL_PRE_TOKENIZERS or first_only:
            return {}
    for part in _components(spec.get("post_processor"), "processors"):
        if part["type"] not in _LOCAL_POST_PROCESSORS or part.get("trim_offsets"):
            return {}
    normalizes = bool(_components(spec.get("normalizer"), "normalizers"))
    return {
        token_id: token.content
        for token_id, token in added.items()
        if not (normalizes and token.normalized)
    }


def _components(part: dict | None, children: str) -> list[dict]:
    """The parts of a tokenizer.json's pipeline step, nested sequences flattened."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [leaf for child in part[children] for leaf in _components(child, children)]


def _to_offsets(pairs: list[tuple[int, int]]) -> np.ndarray:
    flat = itertools.chain.from_iterable(pairs)
    return np.fromiter(flat, np.int32, 2 * len(pairs)).reshape(-1, 2)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes byte b as the character chr(b) where that is printable.

    The other bytes take the characters from 256 on, in order (GPT-2's table).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")


def decode_utf8(data: bytes) -> tuple[str, np.ndarray]:
    """Decodes bytes and says which character each byte belongs to.

    Args:
      data: any bytes; those that are not UTF-8 become U+FFFD.

    Returns:
      The text, and int64 [len(data) + 1]: the index of the character of every byte,
      and the length of the text for the end.
    """
    try:
        text = data.decode("utf-8")
        starts = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
        char_of_byte = np.cumsum(starts) - 1
    except UnicodeDecodeError:
        text, widths = _decode_invalid(data)
        char_of_byte = np.repeat(np.arange(len(text)), widths)
    return text, np.append(char_of_byte, len(text))


def _decode_invalid(data: bytes) -> tuple[str, list[int]]:
    """Text of bytes that are not UTF-8, and the number of bytes of every character."""
    text = data.decode("utf-8", errors="replace")
    if len(text.encode("utf-8")) != len(data):  # make every invalid byte a character
        text = data.decode("utf-8", errors="surrogateescape")
    widths = [len(char.encode("utf-8", errors="surrogateescape")) for char in text]
    return re.sub("[\udc80-\udcff]", "\ufffd", text), widths


def concatenate(parts: Sequence[Encoding], lengths: Iterable[int]) -> Encoding:
    """Encoding of a text from those of its parts; lengths are in characters."""
    starts = itertools.accumulate(lengths, initial=0)
    offsets = [part.offsets + np.int32(start) for part, start in zip(parts, starts)]
    return Encoding(
        np.concatenate([part.ids for part in parts]), np.concatenate(offsets)
    )
