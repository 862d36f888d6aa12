"""Tokenizers behind one small interface, with character offsets both ways.

A tokenizer is a directory: `tokenizer.model` (SentencePiece) or `tokenizer.json` (Hugging
Face), and `tokenizer_config.json` with the special tokens and the chat template.
"""

import contextlib
import datetime
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from rlt_jax import stores
from rlt_jax.data.chat import ChatTemplate, Message, find_template
from rlt_jax.data.codecs import MOST_IDS, FastCodec, SentencePieceCodec
from rlt_jax.data.token_bytes import Decoded, Encoding, concatenate
from rlt_jax.errors import UserError, as_user_error, storage_errno
from rlt_jax.files import read_json

Codec = SentencePieceCodec | FastCodec
SHIPPED = {"embedded": Path(__file__).parent / "assets" / "tokenizer"}
NO_LIMIT = 2**31
MOST_CHARACTERS = 4_000_000  # of a text; the libraries need some hundred bytes for each
# In tokenizer_config.json of a stage's folder; transformers ignores it.
VARIABLES = "chat_template_kwargs"
_FLAGS = ("lstrip", "rstrip", "single_word")  # of an added token
# Tokens of inputs that a language model alone does not read.
_OTHER_INPUTS = re.compile(r"(?i)(?<![a-z])(image|audio|video|vision|speech)")


class Tokenizer:
    """Text to ids and back, special tokens, and the model's own chat template.

    Attributes:
      path: directory that the tokenizer was read from.
      vocab_size: one more than the largest id.
      eos_id: id of the end of a text.
      end_of_turn: text that ends an assistant's turn.
      stop_ids: ids that end a completion: `eos_id`, the end of a turn, and those that the
        model's generation_config.json adds.
      chat: the chat template, None where the tokenizer has none.
      variables: the chat template's variables that the run has set.
    """

    def __init__(
        self,
        path: Path,
        codec: Codec,
        config: dict[str, Any],
        stop_ids: Iterable[int],
        chat: ChatTemplate | None = None,
    ) -> None:
        self.path, self._codec, self.chat = path, codec, chat
        self.variables: dict[str, Any] = config.get(VARIABLES, {})
        self.vocab_size = codec.size()
        eos = _token_text(config.get("eos_token"))
        self.eos_id = codec.token_id(eos) if isinstance(eos, str) else None
        if self.eos_id is None:
            raise UserError(
                f"tokenizer {path}: eos_token {short(eos)} of tokenizer_config.json is not in "
                "the vocabulary."
            )
        ending = chat.ending() if chat else ""
        # A turn ends with the first special token after it, or else with the eos token.
        marks = sorted([eos, *codec.marks], key=len, reverse=True)
        found = re.search("|".join(re.escape(m) for m in marks if m.strip()), ending)
        self.end_of_turn = ending[: found.end()] if found else ending.rstrip() + eos
        last, mark = self.encode(self.end_of_turn).ids[-1:].tolist(), found or [eos]
        if last != [codec.token_id(mark[0])]:
            raise UserError(
                f"tokenizer {path}: {mark[0]!r}, which ends a turn, is encoded as several "
                "tokens; list it among the added tokens."
            )
        self.stop_ids = tuple(sorted({self.eos_id, *last, *stop_ids}))

    def encode(self, text: str) -> Encoding:
        """Ids and character offsets of the text; no special tokens are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """The same as `encode` of every text, on all cores.

        Args:
          texts: any number of texts.

        Returns:
          One encoding per text, in order.

        Raises:
          UserError: a text is too long, or the tokenizer fails on it.
        """
        for text in texts:
            if len(text) > MOST_CHARACTERS:
                raise UserError(f"{len(text):,} characters: shorten {text[:60]!r}...")
        with _naming_damage(self.path):
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
        joined = [concatenate([head, tail], [cut]) for tail in tails]
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

    def decode_with_offsets(self, ids: np.ndarray | list[int]) -> Decoded:
        """Text of the ids and the characters of it that each id stands for.

        Args:
          ids: [T] token ids. Ids beyond the vocabulary stand for no text.

        Returns:
          The text and int32 offsets [T, 2]. Bytes that are not UTF-8 become U+FFFD.

        Raises:
          UserError: an id is negative.
        """
        ids = np.asarray(ids, np.int64)
        if len(ids) and ids.min() < 0:
            raise UserError(
                f"tokenizer {self.path}: cannot decode the negative id {ids.min()} at "
                f"position {ids.argmin()}. Remove padding before decoding."
            )
        return self._codec.bytes.decode(ids)

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as text, up to where the assistant's turn begins.

        Raises:
          UserError: there is no chat template, or it refuses the messages.
        """
        if self.chat is None:
            raise UserError(
                f"tokenizer {self.path}: neither tokenizer_config.json nor "
                "chat_template.jinja has a chat template. Set model.chat_template to the "
                "file of the one that it was trained with, or 'chatml' for a base model."
            )
        return self.chat.render(messages)

    @property
    def pieces(self) -> list[bytes]:
        """The bytes that each id stands for."""
        return self._codec.bytes.pieces

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the chat template, if there is one, has a place for a system message."""
        return self.chat is None or self.chat.takes_system()

    @functools.cached_property
    def _added_beginnings(self) -> tuple[str, ...]:
        """Every proper prefix of every added token."""
        added = self._codec.added.values()
        return tuple({text[:n] for text in added for n in range(1, len(text))})


def load_tokenizer(
    name: str | Path,
    chat_template: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: str = "",
    embeddings: int = NO_LIMIT,
) -> Tokenizer:
    """Loads a tokenizer directory, or the shipped one by the name "embedded".

    Args:
      name: the directory.
      chat_template: a file, a shipped one ("chatml"), or the name of one of several that
        the tokenizer has; "" for the tokenizer's own.
      chat_template_kwargs: values of its variables, such as {"enable_thinking": False}.
      date: ISO date and time that the template's `strftime_now` formats; "" for now.
      embeddings: number of ids that the model knows.

    Raises:
      UserError: no tokenizer there, or a damaged one, or one without end token, or one
        with ids that the model lacks.
    """
    path = SHIPPED.get(str(name), Path(stores.local(str(name))))
    config_file = path / "tokenizer_config.json"
    with as_user_error(f"tokenizer {short(str(name))}", OSError):
        if not config_file.is_file():
            raise UserError(
                f"tokenizer {path}: no tokenizer_config.json there. Name a directory with "
                "it and tokenizer.model or tokenizer.json, or 'embedded'."
            )
    config = read_json(config_file)
    if "added_tokens_decoder" not in config:  # older directories, as in transformers
        config |= read_json(path / "special_tokens_map.json", {})
    stops = read_json(path / "generation_config.json", {}).get("eos_token_id")
    stop_ids = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if any(type(i) is not int or i < 0 for i in stop_ids):
        wrong = f"generation_config.json: eos_token_id={short(stops)}"
        raise UserError(f"{path}/{wrong}; give an id or a list.")
    with _naming_damage(path):
        codec = _load_codec(path, config, embeddings)
    _check_ids(path, codec, stop_ids, embeddings)
    with as_user_error(f"{config_file}: {VARIABLES} has to be keys, values", TypeError):
        config[VARIABLES] = config.get(VARIABLES, {}) | dict(chat_template_kwargs or {})
    source, chat = find_template(path, config.get("chat_template"), chat_template), None
    if source is not None:
        more = config.get("extra_special_tokens")  # a list or, of names, a mapping
        more = more if isinstance(more, dict) else {}
        variables = {
            name: _token_text(token)
            for name, token in (config | more).items()
            if name.endswith("_token") and isinstance(token, str | dict)
        } | config[VARIABLES]
        with as_user_error("model.date", ValueError):
            when = datetime.datetime.fromisoformat(date or str(datetime.datetime.now()))
        # Without a time zone, as templates see it in transformers.
        when = when.replace(tzinfo=None)
        chat = ChatTemplate(f"tokenizer {path}", source, variables, when)
    return Tokenizer(path, codec, config, stop_ids, chat)


def _load_codec(path: Path, config: dict[str, Any], embeddings: int) -> Codec:
    texts = read_json(path / "added_tokens.json", {})
    listed = {i: {"content": text} for text, i in texts.items()}
    listed = config.get("added_tokens_decoder", listed)
    added = {int(i): token for i, token in listed.items()}
    if strange := [i for i in added if not 0 <= i < MOST_IDS]:
        raise UserError(f"tokenizer {path}: an added token has the id {strange[0]}.")
    if (path / "tokenizer.json").is_file():
        return FastCodec(path / "tokenizer.json", added, embeddings)
    if not (path / "tokenizer.model").is_file():
        raise UserError(f"{path}: neither tokenizer.json nor tokenizer.model.")
    codec = SentencePieceCodec(path / "tokenizer.model", added, embeddings)
    prefixed = codec.bytes.decode(codec.encode_batch(["a"])[0].ids)[0].startswith(" ")
    flags = {flag for token in added.values() for flag in _FLAGS if token.get(flag)}
    if flags or (prefixed and config.get("legacy") is False):
        raise UserError(
            f"tokenizer {path}: {', '.join(sorted(flags)) or 'legacy=false'}, for text next "
            "to added tokens, is not supported with tokenizer.model. Save the tokenizer as "
            "tokenizer.json with transformers."
        )
    return codec


def _check_ids(path: Path, codec: Codec, stop_ids: list[int], embeddings: int) -> None:
    """Raises UserError for ids without a row in the embedding, and for long tokens.

    Tokens of images and the like, which tokenizers of text-only models may have (Gemma
    3), are no error: the codec leaves them out.
    """
    if sum(len(text) ** 2 for text in codec.added.values()) > 10**8:
        raise UserError(f"tokenizer {path}: its added tokens are too long.")
    lacking = [text for text in codec.left_out if not _OTHER_INPUTS.search(text)]
    lacking += [f"id {i} (eos_token_id)" for i in stop_ids if i >= embeddings]
    if codec.size() > embeddings:
        lacking.append(f"ids up to {codec.size() - 1}")
    if lacking:
        raise UserError(
            f"tokenizer {path}: the embedding of the model has {embeddings} rows, none for "
            f"{', '.join(lacking[:8])}. Set model.tokenizer to the tokenizer of the model, "
            "or resize the model's embedding."
        )


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Raises UserError for what the libraries raise if the files are damaged: anything."""
    try:
        yield
    except BaseException as error:
        kind = type(error).__name__  # a panic in Rust is no Exception
        known = isinstance(error, Exception) or kind == "PanicException"
        if isinstance(error, UserError) or not known or storage_errno(error):
            raise
        what = "tokenizer.json, tokenizer.model or an added token is damaged"
        reason = f"{kind}: {error}".splitlines()[0][:300]
        raise UserError(f"tokenizer {path}: {what} ({reason}).") from error


def _token_text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token or ""
