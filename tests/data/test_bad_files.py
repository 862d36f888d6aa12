"""Bad and hostile data files: read right, or refused by one message that names the file."""

import csv
import gzip
import io
import itertools
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from rlt_jax.data import formats, pipeline
from rlt_jax.data.predictions import read_predictions
from rlt_jax.data.tables import read_records
from rlt_jax.data.tasks import benchmarks, gpqa, gsm8k
from rlt_jax.data.templates import load_template
from rlt_jax.data.traces import read_completions, read_problems, read_traces
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Trace

TEMPLATE = load_template("rlt")
ROW = {"question": "3+4?", "solution": "7", "reasoning_trace": "z", "answer": "7"}
PROBLEM = Problem("3+4?", "7", "7")
LINE = json.dumps(ROW).encode() + b"\n"
LIST = json.dumps([ROW, ROW]).encode()
CSV = b"question,solution,answer\n3+4?,7,7\n"
BOM = b"\xef\xbb\xbf"
COMPRESSED = [end for end in formats.ENDINGS if end.count(".") == 2]


def compressed(name: str, content: bytes) -> bytes:
    """The content as a file of this name has it."""
    if name.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    if name.endswith(".zst"):
        return pa.compress(content, codec="zstd", asbytes=True)
    return content


def refused(path: Path | str, read: Callable[..., Any] = read_problems) -> str:
    """The message with which a file is refused; checks what is true of all of them."""
    with pytest.raises(UserError) as error:
        list(read(str(path), TEMPLATE))
    return checked(error.value, str(path))


def checked(error: UserError, path: str) -> str:
    message = str(error)
    assert "\n" not in message and len(message) < 2000
    assert path in message
    message.encode()
    return message.replace(path, "FILE")


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("bom.csv", BOM + CSV, 1),
        ("bom.jsonl", BOM + LINE, 1),
        ("bom in the middle.jsonl", (BOM + LINE) * 2, 2),
        ("bom.json", BOM + LIST, 2),
        ("cr.csv", CSV.replace(b"\n", b"\r"), 1),
        ("cr.jsonl", LINE.replace(b"\n", b"\r") * 3, 3),
        ("cr.json", json.dumps([ROW], indent=1).replace("\n", "\r").encode(), 1),
        ("crlf.csv", CSV.replace(b"\n", b"\r\n"), 1),
        ("crlf.jsonl", LINE.replace(b"\n", b"\r\n") * 2, 2),
        ("no end.csv", CSV.rstrip(), 1),
        ("indented.json", json.dumps([ROW] * 3, indent=8).encode(), 3),
        ("lines.json", LINE * 2, 2),
        ("space.json", b" \n\t" + LIST + b"\n \n", 2),
        ("space.csv", CSV.replace(b"question,", b" question , "), 1),
        ("no names.csv", b"question,answer,,\n3+4?,7,,\n", 1),
        ("short row.csv", b"question,answer,solution,x\n3+4?,7\n", 1),
        ("closed.jsonl", json.dumps(ROW | {"closed": " TRUE "}).encode(), 1),
        ("digits.jsonl", LINE.replace(b"{", b'{"id": %s,' % (b"9" * 400)), 1),
        ("nan.jsonl", LINE.replace(b"{", b'{"id": NaN, "x": -Infinity, '), 1),
        ("deep.jsonl", LINE.replace(b"{", b'{"x": ' + b"[" * 99 + b"]" * 99 + b","), 1),
        ("escaped.jsonl", json.dumps(ROW | {"x": "\U0001f600"}).encode(), 1),
        ("long.jsonl", json.dumps(ROW | {"x": "x" * 2**22}).encode(), 1),
        ("one.gz.jsonl", LINE, 1),
    ],
)
def test_odd_files_are_read_right(
    name: str, content: bytes, count: int, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert read_problems(str(path), TEMPLATE) == [PROBLEM] * count


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("9" * 400, "9" * 400),
        ("-" + "9" * 4300, "-" + "9" * 4300),
        ("1e22", "10000000000000000000000.0"),
        ("-1E-7", "-0.0000001"),
        ("0.1000", "0.1"),
        ('"\\u0000"', "\0"),
        ('"\\ud83d\\ude00"', "\U0001f600"),
    ],
)
def test_odd_answers_are_read_right(answer: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "q", "answer": {answer}}}')
    assert read_problems(str(path), TEMPLATE) == [Problem("q", text, text)]


def answered(answer: bytes) -> bytes:
    return b'{"question": "q", "answer": ' + answer + b"}\n"


NOT_UTF8 = r"'utf-8' codec can't decode byte 0x.. in position \d+.*; save it as UTF-8"
NUL = "it has NUL bytes, as UTF-16 has; save it as UTF-8"
TWICE = "is there twice; rename one"
REFUSED = [
    (
        "more cells.csv",
        CSV + b"a,b,c,d\n",
        "record 2: it has more fields than the head",
    ),
    (
        "more empty cells.csv",
        CSV + b"a,b,c,\n",
        "record 2: it has more fields than the",
    ),
    ("twice.csv", b"question,answer, answer\n1,2,3\n", f"'answer' {TWICE}"),
    (
        "open quote.csv",
        CSV + b'"a,b,c\nx,y,z\n',
        "after record 1: unexpected end of dat",
    ),
    ("half quote.csv", CSV + b'"a"b,c,d\n', "after record 1: ',' expected after '\"'"),
    ("latin 1.csv", CSV + "é,1,2\n".encode("latin-1"), f"record 2: {NOT_UTF8}"),
    ("latin 1 name.csv", "é,a\n1,2\n".encode("latin-1"), f"cannot be read: {NOT_UTF8}"),
    ("utf 16.csv", CSV.decode().encode("utf-16"), NUL),
    ("utf 16 le.csv", CSV.decode().encode("utf-16-le"), NUL),
    ("nul.csv", CSV + b"a\0b,1,2\n", f"record 2: {NUL}"),
    ("empty.csv", b"", "FILE: the file has no records; remove it"),
    ("header.csv", CSV.splitlines()[0], "FILE: the file has no records; remove it"),
    ("blank lines.csv", b"\n\n\n", "FILE: the file has no records; remove it"),
    (
        "semicolons.csv",
        b"question;answer\n1;2\n",
        "record 1: .* keys are question;answer",
    ),
    (
        "list.csv",
        b"messages,answer\n[1,1\n",
        r"record 1: messages is '\[1' .*a CSV file",
    ),
    (
        "twice in list.csv",
        b'messages\n"[{""role"": 1, ""role"": 2}]"\n',
        f"record 1: messages is .*'role' {TWICE}",
    ),
    (
        "deep list.csv",
        b"messages\n" + b"[" * 100_000 + b"\n",
        "record 1: messages is .*recursion depth exceeded",
    ),
    ("twice.jsonl", LINE + answered(b'1, "answer": 1'), f"line 2: .*'answer' {TWICE}"),
    ("twice.json", b"[" + answered(b'1, "answer": 1') + b"]", f"record 1: .*{TWICE}"),
    (
        "twice inside.jsonl",
        answered(b'{"a": 1, "": 0, "": 0}'),
        f"line 1: .*'' {TWICE}",
    ),
    (
        "deep lists.jsonl",
        LINE + b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "line 2: not valid JSON: maximum recursion depth exceeded",
    ),
    (
        "deep objects.jsonl",
        b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
        "line 1: not valid JSON: maximum recursion depth exceeded",
    ),
    ("deep.json", b"[" * 100_000, "cannot be read: maximum recursion depth exceeded"),
    (
        "deep prompt.jsonl",
        b'{"prompt":' + b"[" * 400 + b"]" * 400 + b"}",
        "line 1: prom",
    ),
    (
        "infinity.jsonl",
        answered(b"-Infinity"),
        r"line 1: answer is -inf \(float\); it mu",
    ),
    (
        "nan.jsonl",
        answered(b"NaN"),
        r"line 1: answer is nan \(float\); it must be a str",
    ),
    ("large.jsonl", answered(b"1e999"), r"line 1: answer is inf \(float\); it must be"),
    ("digits.jsonl", answered(b"1" * 9999), r"line 1: .* \(4300 digits\).* as a text"),
    (
        "latin 1.jsonl",
        LINE + answered(b'"\xe9"'),
        f"line 2: not valid JSON: {NOT_UTF8}",
    ),
    ("latin 1.json", b"[" + answered(b'"\xe9"') + b"]", f"record 1: .*{NOT_UTF8}"),
    ("utf 16.jsonl", LINE.decode().encode("utf-16"), f"line 1: not valid JSON: {NUL}"),
    ("utf 16 be.jsonl", LINE.decode().encode("utf-16-be"), f"line 1: .*: {NUL}"),
    ("utf 32.jsonl", LINE.decode().encode("utf-32"), f"line 1: .*: {NUL}"),
    ("utf 16.json", LIST.decode().encode("utf-16"), NUL),
    ("nul.jsonl", LINE + b"\0" * 999, f"line 2: not valid JSON: {NUL}"),
    ("surrogate.jsonl", answered(b'"\\ud800"'), r"line 1: .*can't encode .*'\\ud800'"),
    ("surrogate key.jsonl", answered(b'1, "\\uDFFF": 1'), r"line 1: .*'\\udfff'"),
    ("raw surrogate.jsonl", answered(b'"\xed\xa0\x80"'), f"line 1: .*: {NOT_UTF8}"),
    ("empty.jsonl", b"", "FILE: the file has no records; remove it"),
    ("empty.json", b"", "FILE: the file has no records; remove it"),
    ("empty list.json", b" [ ]\n", "FILE: the file has no records; remove it"),
    (
        "cut.json",
        LIST[:-9],
        "cannot be read after record 1: .*not valid JSON.*Untermin",
    ),
    ("no end.json", LIST[:-1], "cannot be read after record 1: .*not valid JSON"),
    (
        "more.json",
        LIST + b"x",
        "cannot be read after record 2: there is text after the e",
    ),
    (
        "two lists.json",
        LIST + LIST,
        "cannot be read after record 2: there is text after",
    ),
    (
        "no comma.json",
        b"[" + LINE * 2 + b"]",
        "after record 1: .*a comma or ] is missin",
    ),
    ("last comma.json", LIST[:-1] + b",]", "after record 2: .*Expecting value"),
    ("numbers.json", b"[1, 2]", r"record 1: the record is 1 \(int\), not an object"),
    ("one object.json", json.dumps(ROW, indent=1).encode(), "line 1: not valid JSON"),
    ("gzip.jsonl", gzip.compress(LINE, mtime=0), "line 1: not valid JSON"),
    ("no gzip.jsonl.gz", LINE, "cannot be read: zlib inflate failed"),
    ("no zstandard.csv.zst", CSV, "cannot be read: ZSTD decompress failed"),
    ("empty.jsonl.gz", b"", "FILE: the file has no records"),
    (
        "keys.jsonl",
        json.dumps(dict.fromkeys(map(str, range(10**5)))).encode(),
        "keys are",
    ),
    ("long key.jsonl", json.dumps({"a\n" * 10**6: 1}).encode(), "the keys are a a a"),
    ("roles.jsonl", b'{"messages": [{"role": {}, "content": ""}]}', "role is {}"),
    (
        "many roles.jsonl",
        json.dumps({"messages": [{"role": "\n", "content": ""}] * 10**4}).encode(),
        r"the roles in messages are \['\\n', ",
    ),
    (
        "bool.jsonl",
        answered(b"false"),
        r"line 1: answer is False \(bool\); it must be a",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_bad_files_are_refused(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    start = time.process_time()
    assert re.search(message, refused(path))
    assert time.process_time() - start < 10


def test_closed_is_true_or_false(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for closed in ("no", "1", 2, 0.5, {}, [False], "\ufeff"):
        path.write_text(json.dumps(ROW | {"closed": closed}))
        message = refused(path, read_traces)
        assert "FILE, line 1: closed is " in message and "true or false" in message


@pytest.mark.parametrize("end", COMPRESSED)
def test_compressed_files_are_read_as_they_are(end: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [ROW | {"question": f"{n} é {rng.bytes(n).hex()}?"} for n in range(700)]
    plain = tmp_path / f"a.{end.split('.')[1]}"
    write_rows(plain, rows)
    whole = compressed(end, plain.read_bytes())
    path = tmp_path / f"b{end}"
    path.write_bytes(whole)
    problems = read_problems(str(path), TEMPLATE)
    assert problems == read_problems(str(plain), TEMPLATE) and len(problems) == 700
    assert read_problems(str(tmp_path), TEMPLATE) == problems * 2
    # A damaged end is not read, if the limit is before it.
    for bad in (whole[:-1], whole[: len(whole) // 2], whole + b"more"):
        path.write_bytes(bad)
        assert read_problems(str(path), TEMPLATE, limit=1) == problems[:1]
        assert re.search("FILE cannot be read( after .* ..*)?: ", refused(path))


def test_two_compressed_files_in_one(tmp_path: Path) -> None:
    for end in (".jsonl.gz", ".jsonl.zst"):
        path = tmp_path / f"a{end}"
        path.write_bytes(compressed(end, LINE) * 2)
        assert read_problems(str(path), TEMPLATE) == [PROBLEM] * 2


ODD_TYPES = [
    (pa.array([b"7"]), "b'7' (bytes)"),
    (pa.array([["7"]]), "['7'] (list)"),
    (pa.array([{"a": 1}]), "{'a': 1} (dict)"),
    (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "[('a', 1)] (list)"),
    (pa.array(["7.5"]).cast(pa.decimal128(9, 2)), "Decimal('7.50') (Decimal)"),
    (pa.array([True]), "True (bool)"),
    (pa.array([float("inf")]), "inf (float)"),
    (pa.array([1], pa.timestamp("ns")), "timestamp[ns]"),
    (pa.array([10**9], pa.date32()), "date32[day]"),
    (pa.array([1], pa.duration("ns")), "duration[ns]"),
    (pa.array([1], pa.time64("ns")), "time64[ns]"),
]


@pytest.mark.parametrize(("column", "shown"), ODD_TYPES, ids=lambda x: str(x)[-20:])
@pytest.mark.parametrize("name", ["question", "answer"])
def test_odd_columns_are_refused_by_name(
    name: str, column: pa.Array, shown: str, tmp_path: Path
) -> None:
    texts = {"question": ["q"], "answer": ["7"]}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(texts | {name: column}), path)
    if (name, shown) == ("question", "['7'] (list)"):
        shown = "question"
    message = refused(path)
    assert f"{name} is " in message and shown in message
    # In a column that is not read anything may be.
    pq.write_table(pa.table(texts | {"other": column}), path)
    assert read_problems(str(path), TEMPLATE) == [Problem("q", "7", "7")]


@pytest.mark.parametrize(
    ("column", "answer"),
    [
        (pa.array(["7"], pa.large_string()), "7"),
        (pa.array(["7"]).dictionary_encode(), "7"),
        (pa.array([7], pa.uint64()), "7"),
        (pa.array([2**64 - 1], pa.uint64()), str(2**64 - 1)),
        (pa.array([0.5], pa.float32()), "0.5"),
        (pa.nulls(1), None),
    ],
)
def test_other_columns_are_converted(
    column: pa.Array, answer: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"question": ["q"], "solution": ["s"], "answer": column}), path
    )
    assert read_problems(str(path), TEMPLATE) == [Problem("q", "s", answer)]


def test_odd_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = [pa.array(["q"]), pa.array(["r"])]
    pq.write_table(pa.Table.from_arrays(columns, ["question"] * 2), path)
    assert f"'question' {TWICE}" in refused(path)
    # Neither the writer nor the reader checks that texts are UTF-8.
    bad = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"q\xff")
    )
    pq.write_table(pa.table({"question": bad, "answer": ["1", "2"]}), path)
    assert re.search(f"record 2: {NOT_UTF8}", refused(path))
    repeated = pa.ListArray.from_arrays([0, 1], pa.array(["x"]).dictionary_encode())
    pq.write_table(pa.table({"question": ["q"], "completions": repeated}), path)
    assert "completions is list<" in refused(path)
    column = pa.array(["q"])
    for _ in range(300):
        column = pa.StructArray.from_arrays([column], ["a"])
    pq.write_table(pa.table({"question": column}), path)
    assert "too deeply nested" in refused(path)


def test_the_rest_of_a_table_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    rows = [{"question": rng.bytes(500).hex(), "answer": str(n)} for n in range(400)]
    table = pa.Table.from_pylist(rows)
    options = {"use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, path, row_group_size=100, **options)
    whole = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(2).column(0)
    whole[group.data_page_offset + 50_000] ^= 1
    path.write_bytes(whole)
    assert len(read_problems(str(path), TEMPLATE, limit=200)) == 200
    # The flipped bit leaves a text of the same length: only the checksum tells.
    assert "FILE cannot be read after record 200: " in refused(path)


def parquet_bomb(path: Path, text: str, count: int) -> None:
    """A table of many rows that have the same long text, in a small file."""
    codes = pa.array(np.zeros(count, np.int32))
    column = pa.DictionaryArray.from_arrays(codes, pa.array([text]))
    pq.write_table(pa.table({"question": column, "answer": column}), path)


def test_small_files_with_large_contents_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "EXPANDED_SIZE", 2**20)
    monkeypatch.setattr(formats, "ROW_SIZE", 2**18)
    row = LINE.strip()
    contents = {
        "rows.jsonl": LINE * 20_000,
        "lines.jsonl": b"\n" * 10**5,
        "list.json": b"[" + b",".join([row] * 20_000) + b"]",
        "numbers.json": b"[" + b"1," * 10**5 + b"1]",
        "rows.csv": CSV + CSV.splitlines(keepends=True)[1] * 10**5,
        "lines.csv": b"\n" * 10**5,
    }
    for name, end in itertools.product(contents, (".gz", ".zst")):
        path = tmp_path / (name + end)
        path.write_bytes(compressed(end, contents[name]))
        assert path.stat().st_size < 30_000
        # Where the first row is bad, it is the one that is told.
        message = "is 1 (int)" if name.startswith("num") else "it expands 100-fold; if"
        assert message in refused(path), name
        if "rows" in name or name == "list.json":
            assert len(read_problems(str(path), TEMPLATE, limit=1000)) == 1000
        with pytest.raises(UserError, match="expands 100-fold"):
            list(read_records(str(path)))
    for name, start in (("a.jsonl", b'{"a": "'), ("a.json", b'["'), ("a.csv", b'"')):
        for part in (b"x" * 2**20, b"x\n" * 2**19, b" " * 2**20):
            path = tmp_path / f"{name}.zst"
            path.write_bytes(compressed(".zst", start + part))
            refused(path)
    path = tmp_path / "a.parquet"
    parquet_bomb(path, "x" * 10**4, 10**5)
    assert path.stat().st_size < 10**4
    assert "expands 100-fold" in refused(path)
    assert len(read_problems(str(path), TEMPLATE, limit=5)) == 5
    empty = pa.ListArray.from_arrays([0, 10**6], pa.nulls(10**6, pa.string()))
    rows = {"question": ["q"], "answer": ["1"], "completions": empty}
    pq.write_table(pa.table(rows), path)
    assert "expands 100-fold" in refused(path)
    rows = {"question": ["q"], "answer": ["1" * 10**7]}
    pq.write_table(pa.table(rows), path, compression="zstd")
    assert "expands 100-fold" in refused(path)


def test_a_long_text_many_times_in_a_list_is_refused(tmp_path: Path) -> None:
    path, text = tmp_path / "a.parquet", "x" * 2**20
    for value in ([text] * 200, [{"a": {"b": [text] * 100}}] * 2):
        rows = {"question": ["q"], "answer": ["1"], "completions": pa.array([value])}
        options = {"dictionary_pagesize_limit": 2**30, "store_schema": False}
        pq.write_table(pa.table(rows), path, compression="zstd", **options)
        tracemalloc.start()
        assert "expands 100-fold" in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()
    turns = [
        {"role": "user", "content": "é" * 99},
        {"role": "assistant", "content": ""},
    ]
    pq.write_table(
        pa.table({"messages": [turns, None] * 1000}), path, row_group_size=300
    )
    assert len(list(read_records(str(path), columns=("messages",)))) == 2000


def test_a_row_has_a_limit_whatever_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "ROW_SIZE", 2**18)
    text = "x" * (2**17 - 1000)
    for count, fits in ((1, True), (3, False)):
        cells = ",".join(f'"{text}\n"' for _ in range(count))
        (tmp_path / "a.csv").write_text(f"question,answer,b,c,d\nq,1,{cells}\n" * 1)
        row = ROW | {"x": [text] * count}
        (tmp_path / "a.json").write_text(json.dumps([row, row]))
        for name in ("a.csv", "a.json"):
            if fits:
                assert read_problems(str(tmp_path / name), TEMPLATE)
            else:
                assert "long" in refused(tmp_path / name)


def test_files_are_streams(tmp_path: Path) -> None:
    rows = [ROW | {"question": f"{n}?", "more": "x" * 4000} for n in range(1500)]
    for name in ("a.jsonl", "a.json", "a.csv", "a.json.zst"):
        path = tmp_path / name
        write_rows(path, rows)
        tracemalloc.start()
        first = next(iter(read_records(str(path))))
        assert sum(1 for _ in read_records(str(path))) == len(rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert first[1]["question"] == "0?"
        assert peak < 2**20, f"{name}: {peak}"


HOSTILE = r"""
import json, pathlib, re, sys, time
from rlt_jax.data.templates import load_template
from rlt_jax.data.traces import read_problems
from rlt_jax.errors import UserError
template = load_template("rlt")
start = time.process_time()
try:
    outcome = len(read_problems(sys.argv[1], template))
except UserError as error:
    outcome = str(error)
seconds = time.process_time() - start
# The peak that getrusage tells is at least that of the process that started this one.
peak = re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
print(json.dumps([outcome, seconds, int(peak[1]) / 2**20]))
"""


def write_hostile(folder: Path) -> list[Path]:
    """Files that are much work for a reader."""
    million = 2**20
    texts: dict[str, list[bytes]] = {
        "line.jsonl": [LINE, b'{"question": "', b"x" * million * 100, b'"}'],
        "element.json": [b"[", LINE, b',{"question": "', b"x" * million * 100, b'"}]'],
        "lists.jsonl": [b'{"question": "q", "x": [', b"[]," * 10 * million, b"[]]}"],
        "objects.jsonl": [b'{"x": [', b'{"a":0},' * 4 * (million - 99), b"0]}"],
        "fields.csv": [CSV, b"," * 30 * million],
        "quote.csv": [CSV, b'"', b"abc def\n" * 20 * million],
        "broken.json": [b'[{"question": ', b"[1,2,3]," * 10 * million],
        "rows.jsonl.zst": [LINE * (million // len(LINE))] * 1000,
        "lines.csv.gz": [b"\n" * million] * 300,
        "line.jsonl.zst": [b'{"question":"', *[b"x" * million] * 3000],
        "spaces.json.zst": [b"[", *[b" " * million] * 3000],
        "long.jsonl.zst": [json.dumps(ROW | {"x": "x" * 2**23}).encode() + b"\n"] * 200,
    }
    for name, parts in texts.items():
        with pa.output_stream(str(folder / name), compression="detect") as stream:
            for part in parts:
                stream.write(part)
    parquet_bomb(folder / "short.parquet", "x" * 10**6, 10**6)
    parquet_bomb(folder / "long.parquet", "x" * 10**8, 10**3)
    return sorted(folder.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_files_need_little_memory_and_time(tmp_path: Path) -> None:
    for path in write_hostile(tmp_path):
        result = subprocess.run(
            [sys.executable, "-c", HOSTILE, str(path)],
            capture_output=True,
            text=True,
            check=True,
        )
        outcome, seconds, gigabytes = json.loads(result.stdout)
        print(f"{path.name}: {seconds:.1f} s, {gigabytes:.2f} GB, {outcome}")
        assert path.name in str(outcome) or path.name == "lists.jsonl"
        assert gigabytes < 2
        assert seconds < 30  # of a busy machine; a tenth of it where nothing else runs


def test_other_keys_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE)
    for limit in (0, -1, 1.5, "1"):
        with pytest.raises(
            UserError, match=f"data.limit={limit!r}: .*at least 1, or N"
        ):
            read_problems(str(path), TEMPLATE, limit=limit)
        with pytest.raises(
            UserError, match=f"data.limit={limit!r}: .*at least 1, or N"
        ):
            gsm8k.problems(str(path), limit=limit)
    with pytest.raises(UserError, match=r"data.on_bad_row='drop': one of error, skip"):
        read_problems(str(path), TEMPLATE, on_bad_row="drop")
    for wrong in (None, 5, ["a.jsonl"]):
        with pytest.raises(UserError, match="'file': path=.*: a text"):
            pipeline.load_problems({"task": "file", "path": wrong}, TEMPLATE, seed=0)


BAD_ROWS = [
    {"question": "no more"},
    {"question": 5, "solution": "s"},
    {"question": "q", "solution": "s", "answer": [1]},
    {"solution": "s", "reasoning_trace": "z"},
    {"messages": [{"role": "user"}]},
]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.csv.zst"]
)
def test_skipped_rows_are_counted_and_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / name
    bad = [row for row in BAD_ROWS if "messages" not in row]
    bad = [
        row for row in bad if type(row.get("question", "")) is str or "csv" not in name
    ]
    if "csv" in name or "parquet" in name:  # columns have one type
        bad = [{"question": "no more"}, {"solution": "s", "reasoning_trace": "z"}]
    good = [ROW | {"question": f"{n}?"} for n in range(20)]
    rows = [*good, *bad * 4]
    order = rng.permutation(len(rows)).tolist()
    write_rows(path, [rows[n] for n in order])
    kept = [rows[n]["question"] for n in order if n < len(good)]
    data = {"task": "file", "path": str(path)}
    with pytest.raises(UserError):
        pipeline.load_problems(data, TEMPLATE, 0)
    caplog.set_level(logging.WARNING)
    data["on_bad_row"] = "skip"
    for load in (pipeline.load_problems, pipeline.load_traces):
        caplog.clear()
        found = load(data, TEMPLATE, 0)
        assert [getattr(x, "problem", x).question for x in found] == kept
        *reasons, summary = [record.getMessage() for record in caplog.records]
        count = len(rows) - len(good)
        assert f"skipped {count} of {len(rows)} rows" in summary and name in summary
        assert len(reasons) == min(count, 5)
        unit = "line" if name == "a.jsonl" else "record"
        places = [
            f"{path}, {unit} {n}: " for n, i in enumerate(order, 1) if i >= len(good)
        ]
        for reason, place in zip(reasons, places, strict=False):
            assert place in reason and "\n" not in reason
    assert len(pipeline.load_problems(data | {"limit": 9}, TEMPLATE, 0)) == sum(
        n < len(good) for n in order[:9]
    )
    mix = {"task": "mix", "sources": {"a": data}}
    (source,) = pipeline.load_sources(mix, TEMPLATE, 0)
    assert source.traces == pipeline.load_traces(data, TEMPLATE, 0)


def test_lines_that_are_no_json_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    bad = [b"{", b"\xff", b"[1]", b"\0\0", b"[" * 10**5, answered(b'1, "answer": 2')]
    path.write_bytes(b"\n".join([LINE, *bad, LINE]))
    assert read_problems(str(path), TEMPLATE, on_bad_row="skip") == [PROBLEM] * 2
    assert "skipped 6 of 8 rows" in caplog.text
    path = tmp_path / "a.csv"
    path.write_bytes(CSV + b"a,b,c,d\n\xff,a,b\n" + CSV.splitlines()[1])
    assert read_problems(str(path), TEMPLATE, on_bad_row="skip") == [PROBLEM] * 2
    assert "skipped 2 of 4 rows" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{\n[]\n", "all 2 rows are bad; the last one is FILE, line 2: "),
        ("a.jsonl", LINE * 0, "FILE: the file has no records"),
        (
            "a.jsonl.gz",
            gzip.compress(LINE * 99, mtime=0)[:-9],
            "Truncated compressed stream",
        ),
        ("a.json", LIST[:-9], "FILE cannot be read after record 1"),
        ("a.csv", CSV + b'"', "FILE cannot be read after record 1"),
        ("a.csv", b"answer,answer\n1,2\n", TWICE),
        ("a.parquet", b"PAR1", "FILE cannot be read"),
    ],
)
def test_what_cannot_be_read_is_not_skipped(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    def read(*args: Any) -> list[Problem]:
        return read_problems(*args, on_bad_row="skip")

    assert message in refused(path, read)


# What generated files are made of, by reader: its rows, and how it is called.
PREDICTIONS = [Problem(f"{n}?", "s") for n in range(3)]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "s"}]
BASES: dict[str, tuple[list[dict[str, Any]], Callable[..., Any]]] = {
    "problems": ([ROW | {"question": f"{n}?"} for n in range(3)], read_problems),
    "traces": ([ROW | {"closed": n != 1} for n in range(3)], read_traces),
    "completions": ([ROW | {"completions": ["a", "b"]}] * 3, read_completions),
    "chats": ([{"messages": CHAT, "answer": 7.5}] * 3, read_problems),
    "predictions": (
        [{"question": f"{n}?", "completion": "x"} for n in range(3)],
        lambda path, _: read_predictions(path, PREDICTIONS),
    ),
    "math500": (
        [{"problem": "q", "answer": 3.0, "solution": "s"}] * 3,
        lambda path, _: benchmarks.problems("math500", path),
    ),
    "gsm8k": (
        [{"question": "q", "answer": "a <<1=1>>\n#### 1"}] * 3,
        lambda path, _: gsm8k.problems(path),
    ),
    "gpqa": (
        [{name: f"{name} {n}" for name in gpqa.COLUMNS} for n in range(3)],
        lambda path, _: gpqa.problems(path),
    ),
}
KINDS = ["jsonl", "json", "csv", "parquet", "jsonl.gz", "jsonl.zst"]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 10**30, 0.5, 1e300, float("nan"), float("inf")),
    *(
        "",
        " ",
        "7",
        "\0",
        "\ud800",
        "é\U0001f600",
        "\r\n",
        '"',
        "a,b",
        "[",
        "[{}]",
        "{}",
    ),
    *("9" * 5000, [], {}, [[]], [None], {"": 1}, ["a", 1], [{"role": "user"}]),
    [{"role": "user", "content": "x"}, {"role": "tool", "content": None}],
]
RAW = [
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\n",
        b"\r",
        b'"',
        b",",
        b"[",
        b"]",
        b"{",
        b"}",
    ),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"\\ud800",
        b"9" * 5000,
        b"[" * 2000,
        b"\x1f\x8b",
    ),
]
COUNTS: Counter[str] = Counter()


def write_rows(path: Path, rows: list[dict[str, Any]], header: list[str] = ()) -> None:
    """Writes rows in the format of the name; raises ValueError where it cannot have them."""
    kind = path.name.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if kind == "parquet":
        try:
            pq.write_table(pa.Table.from_pylist(rows), path)
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise ValueError("not a table") from error
        return
    text = io.StringIO(newline="")
    if kind == "csv":
        names = list(header) or list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.writer(text)
        writer.writerow(names)
        for row in rows:
            cells = [row.get(name) for name in names]
            writer.writerow(
                json.dumps(x) if isinstance(x, list | dict) else x for x in cells
            )
    elif kind == "json":
        json.dump(rows, text)
    else:
        text.write("".join(json.dumps(row) + "\n" for row in rows))
    content = text.getvalue().encode(errors="surrogatepass")
    path.write_bytes(compressed(path.name, content))


@st.composite
def changed_rows(draw: st.DrawFn, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with some values, keys and rows changed."""
    rows = [dict(row) for row in rows]
    for _ in range(draw(st.integers(0, 2))):
        row = rows[draw(st.integers(0, len(rows) - 1))]
        name = draw(st.sampled_from(sorted(row) or ["x"]))
        change = draw(st.sampled_from(["value", "drop", "rename", "add"]))
        value = draw(st.sampled_from(ODD_VALUES))
        if change == "value":
            row[name] = value
        elif change != "add":
            value = row.pop(name, None)
        if change in ("rename", "add"):
            other = [name.upper(), f" {name}", "", "solution", "completion"]
            row[draw(st.sampled_from(other))] = value
    return rows


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with some bytes flipped, left out, repeated or added."""
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3]))):
        a, b = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        change = draw(
            st.sampled_from(["flip", "cut", "drop", "repeat", "add", "utf-16"])
        )
        if change == "flip" and a < len(content):
            flipped = content[a] ^ (1 << draw(st.integers(0, 7)))
            content = content[:a] + bytes([flipped]) + content[a + 1 :]
        elif change == "cut":
            content = content[:a]
        elif change == "drop":
            content = content[:a] + content[b:]
        elif change == "repeat":
            content = content[:b] + content[a:]
        elif change == "add":
            added = draw(st.sampled_from(RAW))
            content = content[:a] + added + content[a:]
        elif change == "utf-16":
            content = content.decode("latin-1").encode("utf-16")
    return content


def is_valid(one: Any) -> bool:
    """Whether what was read is what its type says, of valid texts."""
    if isinstance(one, Trace):
        return is_valid(one.problem) and is_text(one.explanation)
    if isinstance(one, Problem):
        answer = one.answer is None or is_text(one.answer)
        turns = all(is_text(text) for turn in one.history for text in turn)
        is_asked = is_text(one.question) and bool(one.question.strip())
        return is_asked and is_text(one.solution) and answer and turns
    if isinstance(one, tuple):  # problem, completions
        return is_valid(one[0]) and is_valid(one[1])
    return isinstance(one, list) and all(is_text(text) for text in one)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value == value.encode().decode()


def check_generated(data: st.DataObject, kind: str) -> None:
    """Reads one generated file."""
    name = data.draw(st.sampled_from(sorted(BASES)))
    rows, read = BASES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.{kind}")
        write_rows(path, rows)
        original = path.read_bytes()
        expected = list(read(str(path), TEMPLATE))
        try:
            write_rows(path, data.draw(changed_rows(rows)))
        except ValueError:
            path.write_bytes(original)
        content = data.draw(changed_bytes(path.read_bytes()))
        path.write_bytes(content)
        options = {}
        if read in (read_problems, read_traces, read_completions):
            options = {"on_bad_row": data.draw(st.sampled_from(["error", "skip"]))}
        start = time.process_time()
        try:
            found = list(read(str(path), TEMPLATE, **options))
        except UserError as error:
            checked(error, str(path))
            outcome = "refused"
        else:
            assert found and all(map(is_valid, found))
            outcome = "the same" if found == expected else "another"
            assert content != original or outcome == "the same"
        assert time.process_time() - start < 10
    COUNTS[f"{kind}: {outcome}"] += 1


def check_many(kind: str, count: int) -> None:
    """Reads `count` generated files, the same in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options = {"derandomize": True, "database": None, "deadline": None}

    @settings(max_examples=count, suppress_health_check=slow, **options)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        check_generated(data, kind)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_generated_files_are_read_or_refused(kind: str) -> None:
    check_many(kind, 60)


@pytest.mark.slow
def test_many_generated_files_are_read_or_refused() -> None:
    COUNTS.clear()
    for kind in KINDS:
        check_many(kind, 1000)
    print(COUNTS.total(), "files:", dict(COUNTS))
    assert COUNTS.total() >= 5000
