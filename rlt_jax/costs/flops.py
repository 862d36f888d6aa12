"""Floating-point operations of a model, computed from its configuration.

Only matrix products count: a product of [m, k] and [k, n] takes 2mkn operations.
"""

from rlt_jax.models.config import ModelConfig


def params_in_products(config: ModelConfig) -> int:
    """Number of parameters in the matrix products of the layers, without the head."""
    c = config
    attention = 2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim
    return c.num_layers * (attention + 3 * c.embed_dim * c.mlp_dim)


def forward_flops(
    config: ModelConfig, tokens: float, context: float, head_tokens: float
) -> float:
    """Floating-point operations of a forward pass.

    Args:
      config: configuration of the model.
      tokens: number of tokens.
      context: mean number of keys per query: half the row length for causal attention,
        the row length if the kernel also computes masked scores. Windowed layers use at
        most their window.
      head_tokens: number of tokens for which logits are computed.
    """
    dense = 2 * params_in_products(config) * tokens
    head = 2 * config.embed_dim * config.vocab_size * head_tokens
    return dense + _attention_flops(config, tokens, context) + head


def train_flops(
    config: ModelConfig, tokens: float, context: float, head_tokens: float
) -> float:
    """Floating-point operations of a forward and a backward pass; see `forward_flops`.

    The backward pass has two products for each one of the forward pass. It recomputes the
    logits and what `config.remat` selects: attention for "dots", the layers except their
    last product, which no gradient needs, for "full".
    """
    c = config
    recomputed = 2 * c.embed_dim * c.vocab_size * head_tokens
    if c.remat != "none":
        recomputed += _attention_flops(c, tokens, context)
    if c.remat == "full":
        last = 0 if c.post_norms else c.num_layers * c.embed_dim * c.mlp_dim
        recomputed += 2 * (params_in_products(c) - last) * tokens
    return 3 * forward_flops(c, tokens, context, head_tokens) + recomputed


def _attention_flops(config: ModelConfig, tokens: float, context: float) -> float:
    """Operations of query-key and weight-value products in all layers."""
    windowed = sum(config.windowed_layers)
    window = min(context, config.sliding_window or context)
    keys = (config.num_layers - windowed) * context + windowed * window
    return 4 * config.num_heads * config.head_dim * tokens * keys
