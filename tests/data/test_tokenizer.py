"""Ids, texts and character offsets, for every kind of tokenizer file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from rlt_jax.data.tokenizer import SHIPPED, Tokenizer, load_tokenizer
from rlt_jax.errors import UserError

TEXTS = [
    "",
    "hello world",
    " leading and  double  spaces ",
    "Start at 4: +3 *7 -2. Last digit?",
    "naïve café, 東京",
    "😀 and 👩‍👧!",
    "one\ntwo\n\n\tthree",
    "<|begin_of_thought|>3+4=7<|end_of_thought|><|end|>",
]
CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def write_config(folder: Path, **fields: object) -> Path:
    fields = {"eos_token": "</s>", "chat_template": CHAT} | fields
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer.json as of GPT-2 and Qwen, saved in the midst of padded training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"an": 256, "Ġan": 257}
    built = tokenizers.Tokenizer(models.BPE(vocab, [("a", "n"), ("Ġ", "an")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["</s>"])
    built.enable_truncation(4)
    built.enable_padding(length=9)
    folder = tmp_path_factory.mktemp("byte_level")
    built.save(str(folder / "tokenizer.json"))
    return load_tokenizer(write_config(folder))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer.json as of Gemma: spaces are U+2581, rare characters are bytes."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    letters = {char: 256 + i for i, char in enumerate("▁aeinorst")}
    model = models.BPE(bytes_ | letters, [], byte_fallback=True)
    built = tokenizers.Tokenizer(model)
    built.normalizer = normalizers.Replace(" ", "▁")
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    built.add_special_tokens(["</s>"])
    folder = tmp_path_factory.mktemp("byte_fallback")
    built.save(str(folder / "tokenizer.json"))
    return load_tokenizer(write_config(folder))


@pytest.fixture(params=["tokenizer", "byte_level", "byte_fallback", "deepseek"])
def lossless(request: pytest.FixtureRequest) -> Tokenizer:
    """Tokenizers that change no character."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_offsets_survive_the_round_trip(
    lossless: Tokenizer, text: str
) -> None:
    ids, offsets = lossless.encode(text)
    decoded, decoded_offsets = lossless.decode_with_offsets(ids)
    assert decoded == text == lossless.decode(ids)
    np.testing.assert_array_equal(offsets, decoded_offsets)
    assert ids.dtype == offsets.dtype == decoded_offsets.dtype == np.int32
    assert offsets.shape == (len(ids), 2)


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cover_the_text_in_order(lossless: Tokenizer, text: str) -> None:
    ids, offsets = lossless.encode(text)
    place = 0
    for start, end in offsets:
        # The next character, or again the one that tokens share the bytes of.
        assert start in (place, place - 1) and end > start
        place = end
    assert place == len(text)
    if text.isascii():  # so no character is shared
        for token, (start, end) in zip(ids, offsets, strict=True):
            assert lossless.decode([token]) == text[start:end]


def test_bytes_of_one_character_all_name_it(lossless: Tokenizer) -> None:
    ids, offsets = lossless.encode("a🦉")
    assert len(ids) > 2
    assert {tuple(pair) for pair in offsets[1:]} == {(1, 2)}


def test_tags_and_roles_are_single_tokens(tokenizer: Tokenizer) -> None:
    tags = ["<|begin_of_explanation|>", "<|end_of_solution|>", "<|user|>", "<|end|>"]
    ids, offsets = tokenizer.encode("x".join(tags))
    assert len(ids) == 2 * len(tags) - 1
    starts = np.cumsum([0] + [len(tag) + 1 for tag in tags[:-1]])
    np.testing.assert_array_equal(offsets[::2, 0], starts)
    assert tokenizer.stop_ids == (tokenizer.eos_id,) == (int(ids[-1]),)


def test_bytes_that_are_no_utf8_become_replacement_characters(
    lossless: Tokenizer,
) -> None:
    ids, _ = lossless.encode("a🦉n")
    # One byte of four is missing, in the middle of valid text.
    broken = np.delete(ids, len(ids) - 2)
    text, offsets = lossless.decode_with_offsets(broken)
    assert text[0] == "a" and text[-1] == "n"
    assert set(text[1:-1]) == {"\ufffd"}
    np.testing.assert_array_equal(offsets[0], [0, 1])
    np.testing.assert_array_equal(offsets[-1], [len(text) - 1, len(text)])
    assert (offsets[1:, 0] >= offsets[:-1, 0]).all()


def test_any_ids_have_a_text_with_offsets_inside(lossless: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, lossless.vocab_size, 30)
        text, offsets = lossless.decode_with_offsets(ids)
        assert offsets.shape == (30, 2)
        assert offsets.min() >= 0 and offsets.max() <= len(text)
        assert (np.diff(offsets[:, 0]) >= 0).all()
        assert (offsets[:, 1] >= offsets[:, 0]).all()
        assert offsets[-1, 1] == len(text)


def test_decoding_is_about_text_and_not_about_special_tokens(
    lossless: Tokenizer,
) -> None:
    ids = [*lossless.encode("a").ids, lossless.eos_id]
    eos = json.loads((lossless.path / "tokenizer_config.json").read_text())["eos_token"]
    eos = eos["content"] if isinstance(eos, dict) else eos
    assert lossless.decode(ids) == "a" + eos


def test_settings_of_truncation_and_padding_in_the_file_are_ignored(
    byte_level: Tokenizer,
) -> None:
    assert len(byte_level.encode("bcdefgh").ids) == 7
    assert len(byte_level.encode("b").ids) == 1


def test_merges_and_special_tokens_of_a_json_file(byte_level: Tokenizer) -> None:
    ids, offsets = byte_level.encode("ban an</s>")
    assert ids[1:].tolist() == [256, 257, 258]
    np.testing.assert_array_equal(offsets, [[0, 1], [1, 3], [3, 6], [6, 10]])
    assert byte_level.vocab_size == 259
    assert byte_level.eos_id == 258


def test_ids_equal_those_of_the_json_library(deepseek: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_file(str(deepseek.path / "tokenizer.json"))
    for text in TEXTS:
        ids = library.encode(text, add_special_tokens=False).ids
        assert deepseek.encode(text).ids.tolist() == ids


def test_ids_equal_those_of_the_sentencepiece_library(
    tokenizer: Tokenizer, sentencepiece_32k: Tokenizer
) -> None:
    for ours in (tokenizer, sentencepiece_32k):
        file = str(ours.path / "tokenizer.model")
        library = sentencepiece.SentencePieceProcessor(model_file=file)
        for text in TEXTS:
            assert ours.encode(text).ids.tolist() == library.encode(text)


def test_offsets_of_a_normalising_sentencepiece_model(
    sentencepiece_32k: Tokenizer,
) -> None:
    text = "The train leaves at noon."
    ids, offsets = sentencepiece_32k.encode(text)
    words = [text[start:end] for start, end in offsets]
    assert words == ["The", " train", " leaves", " at", " noon", "."]
    # The library puts a space before the first word, and text keeps it.
    assert sentencepiece_32k.decode(ids) == " " + text


def test_control_pieces_in_text_are_found(sentencepiece_32k: Tokenizer) -> None:
    # The SentencePiece library itself would spell them: "<", "/", "s", ">".
    ids, offsets = sentencepiece_32k.encode("one</s>two<pad>")
    assert sentencepiece_32k.eos_id == 1
    assert ids[[1, -1]].tolist() == [1, 0]
    np.testing.assert_array_equal(offsets[[1, -1]], [[3, 7], [10, 15]])
    one, two = sentencepiece_32k.encode("one").ids, sentencepiece_32k.encode("two").ids
    assert ids.tolist() == [*one, 1, *two, 0]
    assert sentencepiece_32k.decode([1]) == "</s>"


def test_the_shipped_chat_template(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Solve."},
        {"role": "user", "content": "1+1?"},
    ]
    assert tokenizer.render(messages) == (
        "<|system|>Solve.<|end|><|user|>1+1?<|end|><|assistant|>"
    )


def test_chat_templates_see_special_tokens_and_may_refuse(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED["embedded"], tmp_path, dirs_exist_ok=True)
    template = (
        "{% if messages[0]['role'] != 'user' %}"
        "{{ raise_exception('no system prompt') }}{% endif %}"
        "{{ bos_token }}{% for m in messages %}{% if loop.first %}{% continue %}"
        "{% endif %}{{ m['content'] }}{% endfor %}{{ eos_token }}"
    )
    eos = {"content": "<|end|>", "lstrip": False}  # both spellings are in use
    write_config(tmp_path, eos_token=eos, bos_token="B", chat_template=template)
    chat = load_tokenizer(tmp_path)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert chat.render(turns) == "By<|end|>"
    with pytest.raises(UserError, match="no system prompt"):
        chat.render([{"role": "system", "content": "x"}])


def test_a_chat_template_may_lie_in_a_file_of_its_own(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED["embedded"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    turns = [{"role": "user", "content": "x"}]
    assert load_tokenizer(tmp_path).render(turns) == "x!"


def test_the_default_of_several_chat_templates_is_used(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED["embedded"], tmp_path, dirs_exist_ok=True)
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "chat {{ strftime_now('%Y') | length }}"},
    ]
    write_config(tmp_path, eos_token="<|end|>", chat_template=named)
    assert load_tokenizer(tmp_path).render([]) == "chat 4"


@pytest.mark.parametrize(
    ("stated", "stops"), [(None, {6}), (6, {6}), (3, {3, 6}), ([6, 4, 2], {2, 4, 6})]
)
def test_the_model_may_state_more_stop_tokens(
    tmp_path: Path, stated: object, stops: set[int]
) -> None:
    shutil.copytree(SHIPPED["embedded"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({} if stated is None else {"eos_token_id": stated}))
    assert set(load_tokenizer(tmp_path).stop_ids) == stops


def test_the_chat_of_a_real_tokenizer(deepseek: Tokenizer) -> None:
    text = deepseek.render([{"role": "user", "content": "1+1?"}])
    assert text.startswith("<｜begin▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜>")
    ids = deepseek.encode(text).ids
    assert deepseek.decode(ids[:2]) == "<｜begin▁of▁sentence｜><｜User｜>"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer_config.json"):
        load_tokenizer(tmp_path)
    write_config(tmp_path)
    with pytest.raises(UserError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    model = SHIPPED["embedded"] / "tokenizer.model"
    shutil.copyfile(model, tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="eos_token '</s>' .* not in the vocabulary"):
        load_tokenizer(tmp_path)
    write_config(tmp_path, eos_token=None)
    with pytest.raises(UserError, match="eos_token ''"):
        load_tokenizer(tmp_path)
    write_config(tmp_path, eos_token="<|end|>", chat_template=None)
    # Sequences of texts alone need none.
    bare = load_tokenizer(tmp_path)
    assert bare.end_of_turn == "<|end|>" and bare.takes_system
    with pytest.raises(UserError, match="has a chat template"):
        bare.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("eos_token_id", "added"), [(7, [7]), ([7, 9], [7, 9]), (None, [])]
)
def test_generation_config_adds_stop_ids(
    tmp_path: Path, eos_token_id: int | list[int] | None, added: list[int]
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(SHIPPED["embedded"], folder)
    eos = load_tokenizer(folder).eos_id
    assert load_tokenizer(folder).stop_ids == (eos,)
    text = json.dumps({"eos_token_id": eos_token_id})
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    assert load_tokenizer(folder).stop_ids == tuple(sorted({eos, *added}))


def test_a_chat_template_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(SHIPPED["embedded"], folder)
    (folder / "chat_template.jinja").write_text("[{{ messages[0].content }}]")
    assert load_tokenizer(folder).render([{"role": "user", "content": "q"}]) == "[q]"


def published_texts(shared: Path) -> list[str]:
    texts = []
    for file in ("gsm8k/test.jsonl", "aime24/test.jsonl"):
        lines = (shared / "data" / file).read_text(encoding="utf-8").splitlines()
        for line in lines[:300]:
            row = json.loads(line)
            texts += [value for value in row.values() if isinstance(value, str)]
    return texts


def test_published_problems_survive_a_real_byte_level_tokenizer(shared: Path) -> None:
    folder = shared / "data" / "tokenizers" / "deepseek_r1"
    tokenizer = load_tokenizer(folder)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in published_texts(shared):
        ids, offsets = tokenizer.encode(text)
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        for token, (start, end) in zip(ids, offsets, strict=True):
            piece = tokenizer.decode([token])
            assert piece == text[start:end] or "\ufffd" in piece


def test_published_problems_survive_a_real_sentencepiece_model(
    shared: Path, tmp_path: Path
) -> None:
    source = shared / "data" / "tokenizers" / "sentencepiece_32k" / "tokenizer.model"
    shutil.copy(source, tmp_path)
    tokenizer = load_tokenizer(write_config(tmp_path))
    library = sentencepiece.SentencePieceProcessor(model_file=str(source))
    for text in published_texts(shared):
        ids, offsets = tokenizer.encode(text)
        assert ids.tolist() == library.encode(text)
        starts, ends = offsets[:, 0], offsets[:, 1]
        assert (starts[1:] >= starts[:-1]).all()
        assert ends.max() <= len(text)
        if library.unk_id() in ids:
            continue  # a character that this model cannot write
        # It was trained to fold runs of white space.
        assert tokenizer.decode(ids).split() == library.decode(ids.tolist()).split()
