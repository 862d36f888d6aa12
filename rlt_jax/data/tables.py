"""Rows of JSON Lines, JSON, CSV and Parquet files, as data sets are published."""

import csv
import glob
import json
import os.path
import reprlib
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlt_jax.errors import UserError

Row = dict[str, Any]

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(
    path: str, source: str = "", columns: Collection[str] | None = None
) -> Iterator[tuple[str, Row]]:
    """Every row of a file, of a directory's files, or of a glob's, and where it stands.

    Args:
      path: a .jsonl, .json (a list, or one object a line), .csv or .parquet file, a
        directory that holds such files, or a glob pattern.
      source: where to get the file, for the message when it is missing.
      columns: the others of a Parquet file are not read and None; None reads all.

    Raises:
      UserError: no such file, or one that cannot be read or is empty; the message names
        the file and line or row.
    """
    for file in _files(path, source):
        where = ""
        for where, row in _rows(file, columns):
            if not isinstance(row, dict):
                raise UserError(
                    f"{where}: the row is {shown(row)}, not an object; write one JSON "
                    "object a line."
                )
            yield where, row
        if not where:
            raise UserError(f"{file}: the file has no rows; fill it or leave it out.")


def shown(value: Any) -> str:
    """A value and its type, for messages."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _files(path: str, source: str) -> list[Path]:
    endings = ", ".join(ENDINGS)
    if os.path.isdir(path):
        inside = (f for f in Path(path).iterdir() if f.suffix in ENDINGS)
        files = sorted(f for f in inside if f.is_file())
        if not files:
            raise UserError(f"{path}: no file in it ends in {endings}; add one.")
        return files
    names = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    files = sorted(Path(name) for name in names if os.path.isfile(name))
    if not files:
        raise UserError(
            f"{path!r}: no such file or directory, and as a pattern it matches none; "
            f"name a file that ends in {endings}, a directory of them, or a glob."
            + f" Download it: {source}."
            * bool(source)
        )
    for file in files:
        if file.suffix not in ENDINGS:
            raise UserError(
                f"{file}: unknown ending {file.suffix!r}; convert to one of {endings}."
            )
    return files


def _rows(file: Path, columns: Collection[str] | None) -> Iterator[tuple[str, Any]]:
    try:
        if file.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)  # a trace may be long
            with file.open(encoding="utf-8-sig", newline="") as lines:
                rows = (
                    {k: v or None for k, v in r.items()} for r in csv.DictReader(lines)
                )
                yield from _numbered(file, rows)
        elif file.suffix == ".parquet":
            yield from _numbered(file, _parquet_rows(file, columns))
        elif file.suffix == ".json" and file.read_bytes().lstrip()[:1] == b"[":
            yield from _numbered(file, json.loads(file.read_bytes()))
        else:
            yield from _json_lines(file)
    except UserError:
        raise
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:
        raise UserError(
            f"{file} cannot be read: {error}. Write or download it again."
        ) from error


def _numbered(file: Path, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"{file}, row {number}", row


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:  # bytes: texts may hold other line ends
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise UserError(
                    f"{where}: not valid JSON: {error}. Write one JSON object a line, "
                    "each on a single line."
                ) from error
            yield where, row


def _parquet_rows(file: Path, columns: Collection[str] | None) -> Iterator[Row]:
    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        # Others may be large, or of types that Python has no value for.
        wanted = [name for name in names if columns is None or name in columns]
        for batch in table.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                # With all names, so that a message can list what was found.
                yield dict.fromkeys(names) | row
