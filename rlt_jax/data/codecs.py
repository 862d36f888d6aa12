"""The two kinds of tokenizer files: ids and offsets of a text, bytes of an id."""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from rlt_jax.data.token_bytes import Encoding, TokenBytes, concatenate
from rlt_jax.errors import UserError

MOST_IDS = 2**21  # more are a mistake, and would take up the memory
_PROBE = "Verify 12 offsets: (a+b)*c = 7,\n\nthen go on."


class SentencePieceCodec:
    """A SentencePiece `tokenizer.model`.

    Args:
      file: the model.
      added: tokens that were added to those of the model, by their ids.
      limit: added tokens with ids from it on are left out, and never found in a text.

    Attributes:
      left_out: text of every token that was left out.
      added: text of every control piece and added token by its id.
      marks: text of these and of tags that the model's trainer has defined.
      separators: those at whose end a text can be split: text after them is encoded
        independently of the text before.
      bytes: what ids stand for.
    """

    def __init__(self, file: Path, added: Mapping[int, dict], limit: int) -> None:
        self._model = model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        ids = range(model.get_piece_size())
        self._is_byte = np.array([model.is_byte(i) for i in ids], bool)
        control = {i: model.id_to_piece(i) for i in ids if model.is_control(i)}
        kept = {i: token["content"] for i, token in added.items() if i < limit}
        self.left_out = [token["content"] for i, token in added.items() if i >= limit]
        self.added = self.separators = control | kept
        # User-defined pieces have the score 0, but so may the first merge of letters.
        scored = [model.id_to_piece(i) for i in ids if not model.get_score(i)]
        defined = [text for text in scored if re.fullmatch(r"\W.*\W", text)]
        self.marks = [*self.added.values(), *defined]
        self._added_ids = {text: i for i, text in self.added.items()}
        longest_first = sorted(self.added.values(), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._control = re.compile(f"({pattern})")
        pieces = [self._piece(i) for i in range(self.size())]
        self.bytes = TokenBytes(pieces, np.flatnonzero(self._is_byte).tolist())
        probe = model.encode(_PROBE, return_type="offset_mapping")
        _check_offsets(file, self.bytes, probe["ids"], probe["offsets"])

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Ids and character offsets of texts; no special tokens are added."""
        # SentencePiece never makes control pieces such as </s> from text.
        split = [self._control.split(text) for text in texts]
        between = [part for parts in split for part in parts[::2]]
        encoded = iter(self._model.encode(between, return_type="offset_mapping"))
        return [self._join(parts, encoded) for parts in split]

    def _join(self, parts: list[str], others: Iterator[dict]) -> Encoding:
        """Encoding of the text that the parts make; every other part is a control."""
        found = [self._added(x) if n % 2 else next(others) for n, x in enumerate(parts)]
        return concatenate(list(map(self._to_encoding, parts, found)), map(len, parts))

    def _added(self, piece: str) -> dict:
        return {"ids": [self._added_ids[piece]], "offsets": [(0, len(piece))]}

    def _to_encoding(self, text: str, encoded: dict) -> Encoding:
        ids = np.array(encoded["ids"], np.int32)
        offsets = _to_offsets(encoded["offsets"])
        # SentencePiece gives all of a character that fell apart into byte tokens to the
        # last of them. Added tokens have ids beyond those of the model.
        is_byte = self._is_byte[np.minimum(ids, len(self._is_byte) - 1)]
        offsets[:, 1] += (offsets[:, 0] == offsets[:, 1]) & is_byte
        return self.bytes.encoding(text, ids, offsets)

    def _piece(self, token: int) -> bytes:
        """UTF-8 bytes that an id stands for, or a part of a character."""
        own = token < len(self._is_byte) and not self._model.is_control(token)
        piece = self._model.id_to_piece(token) if own else ""
        if self.added.get(token, piece) != piece or not own:
            return self.added.get(token, "").encode("utf-8")
        return _bytes_of_piece(piece, self._is_byte[token])

    def token_id(self, token: str) -> int | None:
        """Id of a token's text; None if it is not in the vocabulary."""
        if token in self._added_ids:
            return self._added_ids[token]
        token_id = self._model.piece_to_id(token)
        return None if token_id == self._model.unk_id() else token_id

    def size(self) -> int:
        """One more than the largest id."""
        return max([len(self._is_byte), *(i + 1 for i in self.added)])


class FastCodec:
    """A Hugging Face `tokenizer.json`.

    Args:
      file: the file.
      added: tokens by their ids that were added later, or whose flags were changed.
      limit: added tokens with ids from it on are left out, and never found in a text.

    Raises:
      UserError: the ids make no sense, replacements make texts much longer, or the
        library's offsets or decoder do not fit.

    Attributes:
      left_out: text of every token that was left out.
      added: text of every added token by its id.
      marks: text of these.
      separators: those at whose end a text can be split: text after them is encoded
        independently of the text before.
      bytes: what ids stand for.
    """

    def __init__(self, file: Path, added: Mapping[int, dict], limit: int) -> None:
        spec = json.loads(file.read_text(encoding="utf-8"))
        # The settings of whoever saved the file last; and special tokens that nobody asks
        # for here, with trimmed offsets.
        spec |= {"truncation": None, "padding": None, "post_processor": None}
        spec["model"]["dropout"] = None
        steps = _components(spec.get("normalizer"), "normalizers")
        steps += _components(spec.get("decoder"), "decoders")
        if math.prod(map(_growth, steps)) > 100:
            raise UserError(f"{file}: its replacements make texts 100 times longer.")
        known = {token["content"]: token for token in spec.get("added_tokens", [])}
        flags = tokenizers.AddedToken("").__getstate__()
        for i, token in added.items():  # as in transformers, these have the last word
            text = token["content"]
            known[text] = flags | {"id": i} | known.get(text, {}) | token
        listed = sorted(known.values(), key=lambda token: token["id"])
        spec["added_tokens"] = [token for token in listed if token["id"] < limit]
        self.left_out = [token["content"] for token in listed if token["id"] >= limit]
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        vocabulary = self._tokenizer.get_vocab()
        if len({*vocabulary.values()}) < len(vocabulary) or self.size() > MOST_IDS:
            raise UserError(f"{file}: an id is used twice, or is {MOST_IDS:,} or more.")
        found = self._tokenizer.get_added_tokens_decoder()
        self.added = {token_id: token.content for token_id, token in found.items()}
        self.marks = list(self.added.values())
        self.separators = _separators(spec, found)
        kinds = {part["type"] for part in _components(spec.get("decoder"), "decoders")}
        tokens = [self._tokenizer.id_to_token(i) or "" for i in range(self.size())]
        if "ByteLevel" in kinds:
            self.bytes = TokenBytes([_bytes_of_characters(token) for token in tokens])
        else:
            spelled = [i for i, t in enumerate(tokens) if _BYTE_PIECE.fullmatch(t)]
            spelled = {*spelled} if "ByteFallback" in kinds else set()
            pieces = [_bytes_of_piece(t, i in spelled) for i, t in enumerate(tokens)]
            self.bytes = TokenBytes(pieces, spelled, whole_runs=True)
        self._check_decoder(file, tokens)
        probe = self._tokenizer.encode(_PROBE, add_special_tokens=False)
        _check_offsets(file, self.bytes, probe.ids, probe.offsets)

    def _check_decoder(self, file: Path, tokens: Sequence[str]) -> None:
        """Raises UserError where the library's own decoder gives another text."""
        # Between two letters, as decoders treat the start of a text differently.
        plain = (i for i, t in enumerate(tokens) if t.isascii() and t.isalnum())
        ids = np.full(2 * len(tokens) + 1, next(plain, 0))
        ids[1::2] = np.arange(len(tokens))
        known = [i for i in ids.tolist() if tokens[i]]
        text = self._tokenizer.decode(known, skip_special_tokens=False)
        if text != self.bytes.decode(np.array(known))[0]:
            raise UserError(
                f"{file}: its decoder is not supported; supported are byte-level ones and "
                "those of tokenizers that write spaces as U+2581."
            )

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Ids and character offsets of texts; no special tokens are added."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ids = [np.array(one.ids, np.int32) for one in encoded]
        offsets = [_to_offsets(one.offsets) for one in encoded]
        return list(map(self.bytes.encoding, texts, ids, offsets))

    def token_id(self, token: str) -> int | None:
        """Id of a token's text; None if it is not in the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def size(self) -> int:
        """One more than the largest id; ids may have gaps."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1


def _check_offsets(
    file: Path, table: TokenBytes, ids: list[int], offsets: list[tuple[int, int]]
) -> None:
    """Raises UserError where a library's offsets contradict the bytes of its ids.

    tokenizers 0.19.1 and 0.20.0 return empty offsets for a vocabulary that ignores merges.
    """
    own, given = table.offsets_in(_PROBE, np.array(ids)), _to_offsets(offsets)
    # A run of unknown characters may be that of all its tokens.
    if own is not None and ((given - own) * [1, -1] > 0).any():
        raise UserError(
            f"{file}: the offsets that tokenizers {tokenizers.__version__} or "
            f"sentencepiece {sentencepiece.__version__} gives are wrong: the explanation "
            "could not be found among the tokens. Install a newer version."
        )


def _separators(spec: dict, added: dict[int, tokenizers.AddedToken]) -> dict[int, str]:
    """Added tokens at which the library splits a text before anything else.

    The parts are then normalized, pre-tokenized and encoded one by one. Tokens that are
    looked for after normalization separate only a text that is not normalized. There
    are no separators if a token's match depends on its neighbors, or a part's encoding
    on its place in the text.
    """
    steps = _components(spec.get("pre_tokenizer"), "pretokenizers")
    by_neighbors = (t.lstrip or t.rstrip or t.single_word for t in added.values())
    # With "first" there is a space before the first part only.
    if any(x.get("prepend_scheme") == "first" for x in steps) or any(by_neighbors):
        return {}
    normalizes = bool(_components(spec.get("normalizer"), "normalizers"))
    return {i: t.content for i, t in added.items() if not (normalizes and t.normalized)}


def _components(part: dict | None, children: str) -> list[dict]:
    """The parts of a tokenizer.json's pipeline step, nested sequences flattened."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [leaf for child in part[children] for leaf in _components(child, children)]


def _growth(step: dict) -> float:
    """How many times longer a step can make a text."""
    if step["type"] != "Replace":
        return 1.0
    pattern, content = step["pattern"].get("String"), len(step["content"])
    # An expression can match before every character.
    return max(1.0, content / len(pattern) if pattern else content + 1)


def _to_offsets(pairs: list[tuple[int, int]]) -> np.ndarray:
    flat = itertools.chain.from_iterable(pairs)
    return np.fromiter(flat, np.int32, 2 * len(pairs)).reshape(-1, 2)


def _bytes_of_piece(piece: str, is_byte: bool) -> bytes:
    """Bytes that a piece such as "\u2581the" or, of a single byte, "<0x0A>" stands for."""
    if is_byte:
        return bytes.fromhex(piece[3:-1])
    return piece.replace("\u2581", " ").encode("utf-8")


# Byte-level BPE writes byte b as the character chr(b) where that is printable. The other
# bytes take the characters from 256 on, in order (GPT-2's table).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF_CHAR = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF_CHAR |= {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")


def _bytes_of_characters(token: str) -> bytes:
    """Bytes that a token of a byte-level vocabulary stands for."""
    values = [_BYTE_OF_CHAR.get(char) for char in token]
    # A token outside the byte alphabet stands for itself, as in the library.
    return token.encode("utf-8") if None in values else bytes(values)
