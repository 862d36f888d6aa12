"""JAX's persistent compilation cache."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

FOLDER = "~/.cache/rlt_jax"


def keep_programs(folder: str | None) -> None:
    """Enables the persistent compilation cache.

    Args:
      folder: folder of the cache. None uses JAX_COMPILATION_CACHE_DIR if it is set;
        otherwise `FOLDER` on accelerators and no cache on CPU, where compilation is fast.
    """
    if folder is None:
        if jax.config.jax_compilation_cache_dir or jax.default_backend() == "cpu":
            return
        folder = FOLDER
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


@contextlib.contextmanager
def programs_not_kept() -> Iterator[None]:
    """Disables the cache, for programs of other devices, which cannot be loaded here."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()
