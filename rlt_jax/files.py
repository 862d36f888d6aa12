"""Files of a run: written whole, appended to, and read with messages that name the line."""

import contextlib
import functools
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from reprlib import repr as short
from types import MappingProxyType
from typing import Any

from rlt_jax.errors import StorageError, UserError, storage_errno
from rlt_jax.ranges import check_value
from rlt_jax.records import Record

NO_KINDS: Mapping[str, Any] = MappingProxyType({})
GO_ON = (
    "Everything up to the last checkpoint or whole batch is safe. Free space or repair the "
    "storage, then give the same command again: it continues from there."
)


@contextlib.contextmanager
def storing(path: Path | str) -> Iterator[None]:
    """Names the path where writing it fails.

    Raises:
      StorageError: a full or failing disk.
      UserError: another reason, such as a folder without permission to write.
    """
    try:
        yield
    except (UserError, StorageError):
        raise
    except Exception as error:
        what = f"cannot write {path}"
        if number := storage_errno(error):
            raise StorageError(f"{what}: {os.strerror(number)}. {GO_ON}") from error
        if isinstance(error, OSError):
            reason = f"{error.strerror}. Change that, or use another --workdir."
            raise UserError(f"{what}: {reason}") from error
        raise


def write_whole(file: Path, content: bytes | str) -> None:
    """Writes all of a file or, cut off in between, nothing under its name.

    Raises:
      StorageError, UserError: see `storing`; what was there before is kept.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = file.with_name(f"{file.name}.partial")
    with storing(file):
        try:
            with partial.open("wb") as opened:
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(partial, file)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        sync_folder(file.parent)


def sync(path: Path) -> None:
    """Makes the content of a file or folder survive a power failure."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power failure, where its storage can do that."""
    with contextlib.suppress(OSError):  # object stores mounted as folders cannot
        sync(folder)


def write_json(file: Path, values: Any) -> None:
    """Writes an indented JSON file whole; see `write_whole`."""
    write_whole(file, json.dumps(values, indent=2) + "\n")


def append_jsonl(file: Path, records: list[Record]) -> None:
    """Appends records to a JSON Lines file, after dropping an incomplete last line.

    Numbers that are not finite are written as null, as JSON has none of them.
    """
    dumps = functools.partial(json.dumps, ensure_ascii=False, allow_nan=False)
    try:
        lines = "".join(dumps(record) + "\n" for record in records)
    except ValueError:
        lines = "".join(dumps(finite(record)) + "\n" for record in records)
    with storing(file), file.open("ab+") as opened:
        if opened.tell():
            opened.seek(-1, os.SEEK_END)
            if opened.read() != b"\n":
                opened.seek(0)
                opened.truncate(opened.read().rfind(b"\n") + 1)
        # Lone surrogates are written as JSON escapes.
        opened.write(lines.encode("utf-8", "backslashreplace"))
        opened.flush()
        os.fsync(opened.fileno())


def finite(value: Any) -> Any:
    """A JSON value with None in the place of infinities and NaNs."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_regular(file: Path) -> bool:
    """Whether a file is there.

    Raises:
      UserError: a folder, a pipe or the like is there; opening a pipe would wait for ever.
    """
    if file.is_file():
        return True
    if file.exists() or file.is_symlink():
        raise UserError(f"{file} is no regular file: remove it, or use another folder.")
    return False


def read_json(
    file: Path, missing: Record | None = None, kinds: Mapping[str, Any] = NO_KINDS
) -> Record:
    """The keys and values in a JSON file.

    Args:
      file: the file.
      missing: what is returned if it does not exist; None makes that an error.
      kinds: key -> type of its value, see `ranges.check_value`; keys may be missing.

    Raises:
      UserError: it is missing or damaged.
    """
    if not check_regular(file):
        if missing is None:
            stage = f"run the stage {file.parent.name!r} if that writes it"
            raise UserError(f"{file} is missing; {stage}, or check the path.")
        return missing
    content = file.read_bytes()
    try:
        found = json.loads(content)
        json.dumps(found, ensure_ascii=False).encode()  # no halves of characters
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, too deep
        size = f"it has {len(content)} bytes" if content else "it is empty"
        raise UserError(
            f"{file} is damaged: {size} and is not JSON: {error}."
        ) from error
    if wrong := _misfit(found, kinds, found if isinstance(found, dict) else ()):
        raise UserError(f"{file} is damaged: {wrong}.")
    return found


def _misfit(record: Any, kinds: Mapping[str, Any], keys: Collection[str]) -> str:
    """What of a record is not as it has to be, "" for nothing; `keys` are checked."""
    if not isinstance(record, dict):
        return f"it is {short(record)}, no keys and values"
    try:
        for key in kinds.keys() & keys:
            check_value(key, kinds[key], record.get(key))
    except UserError as error:
        return f"its {str(error).rstrip('.')}"
    return ""


def stream_jsonl(
    file: Path, kinds: Mapping[str, Any] = NO_KINDS, is_whole: bool = False
) -> Iterator[Record]:
    """Yields the records of a JSON Lines file, without an incomplete last line.

    Args:
      file: the file.
      kinds: key -> type of its value in every record.
      is_whole: whether an incomplete last line is an error.

    Raises:
      UserError: a line is damaged; it names file and line.
    """
    only = f"--only={file.parent.name}"
    with file.open("rb") as lines:  # bytes: texts may contain other line separators
        for number, line in enumerate(lines, 1):
            is_cut = not line.endswith(b"\n")
            if is_cut and not (is_whole and line.strip()):
                return
            try:
                record = json.loads(line)
                wrong = _misfit(record, kinds, kinds.keys())
            except (ValueError, RecursionError):
                wrong = "it is not valid JSON"
            # Another program may write the last line without its end.
            if wrong and is_cut:
                raise UserError(
                    f"{file}: the last line is cut off. If the stage was interrupted, run "
                    f"the same command again; otherwise run it afresh with {only}."
                )
            if wrong:
                raise UserError(
                    f"{file}:{number} is damaged: {wrong}. Mend or restore the file, or "
                    f"run the stage afresh with {only}."
                )
            yield record
