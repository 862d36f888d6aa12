"""Reads the files of other stages for reports, and writes HTML pages."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from rlt_jax import files
from rlt_jax.errors import UserError, as_user_error
from rlt_jax.records import Record
from rlt_jax.settings import Section

# Types in the rows of `samples.jsonl` of an evaluate stage.
ANSWER = {"question": str, "correct": bool | None, "error": str | None}


def read_lines(path: Path, kinds: Mapping[str, Any] = files.NO_KINDS) -> list[Record]:
    """Reads the records of a JSON Lines file of a stage; see `files.stream_jsonl`.

    Raises:
      UserError: the file is missing, damaged or incomplete.
    """
    if not files.check_regular(path):
        stage = f"run the stage {path.parent.name!r}, which writes it"
        raise UserError(f"{path} is missing; {stage}.")
    return list(files.stream_jsonl(path, kinds, is_whole=True))


def read_evaluation(folder: Path) -> list[Record]:
    """Reads `samples.jsonl` of a finished evaluate stage.

    Raises:
      UserError: the stage is not finished, or its files are invalid or do not match.
    """
    files.read_json(folder / "done.json")
    results = files.read_json(folder / "results.json")
    samples = read_lines(folder / "samples.jsonl", ANSWER)
    with as_user_error(f"{folder / 'results.json'} has no", KeyError, TypeError):
        expected = results["num_questions"] * results["samples_per_question"]
    if len(samples) != expected:
        raise UserError(
            f"{folder}: samples.jsonl has {len(samples)} records, but results.json has "
            f"{expected} samples. Run the stage anew with --only={folder.name}."
        )
    return samples


def check_stages(values: Section, workdir: Path, to_come: Section) -> None:
    """Looks for the stages of a report; `to_come` are those that a run will complete.

    Raises:
      UserError: one is neither complete nor to come, or of another kind.
    """
    wanted = [("rl", values["rl"]), *(("collect", x) for _, x in values["traces"])]
    wanted += [("evaluate", x) for _, x in values["evaluations"]]
    for kind, name in wanted:
        done = to_come.get(name) or files.read_json(workdir / name / "done.json")
        if (made := done.get("stage")) != kind:
            raise UserError(f"report: {name!r} is a stage {made!r}; name one {kind!r}.")


def write_page(
    folder: Path, template: str, pictures: Mapping[str, bytes], **values: Any
) -> None:
    """Writes `index.html` with embedded figures, and the figures as separate files.

    Args:
      folder: folder of the page; created if it does not exist.
      template: name of a template in this folder; all values are escaped.
      pictures: name -> bytes of a PNG.
      **values: values for the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlt_jax", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"words": lambda x: x.replace("_", " "), "number": _number}
    embedded = {name: base64.b64encode(png).decode() for name, png in pictures.items()}
    page = environment.get_template(template).render(values, pictures=embedded)
    with files.storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        files.write_whole(folder / f"{name}.png", png)
    # Completions can contain lone surrogates, which UTF-8 cannot encode.
    files.write_whole(folder / "index.html", page.encode("utf-8", "replace"))


def _number(value: float | None, digits: int = 5) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"
