"""What a program tells, and where that cannot be written."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlt_jax.data import formats, tokenizer
from rlt_jax.errors import UserError, as_user_error
from rlt_jax.models import weight_files

TELLS = """
import sys
from unittest import mock
from rlt_jax import errors, main
from rlt_jax.training import hosts, metrics

def work():
    with metrics.progress(0, 3, "work") as bar:
        [bar.update() for _ in range(3)]
    print("worked")
    raise errors.StorageError("the disk is full")

with mock.patch("absl.app.run", lambda *_, **__: hosts.guard(work)):
    main.cli()
"""


@pytest.mark.parametrize("log", ["/dev/full", "/dev/null"])
def test_a_log_that_cannot_be_written_changes_nothing(log: str) -> None:
    with open(log, "w") as stderr:
        streams = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
        done = subprocess.run([sys.executable, "-c", TELLS], check=False, **streams)
    assert (done.returncode, done.stdout) == (75, "worked\n")


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_change_nothing(closed: str, tmp_path: Path) -> None:
    # The file would become standard error, and get its messages.
    opens = f"opened = open({str(tmp_path / 'file')!r}, 'w')\n    with metrics"
    script = TELLS.replace("with metrics", opens)
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, script]
    assert subprocess.run(command, check=False).returncode == 75
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    "read",
    [
        weight_files.read_json,
        weight_files.open_tensors,
        tokenizer.read_json,
        lambda file: list(formats.read_file(file, None)),
    ],
)
def test_a_failing_disk_is_not_bad_input(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{}\n")

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    monkeypatch.setattr(Path, "open", fails)
    monkeypatch.setattr(Path, "read_text", fails)
    monkeypatch.setattr("builtins.open", fails)
    monkeypatch.setattr(weight_files, "safe_open", fails)
    monkeypatch.setattr(formats.pa, "input_stream", fails)
    with pytest.raises(OSError, match="Input/output error"):
        read(file)


def test_other_errors_are_bad_input() -> None:
    odd = pytest.raises(UserError, match="the file: it is odd")
    with odd, as_user_error("the file", ValueError):
        raise ValueError("it is odd")
