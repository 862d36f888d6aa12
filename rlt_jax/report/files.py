"""The files of other stages as reports read them, and the pages that they write."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

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


def write_page(
    folder: Path, template: str, pictures: Mapping[str, bytes], **values: Any
) -> None:
    """Writes `index.html` into a folder, its pictures beside it and in it.

    Args:
      folder: made if it is not there.
      template: a file beside this one; all values in it are escaped.
      pictures: name -> PNG.
      **values: of the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlt_jax", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        words=lambda name: name.replace("_", " "), number=_number
    )
    inside = {name: base64.b64encode(png).decode() for name, png in pictures.items()}
    page = environment.get_template(template).render(values, pictures=inside)
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    # A model can write half of a surrogate pair, which UTF-8 cannot hold.
    (folder / "index.html").write_text(page, encoding="utf-8", errors="replace")


def _number(value: float | None, digits: int = 5) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"


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
