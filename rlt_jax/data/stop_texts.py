"""Stop strings: texts that end a completion."""

from collections.abc import Callable, Sequence

from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError

StopFinder = Callable[[list[int], int], int | None]


def stop_finder(tokenizer: Tokenizer, stop: Sequence[str]) -> StopFinder | None:
    """Returns a function that finds the token that completes a stop string.

    Args:
      tokenizer: tokenizer of the completions.
      stop: stop strings, none empty.

    Returns:
      A function of the tokens of a completion and the number of tokens that are new since
      the last call. It returns the number of tokens up to and including the first one
      that completes a stop string, or None. None if there are no stop strings.

    Raises:
      UserError: the tokenizer cannot produce one of the strings.
    """
    for text in stop:
        if text not in tokenizer.decode(tokenizer.encode(text).ids):
            raise UserError(
                f"sampling.stop: {text!r} cannot occur; the tokenizer {tokenizer.path} "
                f"decodes it as {tokenizer.decode(tokenizer.encode(text).ids)!r}."
            )
    if not stop:
        return None
    # In bytes, as a part of a character can make the text of its neighbors invalid.
    pieces, strings = tokenizer.pieces, [text.encode("utf-8") for text in stop]
    max_tokens = max(map(len, strings))  # a token has at least one byte

    def find(tokens: list[int], new: int) -> int | None:
        start = max(0, len(tokens) - new - max_tokens)

        def has_stop(end: int) -> bool:
            data = b"".join([pieces[i] for i in tokens[start:end] if i < len(pieces)])
            return any(string in data for string in strings)

        if not has_stop(len(tokens)):
            return None
        ends = range(len(tokens) - new + 1, len(tokens) + 1)
        return next((end for end in ends if has_stop(end)), None)

    return find
