"""Batches, shared prefixes and fast decoding give what one text at a time gives."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from rlt_jax.data import examples
from rlt_jax.data.examples import Renderer
from rlt_jax.data.templates import Template
from rlt_jax.data.token_bytes import Encoding, _decode_invalid
from rlt_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Trace

ADDED = ["</s>", "<sep>", "<sep>>", "\n\n"]
FRAGMENTS = [
    *ADDED,
    *["<", "<se", "s", "p>", ">", "/s>", "\n", " ", "  ", "\t", "a", "an", "An", " an"],
    *[
        "1",
        "23",
        ".",
        "▁",
        "é",
        "e\u0301",
        "\u0301",
        "ﬁ",
        "東京",
        "😀",
        "👩‍👧",
        "\u200b",
    ],
    *["<|end|>", "<pad>", "<｜User｜>", "<｜Assistant｜>", "<think>", "<thi"],
]


def join(head: Encoding, tail: Encoding, shift: int) -> Encoding:
    offsets = np.concatenate([head.offsets, tail.offsets + shift])
    return Encoding(np.concatenate([head.ids, tail.ids]), offsets)


def assert_same(actual: Encoding, expected: Encoding) -> None:
    assert actual.ids.dtype == actual.offsets.dtype == np.int32
    np.testing.assert_array_equal(actual.ids, expected.ids)
    np.testing.assert_array_equal(actual.offsets, expected.offsets)


def random_text(rng: np.random.Generator, most: int) -> str:
    return "".join(rng.choice(FRAGMENTS, rng.integers(0, most + 1)))


def load(folder: Path) -> Tokenizer:
    config = {"eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def save(folder: Path, built: tokenizers.Tokenizer) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    return load(folder)


def byte_level(
    added: list[AddedToken] | None = None,
    add_prefix_space: bool = False,
    ignore_merges: bool = False,
    normalizer: normalizers.Normalizer | None = None,
    post_processor: processors.ByteLevel | None = None,
) -> tokenizers.Tokenizer:
    """Byte-level BPE with two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    vocab |= {"an": 256, "Ġan": 257, "ĊĊ": 258, "Ġ<": 259}
    merges = [("a", "n"), ("Ġ", "an")]
    model = models.BPE(vocab, merges, ignore_merges=ignore_merges)
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    built.decoder = decoders.ByteLevel()
    if normalizer:
        built.normalizer = normalizer
    if post_processor:
        built.post_processor = post_processor
    built.add_special_tokens(ADDED)
    built.add_tokens(added or [])
    return built


def metaspace(prepend_scheme: str, unk: str = "<unk>") -> tokenizers.Tokenizer:
    """Unigram as in T5: few letters are known, the others become the unknown token."""
    letters = [*"▁aeinps<>/.12", "an", "▁an", "▁a", "▁<", "s>"]
    vocab = [(unk, 0.0)] + [(piece, -2.0 - len(piece)) for piece in letters]
    built = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    built.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    built.add_special_tokens([unk, *ADDED])
    return built


def unigram_bytes(prepend_scheme: str) -> tokenizers.Tokenizer:
    """Unigram as of many Japanese models: unknown characters are bytes."""
    letters = [(piece, -2.0 - len(piece)) for piece in [*"▁aeinpst", "an", "▁an"]]
    bytes_ = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocab = [("<unk>", 0.0), *letters, *bytes_]
    model = models.Unigram(vocab, unk_id=0, byte_fallback=True)
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    spaces = decoders.Metaspace(prepend_scheme=prepend_scheme)
    built.decoder = decoders.Sequence([decoders.ByteFallback(), spaces])
    built.add_special_tokens(["<unk>", *ADDED])
    return built


def byte_fallback(*steps: normalizers.Normalizer) -> tokenizers.Tokenizer:
    """BPE as of Llama 2 and Gemma: no pre-tokenizer, rare characters are bytes."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    letters = {piece: 256 + i for i, piece in enumerate([*"▁aeinps", "an", "▁an"])}
    merges = [("a", "n"), ("▁", "an")]
    model = models.BPE(bytes_ | letters, merges, byte_fallback=True)
    built = tokenizers.Tokenizer(model)
    built.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if steps else []  # of a text's first space
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    built.add_special_tokens(ADDED)
    return built


# Tokenizers that encode what follows a separator independently of what precedes it.
SPLIT: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "ignore_merges": lambda: byte_level(ignore_merges=True),
    "add_prefix_space": lambda: byte_level(add_prefix_space=True),
    "nfc": lambda: byte_level(normalizer=normalizers.NFC()),
    "lowercase": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "normalized_token": lambda: byte_level([AddedToken("an<sep", normalized=True)]),
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_never": lambda: metaspace("never"),
    "unigram_bytes_always": lambda: unigram_bytes("always"),
    "unigram_bytes_never": lambda: unigram_bytes("never"),
    "gemma": byte_fallback,
    "llama_2": lambda: byte_fallback(normalizers.Prepend("▁")),
    "nfkc": lambda: byte_fallback(normalizers.NFKC()),
    "trim_offsets": lambda: byte_level(
        add_prefix_space=True, post_processor=processors.ByteLevel(trim_offsets=True)
    ),
}
# Tokenizers with added tokens that may overlap, or that stand for other characters.
AMBIGUOUS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "overlapping_tokens": lambda: byte_level(
        [AddedToken("n</", normalized=True), AddedToken("s>a", normalized=False)]
    ),
    "unknown_is_added": lambda: metaspace("always", unk="a"),
}
# Tokenizers that treat the start of a text differently, or may do so.
WHOLE: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "lstrip": lambda: byte_level([AddedToken("<think>", lstrip=True)]),
    "rstrip": lambda: byte_level([AddedToken("<think>", rstrip=True)]),
    "single_word": lambda: byte_level([AddedToken("<think>", single_word=True)]),
    "metaspace_first": lambda: metaspace("first"),
}
BUILT = SPLIT | AMBIGUOUS | WHOLE


@pytest.fixture(scope="module")
def dummy_prefix(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model that puts a space before a text, and has byte pieces."""
    folder = tmp_path_factory.mktemp("dummy_prefix")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["an ant and a pan in an inn", "sis snaps 12 pins"]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        control_symbols=["<sep>", "<sep>>"],
        user_defined_symbols=["<think>"],
        minloglevel=2,
    )
    return load(folder)


FILES = ["tokenizer", "deepseek", "sentencepiece_32k", "dummy_prefix"]


@pytest.fixture(params=[*FILES, *BUILT])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param in FILES:
        return request.getfixturevalue(request.param)
    return save(tmp_path, BUILT[request.param]())


def test_a_batch_is_the_same_as_one_text_at_a_time(any_tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    texts = ["", *(random_text(rng, 12) for _ in range(100)), ""]
    for text, encoding in zip(texts, any_tokenizer.encode_batch(texts), strict=True):
        assert_same(encoding, any_tokenizer.encode(text))
    assert any_tokenizer.encode_batch([]) == []


def test_a_shared_prefix_changes_nothing(any_tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        prefix = random_text(rng, 8)
        texts = [random_text(rng, 4) for _ in range(8)]
        encodings = any_tokenizer.encode_with_prefix(prefix, texts)
        for text, encoding in zip(texts, encodings, strict=True):
            assert_same(encoding, any_tokenizer.encode(prefix + text))
    assert any_tokenizer.encode_with_prefix("a</s>", []) == []


def test_what_precedes_the_split_point_is_independent_of_what_follows(
    any_tokenizer: Tokenizer,
) -> None:
    rng = np.random.default_rng(2)
    for _ in range(60):
        prefix = random_text(rng, 8)
        cut = any_tokenizer.split_point(prefix)
        assert 0 <= cut <= len(prefix)
        head = any_tokenizer.encode(prefix[:cut])
        for more in FRAGMENTS:
            tail = any_tokenizer.encode(prefix[cut:] + more)
            assert_same(join(head, tail, cut), any_tokenizer.encode(prefix + more))


@pytest.mark.parametrize("name", SPLIT)
def test_texts_are_split_after_the_last_added_token(name: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, SPLIT[name]())
    assert tokenizer.split_point("an </s>a</s>an an") == len("an </s>a</s>")
    assert tokenizer.split_point("an an") == 0
    # These could become <sep>> and </s>.
    assert tokenizer.split_point("a</s>an<sep>") == len("a</s>")
    assert tokenizer.split_point("a</s>an</s") == len("a</s>")


@pytest.mark.parametrize("name", WHOLE)
def test_texts_whose_parts_depend_on_their_place_are_not_split(
    name: str, tmp_path: Path
) -> None:
    assert save(tmp_path, WHOLE[name]()).split_point("an </s>a</s>an an") == 0


def test_tokens_that_are_looked_for_after_normalization_do_not_split(
    tmp_path: Path,
) -> None:
    word = AddedToken("Pan", normalized=True)
    plain = save(tmp_path / "plain", byte_level([word]))
    assert plain.split_point("a Pan a") == len("a Pan")
    lower = byte_level([word], normalizer=normalizers.Lowercase())
    assert save(tmp_path / "lower", lower).split_point("a Pan a") == 0


def test_a_character_that_becomes_an_added_token_does_not_split(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, metaspace("always"))
    assert tokenizer.encode("</s>東").ids[-1] == tokenizer.encode("<unk>").ids[0]
    assert tokenizer.split_point("</s>東") == len("</s>")


def test_the_chat_of_a_real_tokenizer_is_split_before_the_completion(
    deepseek: Tokenizer,
) -> None:
    chat = deepseek.render([{"role": "user", "content": "1+1?"}])
    assert chat.endswith(("<｜Assistant｜>", "<think>\n"))
    assert len(chat) - len("\n") <= deepseek.split_point(chat) <= len(chat)


def test_control_pieces_split_sentencepiece_texts(
    dummy_prefix: Tokenizer, tokenizer: Tokenizer
) -> None:
    assert dummy_prefix.split_point("an</s>a <think>a") == len("an</s>")
    assert dummy_prefix.split_point("an</s>a<sep>") == len("an</s>")
    assert tokenizer.split_point("<pad>a<|end|>a") == len("<pad>")


def test_texts_are_encoded_whole_if_the_first_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = save(tmp_path, metaspace("first"))
    eos_id = tokenizer.eos_id
    monkeypatch.setattr(tokenizer._codec, "separators", {eos_id: "</s>"})
    cut = tokenizer.split_point("a</s>")
    assert cut == len("a</s>")
    joined = join(tokenizer.encode("a</s>"), tokenizer.encode("an"), cut)
    whole = tokenizer.encode("a</s>an")
    assert joined.ids.tolist() != whole.ids.tolist()
    encodings = tokenizer.encode_with_prefix("a</s>", ["an", "in"])
    assert_same(encodings[0], whole)
    assert_same(encodings[1], tokenizer.encode("a</s>in"))


@pytest.mark.parametrize("prepend_scheme", ["always", "never"])
def test_each_of_several_unknown_characters_has_its_own_bytes(
    prepend_scheme: str, tmp_path: Path
) -> None:
    built = unigram_bytes(prepend_scheme)
    tokenizer = save(tmp_path, built)
    text = "an 🦉é東an"
    places = [(0, 2), (2, 3), *[(3, 4)] * 4, *[(4, 5)] * 2, *[(5, 6)] * 3, (6, 8)]
    # The library gives all unknown characters to each of their bytes.
    given = built.encode(text).offsets
    assert given == [*places[:2], *[(3, 6)] * 9, (6, 8)]
    if prepend_scheme == "never":
        places[0] = given[0]
    ids, offsets = tokenizer.encode(text)
    assert ids.tolist() == built.encode(text).ids
    np.testing.assert_array_equal(offsets, places)


Decode = Callable[[list[int]], str]


def library_decoder(tokenizer: Tokenizer) -> tuple[Decode, bool]:
    """The library's own decoder in the middle of a text, and whether it is byte-level.

    It stands between letters, as a decoder may treat the start of a text differently.
    """
    file = tokenizer.path / "tokenizer.json"
    if file.is_file():
        library = tokenizers.Tokenizer.from_file(str(file))
        a = library.token_to_id("a")
        spec = json.loads(file.read_text(encoding="utf-8"))["decoder"]
        parts = spec.get("decoders", [spec])
        return (
            lambda ids: library.decode([a, *ids, a], skip_special_tokens=False)[1:-1],
            any(part["type"] == "ByteLevel" for part in parts),
        )
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(file.with_name("tokenizer.model"))
    )
    a, unknown = model.piece_to_id("a"), model.unk_id()

    def decode(ids: list[int]) -> str:
        # It writes nothing for control pieces, and two question marks for the unknown
        # piece; transformers writes both out.
        text, run = "", []
        for token in [*ids, None]:
            if token is not None and not model.is_control(token) and token != unknown:
                run.append(token)
                continue
            text += model.decode([a, *run, a])[1:-1]
            text += "" if token is None else model.id_to_piece(token)
            run = []
        return text

    return decode, False


def expected_offsets(
    pieces: list[bytes], text: str, whole_parts: bool
) -> list[tuple[int, int]]:
    """Characters of the text that pieces stand for, byte by byte.

    Args:
      pieces: their bytes.
      text: of all pieces.
      whole_parts: a U+FFFD stands for a part of a character, otherwise for one byte.
    """
    data, place, char_of_byte = b"".join(pieces), 0, []
    for n, char in enumerate(text):
        width = len(char.encode())
        if not data.startswith(char.encode(), place):
            assert char == "\ufffd"
            width = 1
            if whole_parts:
                with pytest.raises(UnicodeDecodeError) as caught:
                    data[place:].decode()
                assert caught.value.start == 0
                width = caught.value.end
        char_of_byte += [n] * width
        place += width
    assert place == len(data)
    char_of_byte.append(len(text))
    offsets, place = [], 0
    for piece in pieces:
        start, last = char_of_byte[place], char_of_byte[place + max(len(piece) - 1, 0)]
        offsets.append((start, last + 1 if piece else start))
        place += len(piece)
    return offsets


@pytest.fixture
def assert_decodes_alike(
    any_tokenizer: Tokenizer,
) -> Callable[[np.ndarray | list[int]], None]:
    decode, byte_level = library_decoder(any_tokenizer)

    def check(ids: np.ndarray | list[int]) -> None:
        size = any_tokenizer.vocab_size
        known = [int(i) for i in ids if i < size]  # the others stand for no text
        text, offsets = any_tokenizer.decode_with_offsets(ids)
        assert text == decode(known)
        assert offsets.dtype == np.int32
        pieces = [any_tokenizer.pieces[i] if i < size else b"" for i in ids]
        expected = expected_offsets(pieces, text, byte_level)
        np.testing.assert_array_equal(offsets, np.reshape(expected, (-1, 2)))

    return check


def test_decoding_any_ids_is_the_same_as_by_the_library(
    any_tokenizer: Tokenizer,
    assert_decodes_alike: Callable[[np.ndarray | list[int]], None],
) -> None:
    rng = np.random.default_rng(3)
    for length in [0, 1, 2, 3, 50] * 20:
        # Some ids are beyond the vocabulary.
        ids = rng.integers(0, any_tokenizer.vocab_size + 40, length)
        assert_decodes_alike(ids)
        assert_decodes_alike(ids.tolist())


def test_decoding_characters_that_were_split_is_the_same_as_by_the_library(
    any_tokenizer: Tokenizer,
    assert_decodes_alike: Callable[[np.ndarray | list[int]], None],
) -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        ids = any_tokenizer.encode("a🦉é👩‍👧𓀀 東京" + random_text(rng, 6)).ids
        for end in range(len(ids) + 1):
            assert_decodes_alike(ids[:end])
        assert_decodes_alike(rng.permutation(ids))
        assert_decodes_alike(np.delete(ids, rng.integers(len(ids))))


def test_negative_ids_are_refused(any_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="negative id -1 at position 1"):
        any_tokenizer.decode([0, -1])


def test_pieces_outside_the_byte_alphabet_stand_for_themselves(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate([*alphabet, "a b", "東"])}
    built = tokenizers.Tokenizer(models.BPE(vocab, []))
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["</s>"])
    tokenizer = save(tmp_path, built)
    ids = [vocab["a b"], vocab["東"], vocab["Ġ"]]
    assert tokenizer.decode(ids) == built.decode(ids) == "a b東 "


def test_sequences_are_encoded_as_one_text_with_whole_explanations(
    any_tokenizer: Tokenizer, rlt: Template
) -> None:
    problem = Problem("an ant? é ﬁ", "in a  pan\n")
    texts = ["an e\u0301 ½ ﬁ 🦉 an \n x", "  an\n\n", "\n\nan", "1</s>23"]
    traces = [Trace(problem, text) for text in texts]
    student = Renderer(any_tokenizer, rlt, "student")
    teacher = Renderer(any_tokenizer, rlt, "teacher")
    prompt, _ = teacher.prompt(problem)
    for trace, learned, written in zip(
        traces,
        examples.student_examples(student, traces),
        examples.teacher_examples(teacher, traces),
        strict=True,
    ):
        explained = rlt.body(trace.explanation).removeprefix(rlt.pad)
        ending = rlt.explanation_tags[1] + any_tokenizer.end_of_turn
        whole = any_tokenizer.encode(prompt + explained + ending)
        np.testing.assert_array_equal(written.tokens, whole.ids)
        assert written.tokens[-1] == learned.tokens[-1]
        assert int(written.tokens[-1]) in any_tokenizer.stop_ids
        spans = [(one.tokens, one.explanation) for one in (learned, written)]
        left, right = (tokens[span.start : span.end] for tokens, span in spans)
        assert len(left)
        if np.array_equal(left, right):  # equal ids give equal segments
            for segments in examples.align(
                learned.explanation, written.explanation, same_ids=True
            ):
                np.testing.assert_array_equal(segments, np.arange(len(left)))


def growing(count: int) -> dict:
    step = {"type": "Replace", "pattern": {"String": "o"}, "content": "oo"}
    return {"type": "Sequence", "normalizers": [step] * count}


def test_hostile_tokenizers_are_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE({"</s>": 0, "a": 1}, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Fuse()
    spec = json.loads(tokenizer.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(spec | {"normalizer": growing(22)}))
    with pytest.raises(UserError, match="replacements make texts 100 times longer"):
        load_tokenizer(tmp_path)
    file.write_text(json.dumps(spec | {"normalizer": growing(2)}))
    assert load_tokenizer(tmp_path).encode("a").ids.tolist() == [1]
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated"}
    file.write_text(json.dumps(spec | {"pre_tokenizer": split | {"invert": False}}))
    with pytest.raises(UserError, match=r"damaged \(PanicException"):
        load_tokenizer(tmp_path).encode("a" * 30 + "!")
    added = spec["added_tokens"] + [
        spec["added_tokens"][0] | {"id": 2, "content": "b" * 10**5}
    ]
    file.write_text(json.dumps(spec | {"added_tokens": added}))
    with pytest.raises(UserError, match="its added tokens are too long"):
        load_tokenizer(tmp_path)


def test_texts_that_cannot_be_encoded_are_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="4,000,001 characters: shorten .xxxx"):
        tokenizer.encode("x" * 4_000_001)
    with pytest.raises(UserError, match="TypeError"):
        tokenizer.encode("\ud800")


def test_many_bad_bytes_take_no_longer() -> None:
    count = 200_000
    text, widths = _decode_invalid(b"a\xff" * count, np.zeros(2 * count, bool))
    assert text == "a\ufffd" * count and sum(widths) == 2 * count
