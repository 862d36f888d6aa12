"""Reinforcement-learned teachers in JAX.

The functions of `rlt_jax.api` are attributes of the package; they are imported on first
use, so that `import rlt_jax` is cheap and never starts a JAX backend.
"""

import importlib
from typing import Any

__all__ = [
    "ScoringConfig",
    "generate",
    "load_model",
    "load_tokenizer",
    "score_explanations",
    "token_log_probs",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("rlt_jax.api"), name)
    raise AttributeError(f"module 'rlt_jax' has no attribute {name!r}")
