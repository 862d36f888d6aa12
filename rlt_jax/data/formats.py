"""Rows of JSON Lines, JSON, CSV and Parquet files, one at a time.

Files are streams, so that memory is bounded whatever they hold: a row of text has at most
`ROW_SIZE` characters, and a compressed file may expand to `GROWTH` times its size. A row
that is bad by itself comes as an error instead of a record, and the reader can go on with
the next one. What makes the rest of a file unreadable is raised.
"""

import csv
import io
import itertools
import json
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlt_jax.errors import UserError, storage_errno
from rlt_jax.records import Record

TEXTS = (".jsonl", ".json", ".csv")
ENDINGS = (*TEXTS, ".parquet", *(x + end for end in (".gz", ".zst") for x in TEXTS))
ROW_SIZE = 2**25  # parsed, a line can take about 45 times as much
# What a compressed file may expand to: the larger of these bytes and times its size.
EXPANDED_SIZE, GROWTH = 2**27, 100
ROW_OVERHEAD = 256  # bytes that a row counts in addition to its content
# Rows of a Parquet file in memory: a few bytes can stand for a long text in each.
BATCH, SLAB = 8, 1024  # the latter where no text is written out
CHUNK = 2**16

_BAD_ROW = (ValueError, OverflowError, RecursionError, pa.ArrowException)
_SPACE = " \t\r\n\ufeff"  # and a byte order mark
_OPENING = re.compile(rf"[{_SPACE}]*\[[{_SPACE}]*(\])?")
_SEPARATOR = re.compile(rf"[{_SPACE}]*(?:,[{_SPACE}]*|(\]))")

Columns = Collection[str] | None
# The file and line (or record number); and the record, or why the row is bad.
Rows = Iterator[tuple[str, Record | UserError]]


def read_file(file: Path, columns: Columns, halves: bool = False) -> Rows:
    """Reads the rows of a file.

    Args:
      file: has one of `ENDINGS`.
      columns: columns to read from a Parquet file, in lower case; the case in the file does
        not matter. The others are None. None reads all.
      halves: see `parse_json`.

    Yields:
      The file and line (or record number); and the record, or why the row is bad.

    Raises:
      UserError: the file cannot be read, or not from here on.
    """
    after, total = "", 0
    try:
        most = max(EXPANDED_SIZE, GROWTH * file.stat().st_size)
        for place, size, parse in _places(file, columns, halves):
            total += size + ROW_OVERHEAD
            if total > most and file.suffix not in TEXTS:
                raise ValueError(f"it expands {GROWTH}-fold; if it should, use .jsonl")
            if parse:
                where, after = f"{file}, {place}", f" after {place}"
                try:
                    row: Any = parse()
                    # Many rows of a Parquet file can share a text, but not in Python.
                    total += sum(len(x) for x in row.values() if isinstance(x, str))
                except _BAD_ROW as error:
                    row = UserError(f"{where}: {_reason(error)}.")
                yield where, row
    except (*_BAD_ROW, OSError, csv.Error) as error:
        if storage_errno(error):
            raise
        reason = f"{_reason(error)}. Repair it, or create or download it again."
        raise UserError(f"{file} cannot be read{after}: {reason}") from error


def parse_json(text: str, halves: bool = False) -> Any:
    """Parses a JSON text.

    Args:
      text: of one value.
      halves: whether texts may have halves of surrogate pairs, as those of a model that
        stopped in the middle of a character.

    Raises:
      ValueError: it is no JSON, or an object has a key twice, or a text cannot be written
        as UTF-8, or a number has more digits than Python reads.
      RecursionError: it is nested too deeply.
    """
    _check_utf8(text)
    value = _DECODER.decode(text.strip(_SPACE))
    if not halves and "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def shown(value: Any) -> str:
    """Formats a value with its type, for messages."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _places(file: Path, columns: Columns, halves: bool) -> Iterator[Any]:
    """A place in the file, its size, and what parses the row there, if there is one."""
    kind = Path(file.name.removesuffix(".gz").removesuffix(".zst")).suffix
    if kind == ".parquet":
        yield from _parquet_rows(file, columns)
        return
    stream = io.BufferedReader(pa.input_stream(str(file), compression="detect"), CHUNK)
    # Lines end with CR or LF; other separators may be part of a text.
    with io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="") as text:
        if kind == ".csv":
            yield from _csv_rows(text)
        elif kind == ".json" and stream.peek().lstrip(_SPACE.encode())[:1] == b"[":
            yield from _json_rows("record", _list_items(text), halves)
        else:
            yield from _json_rows("line", _lines(text), halves)


def _lines(text: io.TextIOWrapper, size: list[int] | None = None) -> Iterator[str]:
    """Lines; `size` has the characters of a record of several so far."""
    while line := text.readline(ROW_SIZE + 1):
        read = size or [0]
        read[0] += len(line)
        if read[0] > ROW_SIZE:
            raise ValueError(f"the line is longer than {ROW_SIZE >> 20} MiB; split it")
        yield line


def _list_items(text: io.TextIOWrapper) -> Iterator[str]:
    """The JSON texts in a list, of which only a part is in memory."""
    part, at, step, scan = "", 0, _OPENING, json.JSONDecoder().raw_decode
    while not (mark := step.match(part, at)) or not mark[1]:
        failure = "a comma or ] is missing"
        try:
            end = scan(part, mark.end())[1] if mark else len(part)
        except json.JSONDecodeError as error:
            # Its line and column would be those in the part.
            end, failure = len(part), error.msg
        if end < len(part):  # otherwise a number may go on
            yield part[mark.end() : end]
            at, step = end, _SEPARATOR
            continue
        # An item is scanned again when twice as much of it is there.
        part, at = part[at:], 0
        more = text.read(min(max(CHUNK, len(part)), max(ROW_SIZE - len(part) + 1, 0)))
        part += more
        if not more:
            raise ValueError(f"the next one is not valid JSON, or too long: {failure}")
    if (part[mark.end() :] + text.read(CHUNK)).strip(_SPACE):
        raise ValueError("there is text after the end of the list")


def _json_rows(name: str, texts: Iterable[str], halves: bool) -> Iterator[Any]:
    for n, text in enumerate(texts, 1):
        parse = text.strip(_SPACE) and partial(_json_record, text, halves)
        yield f"{name} {n}", len(text), parse


def _json_record(text: str, halves: bool) -> Record:
    try:
        value = parse_json(text, halves)
    except (ValueError, RecursionError) as error:
        fix = "Write one JSON object per line, in UTF-8"
        raise ValueError(f"not valid JSON: {_reason(error)}. {fix}") from error
    if isinstance(value, dict):
        return value
    raise ValueError(f"the record is {shown(value)}, not an object; write one per line")


def _csv_rows(text: io.TextIOWrapper) -> Iterator[Any]:
    csv.field_size_limit(ROW_SIZE)  # traces can be long
    rows = csv.reader(_lines(text, size := [0]), strict=True)
    header = [name.strip(_SPACE) for name in next(rows, ())]
    _check_utf8("".join(header))
    _distinct([(name, None) for name in header if name])
    n = 0
    for row in rows:
        size[0], n = 0, n + bool(row)
        parse = row and partial(_csv_record, header, row)
        yield f"record {n}", sum(map(len, row)), parse


def _csv_record(header: list[str], row: list[str]) -> Record:
    if len(row) > len(header):
        raise ValueError("it has more fields than the header; quote texts with commas")
    _check_utf8("".join(row))
    # Cells that are left out at the end are empty.
    return {k: v or None for k, v in zip(header, row, strict=False)}


def _parquet_rows(file: Path, columns: Columns) -> Iterator[Any]:
    options = {"buffer_size": CHUNK, "page_checksum_verification": True}
    with pq.ParquetFile(file, **options) as pf:
        schema = pf.schema_arrow
        empty = _distinct([(name, None) for name in schema.names])
        read = [x for x in schema if columns is None or x.name.lower() in columns]
        for x in read:  # Python has no nanoseconds, and a list can repeat a long text
            if pa.types.is_temporal(x.type) or "dictionary<" in str(x.type)[1:]:
                raise ValueError(f"{x.name} is {x.type}; convert it to texts")
        names = [x.name for x in read]
        leaves = [pf.schema.column(k) for k in range(len(pf.schema))]
        inside, number = tuple(f"{name}." for name in names), itertools.count(1)
        nested = [x.path for x in leaves if x.path.startswith(inside)]
        lean = pq.ParquetFile(file, read_dictionary=nested, **options)
        for n in range(pf.num_row_groups):
            group = pf.metadata.row_group(n)
            part = {"row_groups": [n], "use_threads": False}
            values = [group.column(k).num_values for k in range(len(leaves))]
            sizes = [count * max(8, x.length) for count, x in zip(values, leaves)]
            # A page can have all the bytes, and a list in a row all the values.
            yield "", group.total_byte_size + max(sizes, default=0), None
            for slab in lean.iter_batches(SLAB, columns=nested, **part):
                yield "", sum(map(_text_size, slab.columns)), None
            for batch in pf.iter_batches(BATCH, columns=names, **part):
                for k in range(len(batch)):
                    parse = partial(_parquet_record, batch, k, empty)
                    yield f"record {next(number)}", 0 if k else batch.nbytes, parse


def _text_size(x: pa.Array) -> int:
    """Bytes of the texts of nested columns, each as often as it is there."""
    if isinstance(x, pa.DictionaryArray):
        return pc.sum(pc.binary_length(x.dictionary).take(x.indices)).as_py() or 0
    if isinstance(x, pa.MapArray):
        return _text_size(x.keys) + _text_size(x.items)
    parts = x.flatten() if hasattr(x, "flatten") else []
    return sum(map(_text_size, parts if isinstance(parts, list) else [parts]))


def _parquet_record(batch: pa.RecordBatch, row: int, empty: Record) -> Record:
    # All columns are keys, so that messages can list them.
    return empty | batch.slice(row, 1).to_pylist()[0]


def _distinct(pairs: list[tuple[str, Any]]) -> Record:
    """A dict; raises ValueError if a key is there twice."""
    if len(made := dict(pairs)) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{reprlib.repr(name)} is there twice; rename one")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def _check_utf8(text: str) -> None:
    """Raises ValueError where bytes were not UTF-8, and became surrogates."""
    if "\0" in text:
        raise ValueError("it has NUL bytes, as UTF-16 has; save it as UTF-8")
    text.encode(errors="surrogateescape").decode()


def _reason(error: Exception) -> str:
    reason = re.sub("; use sys.*", "; write it as a text", " ".join(str(error).split()))
    return reason + "; save it as UTF-8" * isinstance(error, UnicodeError)
