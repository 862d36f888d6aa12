"""Chat templates: Jinja programs that make a text from messages, as transformers runs them."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from reprlib import repr as short
from typing import Any

from rlt_jax import stores
from rlt_jax.data import chat_limits
from rlt_jax.errors import UserError, as_user_error

Message = dict[str, str]  # "role" and "content"
# Templates in tokenizer_config.json: one, or several with names.
Stored = str | Mapping[str, str] | list[Mapping[str, str]] | None
ASSETS = Path(__file__).parent / "assets" / "chat_templates"
_PROBE = "probe"
_QUESTION = {"role": "user", "content": "question"}


class ChatTemplate:
    """A chat template with its variables.

    Args:
      where: names the template in messages.
      source: the Jinja program.
      variables: values of its variables, such as special tokens and `enable_thinking`.
      date: what `strftime_now` formats.

    Raises:
      UserError: the program has an error.
    """

    def __init__(
        self, where: str, source: str, variables: Mapping[str, Any], date: datetime
    ) -> None:
        self.source, self._where, self._variables = source, where, dict(variables)
        self._date = date.isoformat()
        self._run(None)

    def render(self, messages: Sequence[Message], open_turn: bool = True) -> str:
        """The chat as text, by default up to where the assistant's turn begins.

        Raises:
          UserError: the template refuses the messages.
        """
        values = {"messages": list(messages), "add_generation_prompt": open_turn}
        return self._run({"tools": None, "documents": None} | self._variables | values)

    def ending(self) -> str:
        """What is rendered after the text of the last turn, an assistant's.

        It is "" for a template that renders no such turn.
        """
        chat = [_QUESTION, {"role": "assistant", "content": _PROBE}]
        # Some templates need a system prompt.
        for messages in (chat, [{"role": "system", "content": "instruction"}, *chat]):
            _, found, ending = self._attempt(messages, False).rpartition(_PROBE)
            if found:
                return ending
        return ""

    def takes_system(self) -> bool:
        """Whether a system message is rendered, not refused or left out."""
        system = {"role": "system", "content": _PROBE}
        return _PROBE in self._attempt([system, _QUESTION], True)

    def _attempt(self, messages: Sequence[Message], open_turn: bool) -> str:
        try:
            return self.render(messages, open_turn)
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise
            return ""

    def _run(self, values: Mapping[str, Any] | None) -> str:
        try:
            return chat_limits.render(self.source, self._date, values)
        except (TypeError, ValueError, OSError) as error:
            raise UserError(
                f"{self._where}: the chat template fails: {error}. Set "
                "model.chat_template to another one, or its variables in "
                "model.chat_template_kwargs."
            ) from error


def find_template(folder: Path, stored: Stored, choice: str) -> str | None:
    """The source of a chat template.

    Args:
      folder: of the tokenizer; its files of templates come before `stored`.
      stored: in tokenizer_config.json: one template, or several with names.
      choice: name of one of several, name of a shipped one, or a file; "" for the
        tokenizer's own.

    Returns:
      The source; None if the tokenizer has none and none was chosen.

    Raises:
      UserError: there is no such template.
    """
    shipped = {file.stem: file for file in sorted(ASSETS.glob("*.jinja"))}
    what = f"tokenizer {folder}: a chat template is no text, or has no name"
    with as_user_error(what, KeyError, OSError, TypeError, ValueError):
        if isinstance(stored, list):
            stored = {entry["name"]: entry["template"] for entry in stored}
        stored = stored or {}
        named = {"default": stored} if isinstance(stored, str) else dict(stored)
        files = {f.stem: f for f in folder.glob("additional_chat_templates/*.jinja")}
        if (own := folder / "chat_template.jinja").is_file():
            files["default"] = own
        if choice not in {**named, **files}:
            files[choice] = shipped.get(choice, Path(stores.local(choice)))
        texts = {k: f.read_text("utf-8") for k, f in files.items() if f.is_file()}
        named |= dict(sorted(texts.items()))
        given = [x for pair in named.items() for x in pair]
        if others := [x for x in given if not isinstance(x, str)]:
            raise TypeError(short(others[0]))
    source = named.get(choice or "default")
    if source or not (choice or named):
        return source
    raise UserError(
        f"tokenizer {folder}: there is no chat template {choice or 'default'!r}; set "
        f"model.chat_template to a file or to one of: {', '.join([*named, *shipped])}."
    )
