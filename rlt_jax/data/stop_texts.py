"""Texts that end a completion, found in its tokens."""

from collections.abc import Callable, Sequence

from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError

StopFinder = Callable[[list[int], int], int | None]


def stop_finder(tokenizer: Tokenizer, stop: Sequence[str]) -> StopFinder | None:
    """Finds the first token with which any of some texts is complete.

    Args:
      tokenizer: of the completions.
      stop: texts, none empty.

    Returns:
      From all tokens of a completion, and how many of them were not there at the last
      call, to the number of tokens up to and including that token, None without one.
      None for no texts.

    Raises:
      UserError: the tokenizer can never write one of the texts.
    """
    for text in stop:
        if text not in tokenizer.decode(tokenizer.encode(text).ids):
            raise UserError(
                f"sampling.stop: {text!r} cannot occur, {tokenizer.path} writes it as "
                f"{tokenizer.decode(tokenizer.encode(text).ids)!r}."
            )
    if not stop:
        return None
    reach = max(len(text.encode("utf-8")) for text in stop)  # a token is a byte or more

    def find(tokens: list[int], new: int) -> int | None:
        start = max(0, len(tokens) - new - reach)

        def stops(end: int) -> bool:
            text = tokenizer.decode(tokens[start:end])
            return any(part in text for part in stop)

        if not stops(len(tokens)):
            return None
        ends = range(len(tokens) - new + 1, len(tokens) + 1)
        return next((end for end in ends if stops(end)), None)

    return find
