"""Records of JSON Lines, JSON, CSV and Parquet files."""

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
from rlt_jax.records import Record

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


def read_records(
    path: str, source: str = "", columns: Collection[str] | None = None
) -> Iterator[tuple[str, Record]]:
    """Reads all records of one or more files.

    Args:
      path: a .jsonl, .json (a list, or one object per line), .csv or .parquet file, a
        directory with such files, or a glob pattern.
      source: where the file can be downloaded, for the message when it is missing.
      columns: columns to read from a Parquet file; the others are None. None reads all.

    Yields:
      The file and line (or record number), for messages, and the record.

    Raises:
      UserError: a file is missing, cannot be read or is empty.
    """
    for file in find_files(path, source):
        where = ""
        for where, record in _records(file, columns):
            if not isinstance(record, dict):
                raise UserError(
                    f"{where}: the record is {shown(record)}, not an object; write one "
                    "JSON object per line."
                )
            yield where, record
        if not where:
            raise UserError(
                f"{file}: the file has no records; remove it from the path."
            )


def shown(value: Any) -> str:
    """Formats a value with its type, for messages."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def find_files(path: str, source: str = "") -> list[Path]:
    """The files that `read_records` reads; raises UserError if there are none."""
    endings = ", ".join(ENDINGS)
    if os.path.isdir(path):
        files = [f for f in Path(path).iterdir() if f.suffix in ENDINGS and f.is_file()]
        if not files:
            raise UserError(f"{path}: it has no file that ends in {endings}; add one.")
        return sorted(files)
    names = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    files = sorted(Path(name) for name in names if os.path.isfile(name))
    if not files:
        raise UserError(
            f"{path!r}: no such file or directory, and no match as a glob pattern; give "
            f"a file that ends in {endings}, a directory of them, or a glob pattern."
            + (f" Download it: {source}." if source else "")
        )
    for file in files:
        if file.suffix not in ENDINGS:
            raise UserError(
                f"{file}: unknown file type {file.suffix!r}; convert to one of {endings}."
            )
    return files


def _records(file: Path, columns: Collection[str] | None) -> Iterator[tuple[str, Any]]:
    try:
        if file.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)  # traces can be long
            with file.open(encoding="utf-8-sig", newline="") as lines:
                records = csv.DictReader(lines)
                for where, record in _numbered(file, records):
                    if None in record:
                        raise UserError(
                            f"{where}: it has more fields than the header; put texts with "
                            "commas in quotes."
                        )
                    yield where, {k: v or None for k, v in record.items()}
        elif file.suffix == ".parquet":
            yield from _numbered(file, _parquet_records(file, columns))
        elif file.suffix == ".json" and file.read_bytes().lstrip()[:1] == b"[":
            yield from _numbered(file, json.loads(file.read_bytes()))
        else:
            yield from _json_lines(file)
    except UserError:
        raise
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:
        raise UserError(
            f"{file} cannot be read: {error}. Create or download it again."
        ) from error


def _numbered(file: Path, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(records, 1):
        yield f"{file}, record {number}", record


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:  # bytes: texts may contain other line separators
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise UserError(
                    f"{where}: not valid JSON: {error}. Write one JSON object per line."
                ) from error
            yield where, record


def _parquet_records(file: Path, columns: Collection[str] | None) -> Iterator[Record]:
    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        # Other columns can be large, or have types that Python cannot represent.
        to_read = [name for name in names if columns is None or name in columns]
        for batch in table.iter_batches(columns=to_read):
            for record in batch.to_pylist():
                # All column names are keys, so that messages can list them.
                yield dict.fromkeys(names) | record
