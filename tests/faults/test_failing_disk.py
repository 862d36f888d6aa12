"""A disk that is full or broken ends a run with one message, and loses nothing.

`failing_disk.c` lets operations fail that create, write, sync or rename a file in the
workdir, those of Orbax and TensorStore among them.
"""

import errno
import os
import re
from pathlib import Path

import pytest

from tests.faults.conftest import Run, assert_same_run


@pytest.fixture(scope="session")
def kinds(shim: str, run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Patterns of all operations of a run: "write teach/checkpoints/*/params/d/*"."""
    workdir = tmp_path_factory.mktemp("count") / "run"
    log = workdir.with_name("log")
    environment = {"FAILING_FOLDER": str(workdir), "FAILING_LOG": str(log)}
    assert run(workdir, environment=environment | {"LD_PRELOAD": shim})[0] == 0
    operations = log.read_text().splitlines()
    assert len(operations) > 300
    # Without numbers and random parts of names.
    found = [re.sub(r"[\w.-]*\d[\w.-]*", "*", operation) for operation in operations]
    return [*dict.fromkeys(found)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_every_kind_of_operation_fails_once(
    number: int, shim: str, kinds: list[str], run: Run, whole: Path, tmp_path: Path
) -> None:
    """Full disks stay full until the run ends; a broken one fails once.

    What one run leaves, the next goes on with, so that most of them are short.
    """
    counts = dict.fromkeys(("failed", "tolerated", "not met"), 0)
    workdir, left = tmp_path / "0", list(reversed(kinds))
    while left:
        log = tmp_path / f"log_{len(left)}"
        environment = {
            "LD_PRELOAD": shim,
            "FAILING_FOLDER": str(workdir),
            "FAILING_LOG": str(log),
            "FAILING_KIND": left[-1],
            "FAILING_AT": "1",
            "FAILING_ERRNO": str(number),
        }
        if number == errno.ENOSPC:
            environment["FAILING_FOREVER"] = "1"
        is_new = not workdir.exists()
        status, errors = run(workdir, environment=environment)
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
            left.pop()
    assert run(workdir)[0] == 0
    assert_same_run(workdir, whole)
    print(f"{len(kinds)} kinds of operations, {os.strerror(number)}: {counts}")
    assert counts["not met"] < len(kinds) / 10
