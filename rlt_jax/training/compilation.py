"""Where compiled programs are kept for later runs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

FOLDER = "~/.cache/rlt_jax"


def keep_programs(folder: str | None) -> None:
    """Turns JAX's persistent compilation cache on.

    Args:
      folder: of the cache; None is what JAX_COMPILATION_CACHE_DIR says, or else `FOLDER`
        on accelerators and none on CPUs, which compile fast.
    """
    if folder is None:
        if jax.config.jax_compilation_cache_dir or jax.default_backend() == "cpu":
            return
        folder = FOLDER
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


@contextlib.contextmanager
def programs_not_kept() -> Iterator[None]:
    """For programs of devices that are not there, which could not be read back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()
