"""Chat templates: Jinja programs that make a text from messages, as transformers runs them."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlt_jax.errors import UserError

Message = dict[str, str]  # "role" and "content"
# Templates in tokenizer_config.json: one, or several with names.
Stored = str | Mapping[str, str] | list[Mapping[str, str]] | None
ASSETS = Path(__file__).parent / "assets" / "chat_templates"
_PROBE = "probe"
_QUESTION = {"role": "user", "content": "question"}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant generates; the text stays the same."""

    tags = frozenset(["generation"])

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """A call with what stands between the tags, where variables have their own scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_text")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


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
        extensions = [jinja2.ext.loopcontrols, _Generation]
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions
        )
        environment.filters["tojson"] = _to_json  # Jinja's own is for HTML
        functions = {"raise_exception": _refuse, "strftime_now": date.strftime}
        self._render = self._guarded(environment.from_string, source, functions).render

    def render(self, messages: Sequence[Message], open_turn: bool = True) -> str:
        """The chat as text, by default up to where the assistant's turn begins.

        Raises:
          UserError: the template refuses the messages.
        """
        values = {"messages": list(messages), "add_generation_prompt": open_turn}
        defaults = {"tools": None, "documents": None}
        return self._guarded(self._render, defaults | self._variables | values)

    def ending(self) -> str:
        """What is rendered after the text of the last turn, an assistant's.

        It is "" for a template that renders no such turn.
        """
        system = {"role": "system", "content": "instruction"}
        chat = [_QUESTION, {"role": "assistant", "content": _PROBE}]
        for messages in (chat, [system, *chat]):  # some templates need a system prompt
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
        except UserError:
            return ""

    def _guarded(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:  # the template may do anything
            raise UserError(
                f"{self._where}: the chat template fails: {error}. Set "
                "model.chat_template to another one, or its variables in "
                "model.chat_template_kwargs."
            ) from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


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
    if isinstance(stored, list):
        stored = {entry["name"]: entry["template"] for entry in stored}
    stored = stored or {}
    named = {"default": stored} if isinstance(stored, str) else dict(stored)
    more = sorted(folder.glob("additional_chat_templates/*.jinja"))
    named |= {file.stem: file.read_text(encoding="utf-8") for file in more}
    if (own := folder / "chat_template.jinja").is_file():
        named["default"] = own.read_text(encoding="utf-8")
    source = named.get(choice or "default")
    if source or not (choice or named):
        return source
    shipped = {file.stem: file for file in sorted(ASSETS.glob("*.jinja"))}
    file = shipped.get(choice, Path(choice))
    if file.is_file():
        return file.read_text(encoding="utf-8")
    known = ", ".join([*named, *shipped])
    raise UserError(
        f"tokenizer {folder}: there is no chat template {choice or 'default'!r}; set "
        f"model.chat_template to a file or to one of: {known}."
    )
