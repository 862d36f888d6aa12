"""Tokenizers behind one small interface, with character offsets both ways.

A tokenizer is a directory: `tokenizer.model` (SentencePiece) or `tokenizer.json` (Hugging
Face), and `tokenizer_config.json` with the chat template and the special tokens.
"""

import datetime
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlt_jax.data import codecs
from rlt_jax.data.codecs import Encoding, FastCodec, SentencePieceCodec
from rlt_jax.errors import UserError

SHIPPED = {"embedded": Path(__file__).parent / "assets" / "tokenizer"}


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
        codec: SentencePieceCodec | FastCodec,
        config: dict,
        stop_ids: Iterable[int],
    ) -> None:
        self.path = path
        self._codec = codec
        self.vocab_size = codec.size()
        self.base_vocab_size = codec.base_size()
        names = ("bos_token", "eos_token", "pad_token")
        self._special = {name: _token_text(config.get(name)) for name in names}
        self.eos = self._special["eos_token"]
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
                f"tokenizer {path}: neither tokenizer_config.json nor chat_template.jinja "
                "has a chat template; add the one the model was trained with."
            )
        self._chat_template = _compile(template)

    def encode(self, text: str) -> Encoding:
        """Ids and character offsets of the text; no special tokens are added."""
        return self._codec.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """The same as `encode` of every text, on all cores.

        Args:
          texts: any number of texts.

        Returns:
          One encoding per text, in order.
        """
        return self._codec.encode_batch(texts)

    def encode_with_prefix(self, prefix: str, texts: Sequence[str]) -> list[Encoding]:
        """The same as `encode(prefix + text)` of every text, faster.

        What comes before `split_point(prefix)` is encoded once for all texts. The first
        text is also encoded whole; if that gives anything else, all texts are.

        Args:
          prefix: text that all encoded texts begin with, for example a prompt.
          texts: what follows the prefix, for example the completions of the prompt.

        Returns:
          One encoding of prefix and text together per text, in order.
        """
        whole = [prefix + text for text in texts]
        cut = self.split_point(prefix) if len(texts) > 1 else 0
        if not cut:
            return self.encode_batch(whole)
        head = self.encode(prefix[:cut])
        tails = self.encode_batch([text[cut:] for text in whole])
        joined = [codecs.concatenate([head, tail], [cut]) for tail in tails]
        first = self.encode(whole[0])
        if all(map(np.array_equal, joined[0], first)):
            return joined
        return [first, *self.encode_batch(whole[1:])]

    def split_point(self, text: str) -> int:
        """Number of leading characters that can be encoded apart from what follows.

        It is the end of the last added or control token that separates the text: with
        cut = split_point(text), `encode(text + more)` is `encode(text[:cut])` followed
        by `encode(text[cut:] + more)` with offsets shifted by cut, whatever `more` is.

        Args:
          text: for example a prompt.

        Returns:
          The number of characters; 0 if there is no such token, or if the tokenizer
          treats the start of a text differently from its middle.
        """
        separators = self._codec.separators
        if not separators:
            return 0
        ids, offsets = self.encode(text)
        for i in np.flatnonzero(np.isin(ids, list(separators)))[::-1]:
            start, end = offsets[i].tolist()
            # The model may also use such an id for an unknown character.
            is_separator = text[start:end] == separators[int(ids[i])]
            # More text must not complete an added token that begins before the cut.
            if is_separator and not text[:end].endswith(self._added_beginnings):
                return end
        return 0

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of the ids, special tokens written out."""
        return self.decode_with_offsets(ids)[0]

    def decode_with_offsets(
        self, ids: np.ndarray | list[int]
    ) -> tuple[str, np.ndarray]:
        """Text of the ids and the characters of it that each id stands for.

        Args:
          ids: [T] token ids. Ids beyond the vocabulary stand for no text.

        Returns:
          The text and int32 offsets [T, 2]. Bytes that are not UTF-8 become U+FFFD.

        Raises:
          UserError: an id is negative.
        """
        pieces, lengths = self._bytes_of_ids
        ids = np.asarray(ids, np.int64)
        if len(ids) and ids.min() < 0:
            raise UserError(
                f"tokenizer {self.path}: cannot decode the negative id {ids.min()} at "
                f"position {ids.argmin()}. Remove padding before decoding."
            )
        ids = np.minimum(ids, len(pieces) - 1)
        ends = np.cumsum(lengths[ids])
        starts = ends - lengths[ids]
        text, char_of_byte = codecs.decode_utf8(
            b"".join([pieces[i] for i in ids.tolist()])
        )
        start = char_of_byte[starts]
        last = char_of_byte[np.maximum(ends - 1, starts)]
        end = np.where(ends > starts, last + 1, start)
        return text, np.stack([start, end], axis=-1).astype(np.int32)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The chat as text, up to where the assistant's turn begins."""
        return self._chat_template.render(
            messages=messages, add_generation_prompt=True, tools=None, **self._special
        )

    @functools.cached_property
    def _bytes_of_ids(self) -> tuple[list[bytes], np.ndarray]:
        """Bytes of every id, and how many. The last entry is for unknown ids."""
        pieces = [self._codec.token_bytes(i) for i in range(self._codec.id_limit())]
        pieces.append(b"")
        return pieces, np.array([len(piece) for piece in pieces], np.int64)

    @functools.cached_property
    def _added_beginnings(self) -> tuple[str, ...]:
        """Every proper prefix of every added token."""
        added = self._codec.added.values()
        return tuple({text[:n] for text in added for n in range(1, len(text))})


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
    generation_file = path / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    stop_ids = generation.get("eos_token_id")
    stop_ids = [stop_ids] if isinstance(stop_ids, int) else stop_ids or []
    if (path / "tokenizer.json").is_file():
        codec = FastCodec(path / "tokenizer.json")
    elif (path / "tokenizer.model").is_file():
        codec = SentencePieceCodec(path / "tokenizer.model")
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

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().astimezone().strftime(format)

    functions = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template, globals=functions)
