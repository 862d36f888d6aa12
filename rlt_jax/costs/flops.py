"""Floating-point operations that a model needs, by arithmetic on its shape.

A product of [m, k] and [k, n] counts as 2mkn. Only matrix products count.
"""

from rlt_jax.models.config import ModelConfig


def params_in_products(config: ModelConfig) -> int:
    """Parameters that every token is multiplied with: the layers' kernels, not the head."""
    c = config
    attention = 2 * c.embed_dim * (c.num_heads + c.num_kv_heads) * c.head_dim
    return c.num_layers * (attention + 3 * c.embed_dim * c.mlp_dim)


def forward_flops(
    config: ModelConfig, tokens: float, context: float, head_tokens: float
) -> float:
    """Operations of a forward pass.

    Args:
      config: shape of the model.
      tokens: how many go through the layers.
      context: keys that a token attends to, in the mean: half a row where attention is
        causal, all of it where a kernel computes what the mask then hides. Windowed
        layers stop at their window.
      head_tokens: how many of the tokens get logits.
    """
    dense = 2 * params_in_products(config) * tokens
    head = 2 * config.embed_dim * config.vocab_size * head_tokens
    return dense + _attention_flops(config, tokens, context) + head


def train_flops(
    config: ModelConfig, tokens: float, context: float, head_tokens: float
) -> float:
    """Operations of a forward and a backward pass, arguments as in `forward_flops`.

    The backward pass has two products for each of the forward pass. It computes the
    logits again, and what `config.remat` says: with "dots" attention, with "full" the
    layers but for their last product, which only the next layer needs.
    """
    c = config
    attention = _attention_flops(c, tokens, context)
    again = 2 * c.embed_dim * c.vocab_size * head_tokens
    if c.remat != "none":
        again += attention
    if c.remat == "full":
        last = 0 if c.post_norms else c.num_layers * c.embed_dim * c.mlp_dim
        again += 2 * (params_in_products(c) - last) * tokens
    return 3 * forward_flops(c, tokens, context, head_tokens) + again


def _attention_flops(config: ModelConfig, tokens: float, context: float) -> float:
    """Of queries with keys and of weights with values, in all layers."""
    windowed = sum(config.windowed_layers)
    keys = (config.num_layers - windowed) * context
    if config.sliding_window:
        keys += windowed * min(context, config.sliding_window)
    return 4 * config.num_heads * config.head_dim * tokens * keys
