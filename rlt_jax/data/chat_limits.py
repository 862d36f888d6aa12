"""Runs chat templates in a process of its own, which has limits on time and memory.

A template is a program that comes with a model, from anyone. Jinja's sandbox keeps it from
Python's internals, but not from work without end: a loop of loops, or a text of any length.
The process runs this file as a script: a line of its input is a request.
"""

import atexit
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

SECONDS, MEMORY = 5, 2**30  # of a rendering on a CPU, and bytes of address space
SIZE = 1_000_000  # characters of a text, besides ten times those of the request
_LOCK = threading.Lock()


def render(source: str, date: str, values: dict[str, Any] | None) -> str:
    """The text of a template.

    Args:
      source: the template.
      date: what `strftime_now` formats, in ISO format.
      values: its variables, as JSON has them; None if it is only to be compiled.

    Raises:
      ValueError: the template has an error, or refuses the values; or the text has halves
        of characters.
      TimeoutError: it takes too much time or memory.
    """
    request, reply = json.dumps([source, date, values]).encode() + b"\n", b""
    with _LOCK:
        process = _start(os.getpid())
        try:
            process.stdin.write(request)
            process.stdin.flush()
            reply = process.stdout.readline()
        finally:
            if not reply:  # it has ended, or this was interrupted
                _start.cache_clear()
                process.kill()
                process.communicate()
    if not reply:
        raise TimeoutError(f"it takes more than {SECONDS} seconds, or too much memory")
    text, error = json.loads(reply)
    if error:
        raise ValueError(error)
    text.encode()  # a ValueError where it has halves of characters
    return text


@functools.cache
def _start(_: int) -> subprocess.Popen[bytes]:
    """The process that renders for the one of that id; a fork would need another."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # In a session of its own, Ctrl-C does not reach it; it ends when its input does.
    command = [sys.executable, "-P", __file__, str(SECONDS)]
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    atexit.register(process.communicate)
    return process


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Refuses an attribute, and not only its use."""
        raise SecurityError(f"a template cannot use the attribute {attribute!r}")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant generates; the text stays the same."""

    tags = frozenset(["generation"])

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """What stands between the tags, where variables have their own scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.cache
def _compile(source: str, date: str) -> jinja2.Template:
    """The template, as transformers runs it."""
    extensions = [jinja2.ext.loopcontrols, _Generation]
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = _to_json  # Jinja's own is for HTML
    now = datetime.fromisoformat(date).strftime
    names = {"raise_exception": _refuse, "strftime_now": now}
    return sandbox.from_string(source, names)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _serve(seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        # Ends the process, whatever it does then. Others may keep it waiting.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            *program, values = json.loads(line)
            template = _compile(*program)
            text = "" if values is None else template.render(values)
            if len(text) > SIZE + 10 * len(line):
                raise MemoryError(f"it makes {len(text):,} characters")
            reply = json.dumps([text, ""])
        except Exception as error:  # noqa: BLE001 (the template may do anything)
            reply = json.dumps(["", str(error).rstrip(".") or type(error).__name__])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
