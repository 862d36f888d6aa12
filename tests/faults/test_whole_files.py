"""On a full disk, no file that people read is left half written, and one message says so."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from rlt_jax import files
from rlt_jax.errors import StorageError
from rlt_jax.files import write_json
from rlt_jax.models import peft
from rlt_jax.models.families import family
from rlt_jax.report.files import write_page
from rlt_jax.stages import plan, run_pipeline

Write = Callable[[Path], object]


def page(folder: Path) -> None:
    write_page(folder, "explanations.html", {"curve": b"png"}, items=[])


def adapter(folder: Path) -> None:
    pair = {"kernel_lora_a": np.zeros((1, 4, 2)), "kernel_lora_b": np.zeros((1, 2, 4))}
    adapters = {"layers": {"mlp": {"up": pair}}}
    peft.write_adapter(folder / "adapter", adapters, family("llama"), "base", 16.0)


def export(folder: Path) -> None:
    settings = {"model": {"path": "embedded"}, "model_type": "", "dtype": "float32"}
    settings |= {"stage": "export", "seed": 0, "adapter_base": "", "mesh": {}}
    run_pipeline(ml_collections.ConfigDict(settings), folder)


def plan_of_slice(folder: Path) -> None:
    values = {"recipe": "recipe.py", "topology": "v5e:2x2"}
    config = ml_collections.ConfigDict({"plan": values})
    plan.run(config, folder / "plan", 0)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (page, "index.html"),
        (page, "curve.png"),
        (lambda folder: write_json(folder / "config.json", {}), "config.json"),
        (adapter, "adapter_config.json"),
        (adapter, "adapter_model.safetensors"),
        (export, "chat_template.jinja"),
        (export, "config.json"),
        (export, "README.md"),
        (plan_of_slice, "plan.json"),
        (plan_of_slice, "plan.txt"),
    ],
)
def test_a_full_disk_leaves_no_half_of_a_file(
    write: Write, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fail(opened: int) -> None:
        if os.readlink(f"/proc/self/fd/{opened}").endswith(f"/{name}.partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(opened)

    monkeypatch.setattr(files.os, "fsync", fail)
    monkeypatch.setattr(plan, "plan", lambda _: {"fits": True, "programs": []})
    monkeypatch.setattr(plan, "render", lambda _: "table\n")
    with pytest.raises(StorageError, match=f"cannot write .*{name}: No space left"):
        write(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(name)]
