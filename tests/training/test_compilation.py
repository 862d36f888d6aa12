"""The folder of compiled programs."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from rlt_jax.training.compilation import keep_programs


@pytest.fixture
def setting() -> Iterator[None]:
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("setting")
def test_programs_are_kept_where_asked(tmp_path: Path) -> None:
    keep_programs(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    keep_programs(None)  # what is set stays
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


@pytest.mark.usefixtures("setting")
def test_accelerators_have_a_folder_and_cpus_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs(None)
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    keep_programs(None)
    assert jax.config.jax_compilation_cache_dir.endswith("/.cache/rlt_jax")
