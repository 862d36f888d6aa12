"""Losses of the policy, per token."""

import jax
import jax.numpy as jnp

from rlt_jax.rl import kl


def grpo_token_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    ref_log_probs: jax.Array,
    advantages: jax.Array,
    beta: float,
) -> jax.Array:
    """-(ratio * A - beta * k3(policy, reference)), elementwise.

    GRPO (arXiv 2402.03300, equation 3) without clipping: with one update per rollout the
    ratio is 1 and only its gradient matters, which is that of REINFORCE with a baseline.

    Args:
      log_probs: of the policy that is updated.
      old_log_probs: of the policy that the completions were drawn from.
      ref_log_probs: of the reference.
      advantages: of each token.
      beta: weight of the KL to the reference.

    Returns:
      Loss of each token, in the shape of the inputs.
    """
    ratio = jnp.exp(log_probs - old_log_probs)
    return -(ratio * advantages - beta * kl.k3(log_probs - ref_log_probs))
