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
    return _parse(_bytes(path), path)


def read_lines(path: Path) -> list[Record]:
    """The rows of a JSON Lines file; errors as of `read_json`."""
    *lines, last = _bytes(path).split(b"\n")
    rows = [_parse(line, path) for line in lines if line.strip()]
    if last.strip():  # valid where another program wrote it without the last line end
        message = (
            "the last line is cut off. Run the stage again; where it has ended, with "
            f"--only={path.parent.name}"
        )
        rows.append(_parse(last, path, message))
    return rows


def read_evaluation(folder: Path) -> list[Record]:
    """The rows of `samples.jsonl` of a complete evaluate stage.

    Raises:
      UserError: the stage has not ended, or its files are broken or of different runs.
    """
    read_json(folder / "done.json")
    results = read_json(folder / "results.json")
    rows = read_lines(folder / "samples.jsonl")
    wanted = results["num_questions"] * results["samples_per_question"]
    if len(rows) != wanted:
        raise UserError(
            f"{folder}: samples.jsonl has {len(rows)} rows, but results.json is of "
            f"{wanted}. Run the stage {folder.name!r} afresh, with --only={folder.name}."
        )
    return rows


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


def _parse(text: bytes, path: Path, message: str = "not valid JSON") -> Record:
    try:
        return json.loads(text)
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"{path}: {message}: {error}.") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing; run the stage {path.parent.name!r}, which writes it."
        ) from error
