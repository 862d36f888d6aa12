"""Reinforcement-learned teachers in JAX.

Its names are imported on first use, so that `import rlt_jax` is cheap and never starts a
JAX backend.
"""

import importlib
from typing import Any

_MODULES = {
    "ScoringConfig": "scoring",
    "generate": "api",
    "load_model": "api",
    "load_tokenizer": "data.tokenizer",
    "score_explanations": "api",
    "token_log_probs": "inference.head",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"rlt_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'rlt_jax' has no attribute {name!r}")
