"""Tokenizers behind one small interface, with character offsets both ways.

A tokenizer is a directory: `tokenizer.model` (SentencePiece) or `tokenizer.json` (Hugging
Face), and `tokenizer_config.json` with the chat template and the special tokens.
"""

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import sentencepiece
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlt_jax.errors import UserError

SHIPPED = {"embedded": Path(__file__).parent / "assets" / "tokenizer"}


class Encoding(NamedTuple):
    """Token ids and the characters each came from.

    Attributes:
      ids: [T] int32.
      offsets: [T, 2] int32, half-open character ranges of the encoded string. Tokens
        that each hold a part of one character all name that whole character.
    """

    ids: np.ndarray
    offsets: np.ndarray


class Tokenizer:
    """Text to ids and back, special tokens, and the model's own chat template.

    Attributes:
      path: directory that the tokenizer was read from.
      vocab_size: number of ids.
      base_vocab_size: number of ids without added special tokens.
      eos_id: id that ends a turn.
      stop_ids: ids that end a completion: the tokenizer's own and those that the
        model's generation_config.json adds.
    """

    def __init__(
        self,
        path: Path,
        codec: "_SentencePieceCodec | _FastCodec",
        config: dict,
        stop_ids: Iterable[int],
    ) -> None:
        self.path = path
        self._codec = codec
        self.vocab_size = codec.size()
        self.base_vocab_size = codec.base_size()
        self.eos = _token_text(config.get("eos_token"))
        self._special = {
            name: _token_text(config.get(name))
            for name in ("bos_token", "eos_token", "pad_token")
        }
        self.eos_id = codec.token_id(self.eos)
        if self.eos_id is None:
            raise UserError(
                f"tokenizer {path}: eos_token {self.eos!r} of tokenizer_config.json is "
                "not in the vocabulary."
            )
        self.stop_ids = tuple(sorted({self.eos_id, *stop_ids}))
        template = config.get("chat_template")
        if not template:
            raise UserError(
                f"tokenizer {path}: neither tokenizer_config.json nor a file "
                "chat_template.jinja has a chat template; add the one the model was "
                "trained with."
            )
        self._chat_template = _compile(template)

    def encode(self, text: str) -> Encoding:
        """Ids and character offsets of the text; no special tokens are added."""
        return self._codec.encode(text)

    def encode_with_prefix(self, prefix: str, texts: Sequence[str]) -> list[Encoding]:
        """The encoding of prefix + text for each of the texts."""
        return [self.encode(prefix + text) for text in texts]

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of the ids, special tokens written out."""
        return self.decode_with_offsets(ids)[0]

    def decode_with_offsets(
        self, ids: np.ndarray | list[int]
    ) -> tuple[str, np.ndarray]:
        """Text of the ids and the characters of it that each id stands for.

        Args:
          ids: [T] token ids.

        Returns:
          The text and int32 offsets [T, 2]. Bytes that are not UTF-8 become U+FFFD.
        """
        pieces = [self._codec.token_bytes(int(token)) for token in ids]
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        starts = np.concatenate([[0], ends[:-1]]) if len(pieces) else ends
        text, char_of_byte = _decode_utf8(b"".join(pieces))
        start = char_of_byte[starts]
        last = char_of_byte[np.maximum(ends - 1, starts)]
        end = np.where(ends > starts, last + 1, start)
        return text, np.stack([start, end], axis=-1).astype(np.int32)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The chat as text, up to where the assistant's turn begins."""
        return self._chat_template.render(
            messages=messages, add_generation_prompt=True, tools=None, **self._special
        )


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Loads a tokenizer directory, or the shipped one by the name "embedded".

    Raises:
      UserError: no tokenizer there, or one without end token or chat template.
    """
    path = SHIPPED.get(str(name), Path(name))
    config_file = path / "tokenizer_config.json"
    if not config_file.is_file():
        raise UserError(
            f"tokenizer {path}: no tokenizer_config.json there. Name a directory with "
            "tokenizer.model or tokenizer.json and tokenizer_config.json, or 'embedded'."
        )
    config = _read_json(config_file)
    if (path / "chat_template.jinja").is_file():
        text = (path / "chat_template.jinja").read_text(encoding="utf-8")
        config["chat_template"] = text
    stop_ids = _generation_stop_ids(path / "generation_config.json")
    if (path / "tokenizer.json").is_file():
        codec = _FastCodec(path / "tokenizer.json")
    elif (path / "tokenizer.model").is_file():
        codec = _SentencePieceCodec(path / "tokenizer.model")
    else:
        raise UserError(
            f"tokenizer {path}: neither tokenizer.json nor tokenizer.model."
        )
    return Tokenizer(path, codec, config, stop_ids)


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error


def _generation_stop_ids(file: Path) -> list[int]:
    """eos_token_id of a generation_config.json: an id, a list of ids, or absent."""
    if not file.is_file():
        return []
    stop_ids = _read_json(file).get("eos_token_id")
    if stop_ids is None:
        return []
    return stop_ids if isinstance(stop_ids, list) else [stop_ids]


class _SentencePieceCodec:
    def __init__(self, file: Path) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        pieces = [self._model.id_to_piece(i) for i in range(self.size())]
        control = [p for i, p in enumerate(pieces) if self._model.is_control(i)]
        longest_first = sorted(map(re.escape, control), key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    def encode(self, text: str) -> Encoding:
        # SentencePiece never makes control pieces such as </s> from text.
        ids, offsets, place = [], [], 0
        for number, part in enumerate(self._control.split(text)):
            if number % 2:
                ids.append(np.array([self._model.piece_to_id(part)], np.int32))
                offsets.append(np.array([[place, place + len(part)]], np.int32))
            else:
                encoding = self._encode_part(part)
                ids.append(encoding.ids)
                offsets.append(encoding.offsets + np.int32(place))
            place += len(part)
        return Encoding(np.concatenate(ids), np.concatenate(offsets))

    def _encode_part(self, text: str) -> Encoding:
        pieces = self._model.encode(text, return_type="proto").pieces
        ids = np.array([piece.id for piece in pieces], np.int32)
        _, char_of_byte = _decode_utf8(text.encode("utf-8"))
        # SentencePiece counts bytes, and gives all bytes of a character that fell apart
        # into byte tokens to the last of them.
        byte_ends = np.array([piece.end for piece in pieces], np.int64)
        byte_starts = np.array([piece.begin for piece in pieces], np.int64)
        start = char_of_byte[byte_starts]
        last = char_of_byte[np.maximum(byte_ends - 1, byte_starts)]
        empty = byte_ends == byte_starts
        inside = np.array([self._model.is_byte(int(i)) for i in ids], bool)
        end = np.where(empty & ~inside, start, last + 1)
        return Encoding(ids, np.stack([start, end], axis=-1).astype(np.int32))

    def token_bytes(self, token: int) -> bytes:
        if token >= self.size():
            return b""
        piece = self._model.id_to_piece(token)
        if self._model.is_control(token):
            return piece.encode("utf-8")
        if self._model.is_byte(token):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("\u2581", " ").encode("utf-8")

    def token_id(self, token: str) -> int | None:
        token_id = self._model.piece_to_id(token)
        return None if token_id == self._model.unk_id() else token_id

    def size(self) -> int:
        return self._model.get_piece_size()

    def base_size(self) -> int:
        return self.size()


class _FastCodec:
    def __init__(self, file: Path) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        # The file may hold the settings of whoever saved it last.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._added = {
            token_id: token.content
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
        }
        decoder = json.loads(file.read_text(encoding="utf-8")).get("decoder") or {}
        kinds = [part["type"] for part in decoder.get("decoders", [decoder]) if part]
        self._byte_level = "ByteLevel" in kinds

    def encode(self, text: str) -> Encoding:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        return Encoding(np.array(encoding.ids, np.int32), offsets)

    def token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode("utf-8")
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("\u2581", " ").encode("utf-8")

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def base_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=False)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes byte b as the character chr(b) where that is printable.

    The other bytes take the characters from 256 on, in order (GPT-2's table).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


def _decode_utf8(data: bytes) -> tuple[str, np.ndarray]:
    """Text of the bytes, and for every byte (and the end) the character it is in."""
    text = data.decode("utf-8", errors="replace")
    widths = [len(char.encode("utf-8")) for char in text]
    if sum(widths) != len(data):  # a byte was replaced: place characters one by one
        text, widths = _decode_leniently(data)
    char_of_byte = np.repeat(np.arange(len(text)), widths)
    return text, np.append(char_of_byte, len(text)).astype(np.int64)


def _decode_leniently(data: bytes) -> tuple[str, list[int]]:
    chars, widths, place = [], [], 0
    while place < len(data):
        for width in (1, 2, 3, 4):
            try:
                char = data[place : place + width].decode("utf-8")
                break
            except UnicodeDecodeError:
                char = ""
        if not char:
            char, width = "\ufffd", 1
        chars.append(char)
        widths.append(width)
        place += width
    return "".join(chars), widths


def _token_text(token: str | dict | None) -> str:
    return token["content"] if isinstance(token, dict) else token or ""


def _compile(template: str | list[dict[str, str]]) -> jinja2.Template:
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}["default"]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise UserError(f"chat template: {message}")

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().astimezone().strftime(form)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)
