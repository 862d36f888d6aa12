"""What a stage has cost: tokens, and operations of the models, from what it left.

A token costs two operations for each parameter that it meets in a forward pass, and three
times as many in an update, recomputation and attention's products apart.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlt_jax.costs.flops import params_in_products
from rlt_jax.models.config import ModelConfig
from rlt_jax.training.metrics import stream_jsonl

# Phase of a step -> what its tokens are called.
_PHASES = {
    "rollout": "decoded_tokens",
    "score": "scored_tokens",
    "update": "trained_tokens",
    "step": "trained_tokens",
}


def token_flops(config: ModelConfig) -> int:
    """Operations of a token's forward pass, logits included."""
    return 2 * (params_in_products(config) + config.embed_dim * config.vocab_size)


def sft_cost(metrics: Path, model: ModelConfig) -> dict[str, float]:
    """Tokens and operations of a training by next tokens."""
    return _of_steps(stream_jsonl(metrics), {"step": 3 * token_flops(model)})


def rl_cost(
    metrics: Path,
    group_size: int,
    policy: ModelConfig,
    students: Sequence[ModelConfig],
    passes: int,
) -> dict[str, float]:
    """Tokens and operations of reinforcement learning; held-out questions apart.

    Args:
      metrics: the stage's metrics.jsonl.
      group_size: completions that share a prompt, which is computed once for them.
      policy: its model.
      students: of the reward.
      passes: of the policy and its reference over the rows, besides drawing and updates.
    """
    own = token_flops(policy)
    reading = passes * own + sum(map(token_flops, students))
    rows = list(stream_jsonl(metrics))
    cost = _of_steps(rows, {"rollout": own, "score": reading, "update": 3 * own})
    for row in rows:
        prompts = row["time/score_tokens"] - row["time/rollout_tokens"]
        cost["flops"] += prompts / group_size * own
    return cost


def writing_cost(
    drawn: int,
    prompts: int,
    writer: ModelConfig,
    read: int = 0,
    readers: Sequence[ModelConfig] = (),
) -> dict[str, float]:
    """Tokens and operations of completions.

    Args:
      drawn: tokens of all completions.
      prompts: tokens of the different prompts, each computed once.
      writer: the model that draws.
      read: tokens of the rows that are scored.
      readers: the models that score them.
    """
    written = (drawn + prompts) * token_flops(writer)
    scored = read * sum(map(token_flops, readers))
    return {
        "decoded_tokens": drawn,
        "scored_tokens": read,
        "flops": float(written + scored),
    }


def _of_steps(
    rows: Iterable[Mapping[str, Any]], flops: Mapping[str, float]
) -> dict[str, float]:
    cost = {_PHASES[phase]: 0 for phase in flops} | {"flops": 0.0}
    for row in rows:
        for phase, each in flops.items():
            if each:
                tokens = row[f"time/{phase}_tokens"]
                cost[_PHASES[phase]] += tokens
                cost["flops"] += float(tokens * each)
    return cost
