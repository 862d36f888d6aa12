"""A disk that is full or broken ends a run with one message, and loses nothing.

`failing_disk.c` lets the operation with a given number fail, of all that create, write,
sync or rename a file in the workdir, those of Orbax and TensorStore among them.
"""

import errno
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.conftest import Run, Whole, assert_same_run

SHIM = Path(__file__).with_name("failing_disk.c")


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that makes a disk fail."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("shim") / "failing_disk.so"
    flags = ["-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM), "-ldl"]
    subprocess.run([compiler, *flags], check=True)
    return str(library)


@pytest.fixture(scope="session")
def operations(shim: str, run: Run, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many operations an uninterrupted run has that could fail."""
    folder = tmp_path_factory.mktemp("count")
    environment = {"LD_PRELOAD": shim, "FAILING_FOLDER": str(folder)}
    environment["FAILING_COUNT"] = str(folder.with_name("operations"))
    assert run(folder / "run", environment=environment)[0] == 0
    count = int(folder.with_name("operations").read_text())
    assert count > 300
    return count


@pytest.mark.parametrize("times", [1, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_operation_loses_nothing(
    number: int,
    times: int,
    shim: str,
    operations: int,
    run: Run,
    whole: Whole,
    tmp_path: Path,
) -> None:
    """Full disks stay full until the run ends; a broken one fails once."""
    environment = {"LD_PRELOAD": shim, "FAILING_ERRNO": str(number)}
    if number == errno.ENOSPC:
        environment["FAILING_FOREVER"] = "1"
    for at in random.Random(number).sample(range(1, operations + 1), times):
        workdir = tmp_path / str(at)
        settings = {"FAILING_FOLDER": str(workdir), "FAILING_AT": str(at)}
        status, errors = run(workdir, environment=environment | settings)
        assert "Traceback" not in errors, f"operation {at} of {operations}: {errors}"
        # One that fails once can be TensorBoard's, or a lock's.
        assert status == 75 or (status == 0 and number == errno.EIO), errors
        if status == 75:
            messages = [x for x in errors.splitlines() if x.startswith("rlt_jax: ")]
            assert os.strerror(number) in messages[-1]
            assert "same command" in messages[-1]
            assert run(workdir)[0] == 0
        assert_same_run(workdir, whole.workdir)
