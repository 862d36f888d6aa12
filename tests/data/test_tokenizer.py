"""Ids, texts and character offsets, for every kind of tokenizer file."""

import json
import shutil
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

from rlt_jax.data import codecs
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


def save_fast(folder: Path, built: tokenizers.Tokenizer, **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    return write_config(folder, **fields)


def small_byte_level(**options: object) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"an": 256, "Ġan": 257}
    model = models.BPE(vocab, [("a", "n"), ("Ġ", "an")])
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.ByteLevel(
        **{"add_prefix_space": False} | options
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["</s>"])
    return built


def small_gemma() -> tokenizers.Tokenizer:
    """Runs of spaces and newlines are added tokens that are not special."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    letters = {char: 256 + i for i, char in enumerate("▁aeinorst\n")}
    built = tokenizers.Tokenizer(models.BPE(bytes_ | letters, [], byte_fallback=True))
    built.normalizer = normalizers.Replace(" ", "▁")
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    built.add_tokens([AddedToken(t, normalized=False) for t in ("▁▁", "▁▁▁", "\n\n")])
    built.add_special_tokens(["</s>"])
    return built


@pytest.mark.parametrize(
    "processor",
    [
        processors.ByteLevel(trim_offsets=True),
        processors.RobertaProcessing(("</s>", 258), ("</s>", 258), trim_offsets=True),
        processors.TemplateProcessing(
            single="</s> $A </s>", special_tokens=[("</s>", 258)]
        ),
    ],
)
def test_offsets_are_those_of_the_bytes_whatever_the_tokenizer_trims(
    processor: processors.PostProcessor, tmp_path: Path
) -> None:
    built = small_byte_level()
    built.post_processor = processor
    tokenizer = load_tokenizer(save_fast(tmp_path, built))
    text = "  an  (an) \n\n an"
    ids, offsets = tokenizer.encode(text)
    assert ids.tolist() == built.encode(text, add_special_tokens=False).ids
    np.testing.assert_array_equal(offsets, tokenizer.decode_with_offsets(ids)[1])
    assert "".join(text[start:end] for start, end in offsets) == text


def test_offsets_of_a_changed_text_are_those_of_the_library(tmp_path: Path) -> None:
    built = small_byte_level()
    built.normalizer = normalizers.NFKC()
    built.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = load_tokenizer(save_fast(tmp_path, built))
    text = "ﬁ an e\u0301 ½"
    ids, offsets = tokenizer.encode(text)
    assert tokenizer.decode(ids) == "fi an é 1⁄2"
    parts = [text[start:end] for start, end in offsets]
    # Characters of several bytes stand at each of their tokens.
    assert parts == ["ﬁ", "ﬁ", " an", " ", "e", "e", " ", *["½"] * 5]
    built.post_processor = processors.ByteLevel(trim_offsets=False)
    assert offsets.tolist() == list(map(list, built.encode(text).offsets))


def test_empty_offsets_of_the_library_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in tokenizers 0.19.1 and 0.20.0, for a vocabulary that ignores merges.
    folder = save_fast(tmp_path, small_byte_level())

    def empty(pairs: list[tuple[int, int]]) -> np.ndarray:
        return np.zeros((len(pairs), 2), np.int32)

    monkeypatch.setattr(codecs, "_to_offsets", empty)
    with pytest.raises(UserError, match="offsets .* are wrong.*Install a newer"):
        load_tokenizer(folder)


def test_runs_of_spaces_are_decoded_as_by_the_library(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_fast(tmp_path, small_gemma()))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a▁▁b", "a▁▁▁▁é\n\n\n", "▁▁a", "a  b", "a   e  ▁▁"):
        ids, offsets = tokenizer.encode(text)
        assert ids.tolist() == library.encode(text).ids
        assert tokenizer.decode(ids) == library.decode(ids.tolist())
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        assert "".join(text[a:b] for a, b in np.unique(offsets, axis=0)) == text
    run = library.token_to_id("▁▁")
    assert tokenizer.decode([library.token_to_id("a"), run, run]) == "a    "


def test_added_tokens_stand_for_what_the_librarys_decoder_gives(tmp_path: Path) -> None:
    built = small_byte_level()
    added = ["a b", "▁", "é", "<｜User▁x｜>", "Ġ"]
    built.add_tokens([AddedToken(text, normalized=False) for text in added])
    tokenizer = load_tokenizer(save_fast(tmp_path, built))
    for text in added:
        ids = tokenizer.encode(f"n{text}n").ids
        assert ids[1] == built.token_to_id(text) and len(ids) == 3
        assert tokenizer.decode(ids) == built.decode(ids.tolist())


@pytest.mark.parametrize("kind", ["WordPiece", "BPEDecoder", "none"])
def test_decoders_that_put_in_spaces_are_refused(kind: str, tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "</s>": 1, "an": 2, "##n": 3, "in</w>": 4}
    built = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind != "none":
        built.decoder = getattr(decoders, kind)()
    with pytest.raises(UserError, match="its decoder is not supported"):
        load_tokenizer(save_fast(tmp_path, built))


def test_spaces_of_a_sentencepiece_model_are_spaces_wherever_they_are_listed(
    tmp_path: Path,
) -> None:
    # As of Gemma, whose tokenizer_config.json lists its runs of spaces once more.
    runs = {"user_defined_symbols": ["▁▁", "▁▁▁"], "add_dummy_prefix": False}
    train_llama_2(tmp_path, **runs)
    file = str(tmp_path / "tokenizer.model")
    library = sentencepiece.SentencePieceProcessor(model_file=file)
    ids = {text: library.piece_to_id(text) for text in ("▁▁", "▁▁▁", "</s>")}
    listed = {str(token): {"content": text} for text, token in ids.items()}
    tokenizer = load_tokenizer(write_config(tmp_path, added_tokens_decoder=listed))
    for text in ("an  an", "   an▁▁in", "an  </s>   "):
        encoded = tokenizer.encode(text)
        assert tokenizer.decode(encoded.ids) == text.replace("▁", " ")
        assert ids["▁▁"] in encoded.ids or ids["▁▁▁"] in encoded.ids


def test_a_space_that_is_there_belongs_to_its_token(tmp_path: Path) -> None:
    train_llama_2(tmp_path, remove_extra_whitespaces=True)
    tokenizer = load_tokenizer(write_config(tmp_path))
    # The library counts it as removed, and the same space of its own as added.
    for text in (" an", "</s> an in", " in</s> sis"):
        ids, offsets = tokenizer.encode(text)
        decoded, places = tokenizer.decode_with_offsets(ids)
        assert decoded == text and offsets[0, 0] == 0
        np.testing.assert_array_equal(offsets, places)


IM = {"<|im_start|>": 0, "<|im_end|>": 1, "<tool>": 2}  # after the ids of the model


@pytest.mark.parametrize("place", ["added_tokens.json", "added_tokens_decoder"])
def test_added_tokens_of_a_sentencepiece_model_have_their_ids(
    place: str, tmp_path: Path
) -> None:
    source = SHIPPED["embedded"] / "tokenizer.model"
    shutil.copy(source, tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(source))
    ids = {text: library.get_piece_size() + n for text, n in IM.items()}
    fields: dict[str, object] = {"eos_token": "<|im_end|>", "chat_template": None}
    if place == "added_tokens.json":
        (tmp_path / place).write_text(json.dumps(ids))
    else:
        fields[place] = {str(i): {"content": text} for text, i in ids.items()}
    write_config(tmp_path, **fields)
    tokenizer = load_tokenizer(tmp_path, "chatml")
    text = "<|im_start|>user\na b<|im_end|>\n<tool>"
    encoded = tokenizer.encode(text)
    middle = library.encode("user\na b")
    newline = library.encode("\n")
    start, end, tool = ids.values()
    assert encoded.ids.tolist() == [start, *middle, end, *newline, tool]
    assert tokenizer.decode(encoded.ids) == text
    np.testing.assert_array_equal(
        encoded.offsets, tokenizer.decode_with_offsets(encoded.ids)[1]
    )
    assert tokenizer.vocab_size == tool + 1
    assert tokenizer.stop_ids == (end,) == (tokenizer.eos_id,)


def train_llama_2(folder: Path, **options: object) -> int:
    """A SentencePiece model as of Llama 2; returns its number of pieces."""
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["an ant and a pan in an inn", "sis snaps 12 pins"]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
        **{"remove_extra_whitespaces": False} | options,
    )
    file = str(folder / "tokenizer.model")
    return sentencepiece.SentencePieceProcessor(model_file=file).get_piece_size()


def llama_2_config(size: int, **fields: object) -> dict[str, object]:
    token = {"content": "<|im_start|>", "normalized": False, "special": True}
    listed = {"added_tokens_decoder": {str(size): token}}
    return {"tokenizer_class": "LlamaTokenizer"} | listed | fields


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}])
def test_ids_after_added_tokens_are_those_of_transformers(
    options: dict[str, object], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    size = train_llama_2(tmp_path, **options)
    fields = llama_2_config(size, legacy=True)
    if options:
        fields["add_prefix_space"] = False
    ours = load_tokenizer(write_config(tmp_path, **fields))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("an <|im_start|>ant", "<|im_start|>a🦉n</s>\nan  a", "</s><s>in"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text).ids.tolist() == ids


@pytest.mark.parametrize(
    ("options", "fields", "name"),
    [
        ({}, {"legacy": False}, "legacy=false"),
        (
            {},
            {"added_tokens_decoder": {"999": {"content": "x", "rstrip": 1}}},
            "rstrip",
        ),
        ({"add_dummy_prefix": False}, {"legacy": False}, ""),
        ({}, {}, ""),
    ],
)
def test_what_a_sentencepiece_model_cannot_do_needs_a_json_file(
    options: dict[str, object], fields: dict[str, object], name: str, tmp_path: Path
) -> None:
    size = train_llama_2(tmp_path, **options)
    write_config(tmp_path, **llama_2_config(size, **fields))
    if not name:
        assert load_tokenizer(tmp_path).vocab_size == size + 1
        return
    with pytest.raises(UserError, match=rf": {name}, .* Save .* as tokenizer.json"):
        load_tokenizer(tmp_path)


FLAGS = dict.fromkeys(["lstrip", "rstrip", "single_word", "normalized"], False)


@pytest.mark.parametrize(
    "listed",
    [
        {259: {"content": "<tool>"} | FLAGS},
        {259: {"content": "<tool>"} | FLAGS, 270: {"content": "<t2>"} | FLAGS},
        {258: {"content": "</s>"} | FLAGS | {"lstrip": True, "rstrip": True}},
        {258: {"content": "</s>"} | FLAGS | {"single_word": True}},
    ],
)
def test_added_tokens_of_the_config_have_the_last_word_over_a_json_file(
    listed: dict[int, dict[str, object]], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    fields = {"added_tokens_decoder": {str(i): token for i, token in listed.items()}}
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<old>": 300}))
    ours = load_tokenizer(save_fast(tmp_path, small_byte_level(), **fields))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("an <tool> an </s> an</s>an", "<t2> x<old>"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text).ids.tolist() == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_older_folders_list_added_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fields = {"tokenizer_class": "PreTrainedTokenizerFast"}
    save_fast(tmp_path, small_byte_level(), **fields)
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 259, "</s>": 258}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "an<tool> an</s>"
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(tmp_path).encode(text).ids.tolist() == ids
    assert 259 in ids


def test_ids_without_a_row_in_the_embedding_are_refused_by_name(tmp_path: Path) -> None:
    built = small_byte_level()
    rows = built.get_vocab_size()
    built.add_special_tokens(["<e>", "</e>"])
    folder = save_fast(tmp_path / "tags", built)
    message = rf"the embedding of the model has {rows} rows, none for <e>, </e>\."
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder, embeddings=rows)
    assert load_tokenizer(folder, embeddings=rows + 2).vocab_size == rows + 2
    with pytest.raises(UserError, match=r"none for .*ids up to 257"):
        load_tokenizer(folder, embeddings=200)
    shutil.copytree(SHIPPED["embedded"], tmp_path / "model")
    size = load_tokenizer("embedded").vocab_size
    (tmp_path / "model" / "added_tokens.json").write_text(json.dumps({"<e>": size}))
    with pytest.raises(UserError, match=rf"has {size} rows, none for <e>\."):
        load_tokenizer(tmp_path / "model", embeddings=size)
    stops = json.dumps({"eos_token_id": [6, size + 3]})
    (tmp_path / "model" / "generation_config.json").write_text(stops)
    with pytest.raises(UserError, match=rf"none for id {size + 3} \(eos_token_id\)\."):
        load_tokenizer(tmp_path / "model", embeddings=size + 1)


def test_tokens_of_images_never_reach_a_model_that_lacks_them(tmp_path: Path) -> None:
    built = small_byte_level()
    rows = built.get_vocab_size()
    built.add_special_tokens(["<image_soft_token>"])
    folder = save_fast(tmp_path, built)
    tokenizer = load_tokenizer(folder, embeddings=rows)
    text = "an <image_soft_token></s>"
    encoded = tokenizer.encode(text)
    assert tokenizer.vocab_size == rows and encoded.ids.max() < rows
    assert tokenizer.decode(encoded.ids) == text
    whole = load_tokenizer(folder).encode(text).ids
    assert whole.tolist()[-2:] == [rows, tokenizer.eos_id]
    built.add_special_tokens(["<|VISION|>", "<revision>"])
    with pytest.raises(UserError, match="none for <revision>\\."):
        load_tokenizer(save_fast(tmp_path / "more", built), embeddings=rows)


def test_an_end_token_that_is_encoded_as_several_is_refused(tmp_path: Path) -> None:
    spec = json.loads(small_byte_level().to_str())
    spec["model"]["vocab"]["<e>"] = 300  # no merges lead to it
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    write_config(tmp_path, eos_token="<e>")
    with pytest.raises(
        UserError, match="'<e>', which ends a turn, is encoded as several"
    ):
        load_tokenizer(tmp_path)
    write_config(tmp_path, eos_token="an")
    assert load_tokenizer(tmp_path).stop_ids == (256,)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip"])
def test_an_end_of_turn_that_takes_whitespace_is_one_token(
    flag: str, tmp_path: Path
) -> None:
    built = small_byte_level()
    built.add_special_tokens([AddedToken("<|end|>", **{flag: True}, special=True)])
    chat = "{% for m in messages %}{{ m.content }}\n<|end|>\n{% endfor %}"
    tokenizer = load_tokenizer(save_fast(tmp_path, built, chat_template=chat))
    assert tokenizer.end_of_turn == "\n<|end|>"
    end = built.token_to_id("<|end|>")
    assert tokenizer.stop_ids == (tokenizer.eos_id, end)
    ids, offsets = tokenizer.encode("an\n<|end|>\nan")
    assert ids.tolist().count(end) == 1
    assert (offsets[1:, 0] == offsets[:-1, 1]).all() and offsets[-1, 1] == 13
