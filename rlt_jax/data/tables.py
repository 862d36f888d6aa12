"""Records of files and folders, also of the Hugging Face Hub."""

import functools
import glob
import itertools
import os.path
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub
import numpy as np

from rlt_jax import stores
from rlt_jax.data.formats import ENDINGS, Columns, Rows, read_file, shown
from rlt_jax.errors import LOG, UserError
from rlt_jax.ranges import Limit, OneOf, check_ranges
from rlt_jax.records import Record

LOGGED = 5  # reasons of skipped rows
OnBadRow = Annotated[str, OneOf(("error", "skip"))]
# Data set, revision, and path in it.
_HUB_PATH = r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/\w+/[^/]+|[^/]+))?(?:/(.*))?"


def read_records(
    path: str, source: str = "", columns: Columns = None, halves: bool = False
) -> Rows:
    """Reads all records of one or more files.

    Args:
      path: a .jsonl, .json (a list, or one object per line), .csv or .parquet file, the
        first three also compressed (.jsonl.gz, .jsonl.zst), a directory with such files, or
        a glob pattern; or one of these in a data set of the Hugging Face Hub,
        "hf://datasets/ORG/NAME[@REVISION]/PATH".
      source: where the file can be downloaded, for the message when it is missing.
      columns: see `formats.read_file`.
      halves: see `formats.parse_json`.

    Yields:
      The file and line (or record number), for messages; and the record, or why the row is
      bad.

    Raises:
      UserError: a file is missing, cannot be read or is empty.
    """
    for file in find_files(path, source):
        where = ""
        for where, row in read_file(file, columns, halves):
            yield where, row
        if not where:
            raise UserError(f"{file}: the file has no records; remove it from `path`.")


def convert(
    rows: Rows,
    make: Callable[[str, Record], Any] = lambda *row: row,
    limit: Limit = None,
    on_bad_row: OnBadRow = "error",
) -> Iterator[Any]:
    """Makes what is wanted of records.

    Args:
      rows: from `read_records`.
      make: makes it of the place and the record, by default a pair of them; raises UserError
        for a bad one.
      limit: maximum number of rows, with those that are skipped; None for all.
      on_bad_row: "error", or "skip" leaves out bad rows, and logs how many they are and what
        is wrong with the first ones.

    Raises:
      UserError: a row is bad, or all are.
    """
    check_ranges("data", convert, {"limit": limit, "on_bad_row": on_bad_row})
    count = bad = 0
    for count, (where, row) in enumerate(itertools.islice(rows, limit), 1):
        try:
            if isinstance(row, UserError):
                raise row
            made = make(where, row)
        except UserError as error:
            if on_bad_row == "error":
                raise
            bad += 1
            if bad <= LOGGED:
                LOG.warning("skipped %s", error)
            reason = str(error)
        else:
            yield made
    if bad and bad == count:
        raise UserError(f"all {count} rows are bad; the last one is {reason}")
    if bad:
        LOG.warning("%s: skipped %d of %d rows up to here", where, bad, count)


def listed(names: Iterable[str]) -> str:
    """Joins column names for messages, in one line that is not too long."""
    return " ".join(", ".join(names)[:500].split())


def as_text(where: str, name: str, value: Any) -> str:
    """A text or a number of a column as text; "" for none.

    Raises:
      UserError: it is neither, or no finite number.
    """
    if value is None:
        return ""
    # A bool is an int in Python, and some files have NaN for a missing number.
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and np.isfinite(value):
        return np.format_float_positional(value, trim="0")
    raise UserError(
        f"{where}: {name} is {shown(value)}; it must be a string, a number or null."
    )


def find_files(path: str, source: str = "") -> list[Path]:
    """The files that `read_records` reads; raises UserError if there are none.

    Those of the Hub are downloaded once, and then read from its cache, also offline.
    """
    given, endings = path, ", ".join(ENDINGS)
    hint = f" Download it: {source}." if source else ""
    if str(path).startswith("hf:"):
        path, hint = _download(path)
    path = stores.local(str(path), depth=1)
    names, why = [path], f"{given}: it has no file that ends in {endings}; add one."
    if os.path.isdir(path):
        names = [file for file in Path(path).iterdir() if file.name.endswith(ENDINGS)]
    elif not os.path.isfile(path):
        names = glob.glob(path, recursive=True)
        why = f"{given!r}: no such file, folder or glob pattern; name one of {endings}."
    files = sorted(Path(name) for name in names if os.path.isfile(name))
    if not files:
        raise UserError(why + hint)
    for file in files:
        if not file.name.endswith(ENDINGS):
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
        options = {"repo_type": "dataset", "revision": revision}
        options |= {"allow_patterns": wanted, "ignore_patterns": deeper}
        root = huggingface_hub.snapshot_download(name, **options)
    except Exception as error:  # the HTTP library has its own
        raise UserError(
            f"{path!r} cannot be read: {' '.join(str(error).split())} Check the name and "
            "the network; for a private or gated data set, log in with `hf auth login` "
            "or set HF_TOKEN."
        ) from error
    page = f"https://huggingface.co/datasets/{name}/tree/{revision}"
    return os.path.join(root, inside), f" Its files are listed on {page}."
