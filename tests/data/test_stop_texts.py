"""Where a completion ends, whatever tokens its stop text is made of."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from rlt_jax.data.stop_texts import stop_finder
from rlt_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlt_jax.errors import UserError

TAG = "</think>"


def pieces(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Tokens of texts that were encoded apart."""
    return [int(i) for part in parts for i in tokenizer.encode(part).ids]


def slowly(tokenizer: Tokenizer, tokens: list[int], stop: list[str]) -> int | None:
    """The same from the beginning, a token more at a time."""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        if any(part in text for part in stop):
            return end
    return None


def test_a_text_is_found_however_it_is_cut(tokenizer: Tokenizer) -> None:
    find = stop_finder(tokenizer, [TAG])
    for cut in range(len(TAG)):
        tokens = pieces(tokenizer, "so it is 9 <", TAG[:cut], TAG[cut:], " and on")
        before = len(pieces(tokenizer, "so it is 9 <", TAG[:cut], TAG[cut:]))
        assert find(tokens, len(tokens)) == before


def test_the_token_that_completes_it_may_say_more(tokenizer: Tokenizer) -> None:
    whole = pieces(tokenizer, " the")
    assert len(whole) == 1, "a poor example"
    tokens = pieces(tokenizer, "a") + whole + pieces(tokenizer, " cat")
    find = stop_finder(tokenizer, ["a t"])
    assert tokenizer.decode(tokens[:2]) == "a the"
    assert find(tokens, len(tokens)) == 2


def test_the_first_of_several_texts_counts(tokenizer: Tokenizer) -> None:
    tokens = pieces(tokenizer, "one two ", "three ", "four")
    at = len(pieces(tokenizer, "one two ", "three "))
    find = stop_finder(tokenizer, ["four", "three "])
    assert find(tokens, len(tokens)) == at
    assert find(tokens[: at - 1], at - 1) is None


def test_a_text_of_bytes_is_complete_with_its_last(tokenizer: Tokenizer) -> None:
    tokens = pieces(tokenizer, "caf", "\u00e9", "!")
    assert len(pieces(tokenizer, "\u00e9")) == 2, "a poor example"
    find = stop_finder(tokenizer, ["f\u00e9"])
    at = len(tokens) - len(pieces(tokenizer, "!"))
    assert [find(tokens[:n], 1) for n in (at - 1, at)] == [None, at]


def test_a_special_token_is_text_too(tokenizer: Tokenizer) -> None:
    end = "<|end_of_explanation|>"
    tokens = pieces(tokenizer, "9", end, "x")
    assert stop_finder(tokenizer, [end])(tokens, len(tokens)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_any_number_of_new_tokens_gives_the_same(
    tokenizer: Tokenizer, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    stop = [["ab", "</think>"], ["\u00e9a", "a\u00e9b"], ["ba", " b"]][seed % 3]
    parts = ["a", "b", "\u00e9", "</thi", "nk>", " ", "think"]
    find, found = stop_finder(tokenizer, stop), 0
    for _ in range(40):
        tokens = pieces(tokenizer, *rng.choice(parts, rng.integers(1, 12)))
        expected = slowly(tokenizer, tokens, stop)
        found += expected is not None
        for new in range(1, len(tokens) + 1):
            # Earlier calls have seen nothing in the tokens before.
            if expected is None or expected > len(tokens) - new:
                assert find(tokens, new) == expected
        size, at, answer = int(rng.integers(1, 5)), 0, None
        while answer is None and at < len(tokens):
            new = min(size, len(tokens) - at)
            at += new
            answer = find(tokens[:at], new)
        assert answer == expected
    assert 0 < found < 40, "a poor example"


def test_a_long_way_to_the_stop_text(tokenizer: Tokenizer) -> None:
    tokens = pieces(tokenizer, *["xy"] * 300, TAG)
    find = stop_finder(tokenizer, [TAG])
    answers = [find(tokens[:n], 1) for n in range(1, len(tokens) + 1)]
    assert answers == [None] * (len(tokens) - 1) + [len(tokens)]


def test_without_texts_there_is_nothing_to_find(tokenizer: Tokenizer) -> None:
    assert stop_finder(tokenizer, []) is None


def test_a_text_that_cannot_occur_is_refused(tokenizer: Tokenizer) -> None:
    # This tokenizer reads the mark of a space as a space.
    with pytest.raises(
        UserError, match="'a\u2581' cannot occur; .* decodes it as 'a '"
    ):
        stop_finder(tokenizer, ["</think>", "a\u2581"])


@pytest.mark.parametrize(
    ("text", "stop"), [("aéü", "ü"), ("aé#x", "#"), ("a🦉🦉###é", "###")]
)
def test_a_text_is_found_in_a_run_of_bytes(
    text: str, stop: str, tmp_path: Path
) -> None:
    # Where one byte is invalid, this tokenizer's decoder makes all of its run invalid.
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    built = Library(models.BPE(bytes_ | {"a": 256}, [], byte_fallback=True))
    built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    built.add_special_tokens(["</s>"])
    built.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    tokens = pieces(tokenizer, text)
    at = len(pieces(tokenizer, text.partition(stop)[0] + stop))
    for new in range(1, len(tokens) + 1):
        ends = [*range(at % new or new, len(tokens), new), len(tokens)]
        find, seen = stop_finder(tokenizer, [stop]), 0
        answers = []
        for end in ends:
            answers.append(find(tokens[:end], end - seen))
            seen = end
        assert next(answer for answer in answers if answer) == at
