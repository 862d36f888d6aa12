"""A disk that is full or broken ends a run with one message, and loses nothing.

`failing_disk.c` lets operations fail that create, write, sync or rename a file in the
workdir, those of Orbax and TensorStore among them.
"""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.faults.conftest import ROOT, arguments, assert_same_run

Fork = Callable[[Path, Mapping[str, str]], tuple[int, str]]


def kind_of(operation: str) -> str:
    """A pattern of operations that are one: "write teach/checkpoints/*/params*".

    Without numbers and random parts of names; files of one tree of a checkpoint, of a
    tokenizer and of the report are of one kind.
    """
    operation = re.sub(r"(checkpoints/[^/]+/[a-z]+)\b.*", r"\1*", operation)
    operation = re.sub(r"[\w.-]*\d[\w.-]*", "*", operation)
    return re.sub(r"(report|tokenizer)/\w+", r"\1/*", operation)


@pytest.fixture
def fork(config: Path, shim: str, tmp_path: Path) -> Iterator[Fork]:
    """Runs the command, with more environment variables; see forks.py."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "LD_PRELOAD": shim, "PYTHONWARNINGS": "ignore"}
    command, errors = [sys.executable, "-m", "tests.faults.forks"], tmp_path / "errors"
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:

        def run(workdir: Path, variables: Mapping[str, str]) -> tuple[int, str]:
            asked = {"arguments": arguments(config, workdir), "errors": str(errors)}
            process.stdin.write(json.dumps(asked | {"environment": variables}) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline()), errors.read_text(encoding="utf-8")

        yield run


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_every_kind_of_operation_fails_once(
    number: int, fork: Fork, whole: Path, tmp_path: Path
) -> None:
    """Full disks stay full until the run ends; a broken one fails once.

    What one run leaves, the next goes on with, so that most of them are short.
    """
    workdir, log = tmp_path / "whole", tmp_path / "log"
    names = {"FAILING_FOLDER": str(workdir), "FAILING_LOG": str(log)}
    assert fork(workdir, names)[0] == 0
    operations = log.read_text().splitlines()
    assert len(operations) > 300
    kinds = [*dict.fromkeys(map(kind_of, operations))]
    counts = dict.fromkeys(("failed", "tolerated", "not met"), 0)
    workdir, left = tmp_path / "0", list(reversed(kinds))
    while left:
        log.unlink()
        names |= {"FAILING_FOLDER": str(workdir), "FAILING_KIND": left[-1]}
        names |= {"FAILING_AT": "1", "FAILING_ERRNO": str(number)}
        if number == errno.ENOSPC:
            names["FAILING_FOREVER"] = "1"
        is_new = not workdir.exists()
        status, errors = fork(workdir, names)
        message = f"{left[-1]}: status {status}: {errors}"
        failed = "\nfailed " in f"\n{log.read_text()}"
        assert "Traceback" not in errors, message
        if status == 75:
            last = [x for x in errors.splitlines() if x.startswith("rlt_jax: ")][-1]
            assert failed and os.strerror(number) in last, message
            assert "same command" in last, message
        else:
            # One that fails once can be TensorBoard's, or a lock's.
            assert status == 0 and not (failed and number == errno.ENOSPC), message
            assert_same_run(workdir, whole)
            workdir = tmp_path / str(len(left))
        if failed or is_new:
            outcome = "failed" if status else "tolerated" if failed else "not met"
            counts[outcome] += 1
            print(outcome, left.pop(), flush=True)
    assert fork(workdir, {})[0] == 0
    assert_same_run(workdir, whole)
    print(f"{len(kinds)} kinds of operations, {os.strerror(number)}: {counts}")
    assert counts["not met"] < len(kinds) / 10
