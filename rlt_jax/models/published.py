"""Configurations of published models, for plans without a download of the model."""

import dataclasses
from typing import Any

from rlt_jax.models.config import ModelConfig

# The first fields of ModelConfig: V, D, L, N, K, H, F.
_QWEN2_5 = {
    "0.5B": (151_936, 896, 24, 14, 2, 64, 4864),
    "1.5B": (151_936, 1536, 28, 12, 2, 128, 8960),
    "3B": (151_936, 2048, 36, 16, 2, 128, 11008),
    "7B": (152_064, 3584, 28, 28, 4, 128, 18944),
    "14B": (152_064, 5120, 48, 40, 8, 128, 13824),
    "32B": (152_064, 5120, 64, 40, 8, 128, 27648),
    "72B": (152_064, 8192, 80, 64, 8, 128, 29568),
}
# Fine-tuned models have the configuration of their base model.
PUBLISHED = {
    **{f"Qwen/Qwen2.5-{size}-Instruct": size for size in _QWEN2_5},
    **{f"Qwen/Qwen2.5-{size}": size for size in _QWEN2_5},
    **{f"bespokelabs/Bespoke-Stratos-{size}": size for size in ("7B", "32B")},
}


def published_config(name: str, **overrides: Any) -> ModelConfig | None:
    """The configuration of a model on the Hugging Face Hub; None if it is not listed here.

    Args:
      name: id of the model on the Hub.
      **overrides: fields of ModelConfig to replace.
    """
    if (size := PUBLISHED.get(name)) is None:
        return None
    config = ModelConfig(
        *_QWEN2_5[size],
        max_length=32_768,
        rope_theta=1_000_000.0,
        tie_embeddings=size in ("0.5B", "1.5B", "3B"),
        qkv_bias=True,
    )
    return dataclasses.replace(config, **overrides)
