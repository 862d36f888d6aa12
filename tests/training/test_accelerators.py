"""Accelerators that are there and not used are told."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from rlt_jax.training import accelerators


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine without accelerators, whose JAX was not told what to use."""
    jax.default_backend()  # started for the CPU before the setting is taken away
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in accelerators.TPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    jax.config.update("jax_platforms", before)


def nvidia_smi(folder: Path, *lines: str) -> None:
    """A stub of the driver's tool."""
    file = folder / "nvidia-smi"
    file.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    file.chmod(0o755)


def test_nothing_is_told_without_any(machine: Path) -> None:
    assert accelerators.unused(machine) == ""


@pytest.mark.parametrize(
    ("driver", "extra"), [("580.65.06", "cuda13"), ("550.54", "cuda12"), ("", "cuda12")]
)
def test_a_gpu(machine: Path, driver: str, extra: str) -> None:
    nvidia_smi(machine, f"echo 'NVIDIA L4, {driver}'")
    told = accelerators.unused(machine)
    assert told.startswith(
        f"this machine has NVIDIA L4, but JAX {jax.__version__} uses"
    )
    assert f"'rlt_jax[{extra}]'" in told


def test_a_driver_without_a_gpu(machine: Path) -> None:
    nvidia_smi(machine, "echo 'No devices were found'", "exit 6")
    assert accelerators.unused(machine) == ""
    nvidia_smi(machine, "exit 0")
    assert accelerators.unused(machine) == ""


def test_a_tpu_by_its_device_or_its_environment(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "accel0").touch()
    assert "has a TPU" in accelerators.unused(machine)
    (machine / "accel0").unlink()
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    assert "'rlt_jax[tpu]'" in accelerators.unused(machine)


def test_it_is_told_in_one_line(
    machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accelerators.warn_of_unused()
    assert not caplog.records
    monkeypatch.setenv("COLAB_TPU_ADDR", "10.0.0.2:8470")
    accelerators.warn_of_unused()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "\n" not in caplog.text.strip()


def test_what_was_asked_for_is_no_fault(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "accel0").touch()
    jax.config.update("jax_platforms", "cpu")
    assert accelerators.unused(machine) == ""
    jax.config.update("jax_platforms", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert accelerators.unused(machine) == ""
