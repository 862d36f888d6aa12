"""Configurations of published models, for plans without a download of the model."""

import dataclasses
from typing import Any

from rlt_jax.models.config import ModelConfig

# D, F, L, N, K, V.
_QWEN2_5 = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936),
    "3B": (2048, 11008, 36, 16, 2, 151_936),
    "7B": (3584, 18944, 28, 28, 4, 152_064),
    "14B": (5120, 13824, 48, 40, 8, 152_064),
    "32B": (5120, 27648, 64, 40, 8, 152_064),
    "72B": (8192, 29568, 80, 64, 8, 152_064),
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
    if name not in PUBLISHED:
        return None
    size = PUBLISHED[name]
    D, F, L, N, K, V = _QWEN2_5[size]
    config = ModelConfig(
        vocab_size=V,
        embed_dim=D,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        head_dim=D // N,
        mlp_dim=F,
        max_length=32_768,
        rope_theta=1_000_000.0,
        tie_embeddings=size in ("0.5B", "1.5B", "3B"),
        qkv_bias=True,
    )
    return dataclasses.replace(config, **overrides)
