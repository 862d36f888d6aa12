"""Records of JSON Lines, JSON, CSV and Parquet files."""

import csv
import functools
import glob
import json
import os.path
import re
import reprlib
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq

from rlt_jax.errors import UserError
from rlt_jax.records import Record

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
# Data set, revision, and path in it.
_HUB_PATH = r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/\w+/[^/]+|[^/]+))?(?:/(.*))?"


def read_records(
    path: str, source: str = "", columns: Collection[str] | None = None
) -> Iterator[tuple[str, Record]]:
    """Reads all records of one or more files.

    Args:
      path: a .jsonl, .json (a list, or one object per line), .csv or .parquet file, a
        directory with such files, or a glob pattern; or one of these in a data set of the
        Hugging Face Hub, "hf://datasets/ORG/NAME[@REVISION]/PATH".
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
    """The files that `read_records` reads; raises UserError if there are none.

    Those of the Hub are downloaded once, and then read from its cache, also offline.
    """
    given, endings = path, ", ".join(ENDINGS)
    hint = f" Download it: {source}." if source else ""
    if str(path).startswith("hf:"):
        path, hint = _download(path)
    names, why = [path], f"{given}: it has no file that ends in {endings}; add one."
    if os.path.isdir(path):
        names = [name for name in Path(path).iterdir() if name.suffix in ENDINGS]
    elif not os.path.isfile(path):
        names = glob.glob(path, recursive=True)
        why = f"{given!r}: no such file, folder or glob pattern; name one of {endings}."
    files = sorted(Path(name) for name in names if os.path.isfile(name))
    if not files:
        raise UserError(why + hint)
    for file in files:
        if file.suffix not in ENDINGS:
            raise UserError(
                f"{file}: unknown file type {file.suffix!r}; convert to one of {endings}."
            )
    return files


@functools.cache  # a run reads one commit, however often it asks
def _download(path: str) -> tuple[str, str]:
    """Downloads the files of a path in a data set of the Hub to the Hub's cache.

    Returns:
      The path in the cache, and a hint where to find the data set's files.
    """
    match = re.fullmatch(_HUB_PATH, path)
    if match is None:
        raise UserError(f"{path!r}: write hf://datasets/ORG/NAME[@REVISION]/PATH.")
    name, revision, inside = match[1], match[2] or "main", (match[3] or "").strip("/")
    literal = glob.escape(inside)
    wanted = [os.path.join(literal, f"*{ending}") for ending in ENDINGS]
    if inside:
        wanted += [literal, inside, inside.replace("**/", "")]
    # A * of the Hub also stands for slashes: what lies deeper is not wanted.
    depth = (wanted[0] if inside == literal else inside).count("/")
    deeper = None if "**" in inside else "*/" * (depth + 1) + "*"
    try:
        patterns = {"allow_patterns": wanted, "ignore_patterns": deeper}
        root = huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, **patterns
        )
    except Exception as error:  # the HTTP library has its own
        raise UserError(
            f"{path!r} cannot be read: {' '.join(str(error).split())} Check the name and "
            "the network; for a private or gated data set, log in with `hf auth login` "
            "or set HF_TOKEN."
        ) from error
    page = f"https://huggingface.co/datasets/{name}/tree/{revision}"
    return os.path.join(root, inside), f" Its files are listed on {page}."


def _records(file: Path, columns: Collection[str] | None) -> Iterator[tuple[str, Any]]:
    failure, remedy = f"{file} cannot be read", "Create or download it again"
    try:
        if file.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)  # traces can be long
            with file.open(encoding="utf-8-sig", newline="") as lines:
                rows = csv.DictReader(lines)
                for where, record in _numbered(f"{file}, record", rows):
                    if None in record:
                        failure, remedy = where, "Put texts with commas in quotes"
                        raise csv.Error("it has more fields than the header")
                    yield where, {k: v or None for k, v in record.items()}
        elif file.suffix == ".parquet":
            yield from _numbered(f"{file}, record", _parquet_records(file, columns))
        elif file.suffix == ".json" and file.read_bytes().lstrip()[:1] == b"[":
            yield from _numbered(f"{file}, record", json.loads(file.read_bytes()))
        else:
            with file.open("rb") as lines:  # bytes: texts may contain other separators
                for where, line in _numbered(f"{file}, line", lines):
                    failure = f"{where}: not valid JSON"  # or not UTF-8
                    remedy = "Write one JSON object per line"
                    if line.strip():
                        yield where, json.loads(line)
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{failure}: {error}. {remedy}.") from error


def _numbered(name: str, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, record in enumerate(records, 1):
        yield f"{name} {number}", record


def _parquet_records(file: Path, columns: Collection[str] | None) -> Iterator[Record]:
    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        # Other columns can be large, or have types that Python cannot represent.
        to_read = [name for name in names if columns is None or name in columns]
        for batch in table.iter_batches(columns=to_read):
            for record in batch.to_pylist():
                # All column names are keys, so that messages can list them.
                yield dict.fromkeys(names) | record
