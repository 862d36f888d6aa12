"""Where compiled programs are kept for later runs."""

from pathlib import Path

import jax

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
