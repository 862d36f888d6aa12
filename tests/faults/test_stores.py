"""A pipeline at gs:// that is killed, and goes on from the store alone."""

import contextlib
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.conftest import Run, Start, assert_same_run
from tests.stores.servers import gcs

URL = "gs://bucket/my/run"


@pytest.mark.slow
def test_a_run_goes_on_from_an_empty_cache(
    start: Start, run: Run, whole: Path, seconds: float, tmp_path: Path
) -> None:
    moments = random.Random(0)
    with gcs() as bucket:
        for kill in range(6):
            host = {"XDG_CACHE_HOME": str(tmp_path / str(kill)), **bucket.environment}
            process = start(URL, environment=host)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0.3, 1.0) * seconds)
            process.send_signal(signal.SIGKILL)
            _, errors = process.communicate(timeout=120)
            assert "Traceback" not in errors
        host["XDG_CACHE_HOME"] = str(tmp_path / "last")
        status, errors = run(URL, environment=host)
        assert status == 0, errors
    (root,) = tmp_path.glob("last/rlt_jax/workdirs/*/run")
    assert_same_run(root, whole)
