"""Damaged and hostile tokenizers: each is valid, or one message names the file."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers

from rlt_jax.data import codecs
from rlt_jax.data.tokenizer import SHIPPED, load_tokenizer
from rlt_jax.errors import UserError
from tests.data.mutations import (
    COUNTS,
    TEXTS,
    check_settings,
    message_of,
    mutated_bytes,
    mutated_json,
)

CHAT = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
CONFIG: dict[str, Any] = {
    "eos_token": {"content": "</s>", "lstrip": False, "special": True},
    "bos_token": "</s>",
    "chat_template": [{"name": "default", "template": CHAT}],
    "chat_template_kwargs": {"enable_thinking": False},
    "extra_special_tokens": {"image_token": "<image>"},
    "added_tokens_decoder": {"258": {"content": "</s>", "special": True}},
}
# The files beside tokenizer.json or tokenizer.model.
OTHERS: dict[str, Any] = {
    "tokenizer_config.json": CONFIG,
    "generation_config.json": {"eos_token_id": [258, 1], "top_p": 0.9},
    "special_tokens_map.json": {"eos_token": "</s>", "pad_token": {"content": "</s>"}},
    "added_tokens.json": {"</s>": 258},
}


def byte_level() -> dict[str, Any]:
    """The content of a tokenizer.json as of Qwen."""
    vocab = {char: i for i, char in enumerate(ALPHABET)} | {"an": 256, "Ġan": 257}
    built = tokenizers.Tokenizer(models.BPE(vocab, [("a", "n"), ("Ġ", "an")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["</s>"])
    return json.loads(built.to_str())


def unigram() -> dict[str, Any]:
    """The content of a tokenizer.json that was a SentencePiece model."""
    letters = [(char, -3.0 - n) for n, char in enumerate("▁aeinorst")]
    vocab = [("<unk>", 0.0), *((piece, -20.0) for piece in BYTES), *letters]
    built = tokenizers.Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    built.add_special_tokens(["</s>"])
    return json.loads(built.to_str())


SPECS = {"byte level": byte_level(), "unigram": unigram()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer, to be damaged."""
    write(tmp_path / "tokenizer.json", SPECS["byte level"])
    for name, content in OTHERS.items():
        write(tmp_path / name, content)
    return tmp_path


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A SentencePiece tokenizer, to be damaged."""
    return Path(shutil.copytree(SHIPPED["embedded"], tmp_path / "pieces"))


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def use(folder: Path) -> None:
    """Loads a tokenizer; encodes, decodes and renders with it."""
    loaded = load_tokenizer(folder, embeddings=1000)
    for text in ("hello 12\n\n", "naïve 東京 😀", ""):
        loaded.decode(loaded.encode(text).ids)
    if loaded.chat is not None:
        loaded.render([{"role": "user", "content": "x"}])


def test_the_unchanged_tokenizers_are_valid(folder: Path, pieces: Path) -> None:
    use(folder)
    use(pieces)
    write(folder / "tokenizer.json", SPECS["unigram"])
    write(folder / "tokenizer_config.json", {"eos_token": "</s>"})
    use(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", *OTHERS])
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:8])
def test_a_file_that_is_no_json_is_named(name: str, text: str, folder: Path) -> None:
    if name == "special_tokens_map.json":  # of older folders
        older = {k: v for k, v in CONFIG.items() if k != "added_tokens_decoder"}
        write(folder / "tokenizer_config.json", older)
    (folder / name).write_text(text)
    with pytest.raises(UserError) as raised:
        use(folder)
    assert name in str(raised.value) and str(folder) in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("name", ["tokenizer.json", *OTHERS])
def test_a_file_that_is_no_text_is_named(name: str, folder: Path) -> None:
    write(folder / "tokenizer_config.json", {"eos_token": "</s>"})
    (folder / name).write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(UserError, match=f"{folder}.*{name}"):
        use(folder)


DAMAGED = "tokenizer.json, tokenizer.model or an added token is damaged"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tokenizer_config.json", {"eos_token": None}, "eos_token '' of tokenizer_c"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token 5 of tokenizer_config"),
        ("tokenizer_config.json", {"eos_token": ["</s>"]}, r"eos_token \['</s>'\] of"),
        ("tokenizer_config.json", {"eos_token": {}}, "eos_token None of"),
        ("tokenizer_config.json", {"eos_token": {"content": 5}}, "eos_token 5 of"),
        ("tokenizer_config.json", {"eos_token": "<end>"}, "eos_token '<end>' of"),
        ("tokenizer_config.json", {"eos_token": "\ud800"}, "_config.json is damaged"),
        (
            "tokenizer_config.json",
            {"chat_template_kwargs": []},
            "has to be keys, values: ",
        ),
        (
            "tokenizer_config.json",
            {"chat_template_kwargs": None},
            "has to be keys, values: ",
        ),
        ("tokenizer_config.json", {"chat_template": 5}, "chat template is no text"),
        ("tokenizer_config.json", {"chat_template": [5]}, "chat template is no text"),
        ("tokenizer_config.json", {"chat_template": {"default": 5}}, "is no text"),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, "is no text"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": [], "template": ""}]},
            "chat template is no text, or has no name",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": 5, "template": "x"}]},
            "chat template is no text, or has no name: 5",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": None}, DAMAGED),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, DAMAGED),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, DAMAGED),
        ("tokenizer_config.json", {"added_tokens_decoder": {"258": "x"}}, DAMAGED),
        ("tokenizer_config.json", {"added_tokens_decoder": {"258": {}}}, DAMAGED),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"-1": {"content": "x"}}},
            "an added token has the id -1",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"1000000000": {"content": "x"}}},
            "an added token has the id 1000000000",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"258": {"content": "</s>", "special": "yes"}}},
            DAMAGED,
        ),
        ("generation_config.json", {"eos_token_id": "258"}, "eos_token_id='258'; give"),
        ("generation_config.json", {"eos_token_id": [1, "2"]}, "eos_token_id=.1, '2'"),
        ("generation_config.json", {"eos_token_id": 2.5}, "eos_token_id=2.5; give an"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id=True; give"),
        ("generation_config.json", {"eos_token_id": -1}, "eos_token_id=-1; give an id"),
        ("generation_config.json", {"eos_token_id": {}}, "eos_token_id={}; give an id"),
        ("generation_config.json", {"eos_token_id": [[1]]}, r"eos_token_id=\[\[1\]\]"),
        (
            "generation_config.json",
            {"eos_token_id": 10**30},
            "1000 rows, none for id 1",
        ),
        ("tokenizer.json", {"model": None}, DAMAGED),
        ("tokenizer.json", {"model": {}}, DAMAGED),
        ("tokenizer.json", {"model": {"type": "Other"}}, DAMAGED),
        ("tokenizer.json", {"added_tokens": {"a": 1}}, DAMAGED),
        ("tokenizer.json", {"added_tokens": [5]}, DAMAGED),
        ("tokenizer.json", {"added_tokens": [{"id": "x", "content": "y"}]}, DAMAGED),
        ("tokenizer.json", {"decoder": "ByteLevel"}, DAMAGED),
        ("tokenizer.json", {"decoder": None}, "its decoder is not supported"),
        ("tokenizer.json", {"decoder": {"type": "Sequence"}}, DAMAGED),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Other"}}, DAMAGED),
        ("tokenizer.json", {"normalizer": []}, DAMAGED),
    ],
)
def test_a_wrong_value_is_named(
    name: str, changes: dict[str, Any], message: str, folder: Path
) -> None:
    content = json.loads((folder / name).read_text()) | changes
    write(folder / name, content)
    if name == "tokenizer.json":
        write(folder / "tokenizer_config.json", {"eos_token": "</s>"})
    with pytest.raises(UserError, match=message) as raised:
        use(folder)
    assert str(folder) in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ({"an": 255}, [["a", "n"]], "tokenizer.json: an id is used twice, or is"),
        ({"an": 10**9}, [["a", "n"]], "tokenizer.json: an id is used twice, or is"),
        ({"an": 2**40}, [["a", "n"]], DAMAGED),
        ({"an": -1}, [["a", "n"]], DAMAGED),
        ({"an": None}, [["a", "n"]], DAMAGED),
        ({"an": 2.0}, [["a", "n"]], DAMAGED),
        ({"an": 256}, [["a", "東"]], f"{DAMAGED}.*Token `東` out of vocabulary"),
        ({}, [["a", "n"]], f"{DAMAGED}.*Token `an` out of vocabulary"),
        ({"an": 256}, [["a"]], DAMAGED),
        ({"an": 256}, [5], DAMAGED),
        ({"an": 256}, {"a": "n"}, DAMAGED),
        ({"an": 256}, ["a n o"], DAMAGED),
    ],
)
def test_a_wrong_vocabulary_is_named(
    vocab: dict[str, Any], merges: Any, message: str, folder: Path
) -> None:
    letters = {char: i for i, char in enumerate(ALPHABET)}
    spec = SPECS["byte level"]
    model = spec["model"] | {"vocab": letters | vocab, "merges": merges}
    write(folder / "tokenizer.json", spec | {"model": model})
    begin = time.process_time()
    with pytest.raises(UserError, match=message) as raised:
        use(folder)
    assert str(folder) in str(raised.value)
    assert time.process_time() - begin < 10


def test_a_vocabulary_may_have_holes(folder: Path) -> None:
    spec = SPECS["byte level"]
    model = spec["model"] | {"vocab": spec["model"]["vocab"] | {"zz": 900}}
    write(folder / "tokenizer.json", spec | {"model": model})
    loaded = load_tokenizer(folder)
    assert loaded.vocab_size == 901
    assert loaded.decode([900, 500, 901]) == "zz"


def test_a_template_file_that_is_no_text_is_named(folder: Path) -> None:
    for name in ("chat_template.jinja", "additional_chat_templates/x.jinja", "own"):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"\xff{{ x }}")
        with pytest.raises(UserError, match=f"^tokenizer {folder}: .*is no text"):
            load_tokenizer(folder, str(file) if name == "own" else "")
        file.unlink()


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 99, b"\x0a\xff\xff\xff\xff\x0f", b"{}"]
)
def test_a_model_that_is_none_is_named(content: bytes, pieces: Path) -> None:
    (pieces / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=f"tokenizer {pieces}: {DAMAGED} "):
        use(pieces)


def test_pieces_that_contradict_their_types_are_named(pieces: Path) -> None:
    file = pieces / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    byte = next(piece for piece in model.pieces if piece.piece == "<0x41>")
    byte.piece = "<0xZZ>"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=f"tokenizer {pieces}: {DAMAGED}"):
        use(pieces)


class PanicException(BaseException):
    """Named as the class that stands for a panic in Rust."""


@pytest.mark.parametrize("error", [PanicException, RuntimeError, MemoryError])
def test_a_panic_of_the_library_is_a_message(
    error: type[BaseException], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error("called `Option::unwrap()` on a `None` value\nsecond line")

    monkeypatch.setattr(codecs.FastCodec, "__init__", fail)
    message = rf"{DAMAGED} \({error.__name__}: called `Option.*value\)\.$"
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_stays_one(
    error: type[BaseException], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(codecs.FastCodec, "__init__", fail)
    with pytest.raises(error):
        load_tokenizer(folder)


SOME, MANY = COUNTS
EXAMPLES = pytest.mark.parametrize(
    "examples", [SOME, pytest.param(MANY, marks=pytest.mark.slow)]
)


@EXAMPLES
@pytest.mark.parametrize("kind", SPECS)
def test_any_tokenizer_json_is_valid_or_named(
    kind: str, examples: int, folder: Path
) -> None:
    write(folder / "tokenizer_config.json", {"eos_token": "</s>"})
    (folder / "generation_config.json").unlink()
    (folder / "added_tokens.json").unlink()
    spec, whole = SPECS[kind], json.dumps(SPECS[kind]).encode()
    texts = mutated_json(spec).map(lambda x: json.dumps(x).encode())

    @check_settings(examples)
    @given(st.one_of(texts, texts, mutated_bytes(whole)))
    def check(content: bytes) -> None:
        (folder / "tokenizer.json").write_bytes(content)
        message_of(lambda: use(folder), str(folder))

    check()


@EXAMPLES
def test_any_other_file_is_valid_or_named(examples: int, folder: Path) -> None:
    outcomes = []

    @check_settings(examples)
    @given(st.sampled_from(list(OTHERS)), st.data())
    def check(name: str, data: st.DataObject) -> None:
        write(folder / name, data.draw(mutated_json(OTHERS[name])))
        outcomes.append(message_of(lambda: use(folder), str(folder)))
        write(folder / name, OTHERS[name])

    check()
    assert 0 < sum(map(bool, outcomes)) < len(outcomes)


@EXAMPLES
def test_any_tokenizer_model_is_valid_or_named(examples: int, pieces: Path) -> None:
    file = pieces / "tokenizer.model"
    whole = file.read_bytes()

    @check_settings(examples)
    @given(mutated_bytes(whole, 2000))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        message_of(lambda: use(pieces), str(pieces))

    check()


@EXAMPLES
def test_any_pieces_are_valid_or_named(examples: int, pieces: Path) -> None:
    """The file is one of the library, but its content makes no sense."""
    file = pieces / "tokenizer.model"
    whole = file.read_bytes()
    model = sentencepiece_model_pb2.ModelProto.FromString(whole)
    texts = st.sampled_from(["", "▁", "<0x41>", "<0xZZ>", "a", "</s>", "\0", "é"])
    change = st.tuples(
        st.integers(0, len(model.pieces) - 1),
        st.one_of(st.none(), texts),
        st.one_of(st.none(), st.integers(1, 6)),
        st.one_of(st.none(), st.sampled_from([0.0, -1.0, float("nan"), 1e38])),
    )

    @check_settings(examples)
    @given(st.lists(change, min_size=1, max_size=9), st.integers(-2, 300))
    def check(changes: list, unknown: int) -> None:
        changed = sentencepiece_model_pb2.ModelProto.FromString(whole)
        for place, text, kind, score in changes:
            piece = changed.pieces[place]
            piece.piece = piece.piece if text is None else text
            piece.type = piece.type if kind is None else kind
            piece.score = piece.score if score is None else score
        if unknown > 200:
            changed.trainer_spec.unk_id = unknown
        file.write_bytes(changed.SerializeToString())
        message_of(lambda: use(pieces), str(pieces))

    check()
