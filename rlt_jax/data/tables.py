"""Rows of JSON Lines, JSON, CSV and Parquet files, as data sets are published."""

import csv
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlt_jax.errors import UserError

Row = dict[str, Any]


def read_rows(path: str, source: str = "") -> Iterator[tuple[str, Row]]:
    """Every row of a file, or of all files that match a pattern, and where it stands.

    Args:
      path: of .jsonl, .json (a list, or one object a line), .csv or .parquet files.
      source: where to get the file, for the message when it is missing.

    Raises:
      UserError: no such file, or one that cannot be read.
    """
    files = [path] if Path(path).is_file() else sorted(glob.glob(path))
    if not files:
        hint = f" Download it: {source}." if source else ""
        raise UserError(f"there is no file {path!r}.{hint}")
    for name in files:
        file = Path(name)
        if file.suffix not in READERS:
            raise UserError(f"{file}: the ending is none of {', '.join(READERS)}.")
        number = 0
        for number, row in _rows(file):
            where = f"{file}, row {number}"
            if not isinstance(row, dict):
                raise UserError(f"{where}: it is not an object with columns.")
            yield where, row
        if not number:
            raise UserError(f"{file} has no rows.")


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        for number, row in READERS[file.suffix](file):
            yield number, row
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:
        raise UserError(
            f"{file} cannot be read after row {number}: {error}."
        ) from error


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:  # bytes: texts may hold other line ends
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, json.loads(line)


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    if file.read_bytes().lstrip()[:1] == b"[":
        return enumerate(json.loads(file.read_bytes()), 1)
    return _read_jsonl(file)


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from enumerate(csv.DictReader(lines), 1)


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    return enumerate(pq.read_table(file).to_pylist(), 1)


READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
