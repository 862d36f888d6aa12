"""The files of other stages, as reports read them."""

import json
from pathlib import Path
from typing import Any

from rlt_jax.errors import UserError

Record = dict[str, Any]


def read_json(path: Path) -> Record:
    """What one JSON file holds.

    Raises:
      UserError: the file, in the folder of a stage, is missing or broken.
    """
    return _parse(_text(path), path)


def read_lines(path: Path) -> list[Record]:
    """The rows of a JSON Lines file; errors as of `read_json`."""
    # Not splitlines, which would also cut at separators inside of a JSON string.
    lines = _text(path).split("\n")
    return [_parse(line, path) for line in lines if line.strip()]


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}.") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"report: {path} is missing. The stage {path.parent.name!r} writes it: run "
            "that stage first, or name another one in the report's config."
        ) from error
