"""What stages have cost, against sums by hand."""

from pathlib import Path

from rlt_jax.costs import spent
from rlt_jax.models.config import ModelConfig
from rlt_jax.training.metrics import append_jsonl

# Kernels of 8 x (2 * (2 + 1) * 4 + 3 * 16) = 576 in each of 3 layers, 8 x 32 in the head.
CONFIG = ModelConfig(
    vocab_size=32,
    embed_dim=8,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=16,
    max_length=8,
)
PER_TOKEN = 2 * (3 * 576 + 256)


def metrics_of(folder: Path, phases: tuple[str, ...]) -> Path:
    file = folder / "metrics.jsonl"
    rows = [
        {
            f"time/{name}_tokens": 10 * n * (1 if name == "rollout" else 3)
            for name in phases
        }
        for n in (1, 2)
    ]
    append_jsonl(file, rows)
    return file


def test_a_training_is_three_forward_passes(tmp_path: Path) -> None:
    cost = spent.sft_cost(metrics_of(tmp_path, ("step",)), CONFIG)
    assert cost == {"trained_tokens": 90, "flops": 90 * 3 * PER_TOKEN}


def test_reinforcement_with_two_students_and_a_reference(tmp_path: Path) -> None:
    file = metrics_of(tmp_path, ("rollout", "score", "update"))
    cost = spent.rl_cost(file, 2, CONFIG, [CONFIG, CONFIG], passes=2)
    tokens = {"decoded_tokens": 30, "scored_tokens": 90, "trained_tokens": 90}
    # Prompts, 60 tokens in all, are computed once for two completions.
    once = 30 + 60 / 2
    assert cost == tokens | {"flops": (once + 90 * (2 + 2 + 3)) * PER_TOKEN}


def test_what_nobody_reads_is_not_scored(tmp_path: Path) -> None:
    file = metrics_of(tmp_path, ("rollout", "score", "update"))
    cost = spent.rl_cost(file, 2, CONFIG, [], passes=0)
    assert cost["scored_tokens"] == 0
    assert cost["flops"] == (60 + 90 * 3) * PER_TOKEN


def test_writing_with_and_without_readers() -> None:
    alone = spent.writing_cost(7, 3, CONFIG)
    assert alone == {"decoded_tokens": 7, "scored_tokens": 0, "flops": 10 * PER_TOKEN}
    read = spent.writing_cost(7, 3, CONFIG, 12, [CONFIG])
    assert read["scored_tokens"] == 12 and read["flops"] == 22 * PER_TOKEN
