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

from tests.faults.conftest import Run, assert_same_run

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


@pytest.mark.parametrize("times", [3, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_operation_loses_nothing(
    number: int, times: int, shim: str, run: Run, whole: Path, tmp_path: Path
) -> None:
    """Full disks stay full until the run ends; a broken one fails once."""
    environment = {"LD_PRELOAD": shim, "FAILING_ERRNO": str(number)}
    counted = tmp_path / "count"
    clean = tmp_path / "clean"
    count = {"FAILING_FOLDER": str(clean), "FAILING_COUNT": str(counted)}
    assert run(clean, environment=environment | count)[0] == 0
    operations = int(counted.read_text())
    assert operations > 300
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
        assert_same_run(workdir, whole)
