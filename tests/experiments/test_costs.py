"""What stages have cost, against sums by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.costs import stage_cost
from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig
from rlt_jax.training.metrics import append_jsonl

# Kernels of 8 x (2 * (2 + 1) * 4 + 3 * 16) = 576 in each of 3 layers, 8 x 32 in the head.
MODEL = ModelConfig(
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
# Named by an earlier place of the workdir.
BASE = {"path": "/an/earlier/place/base"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "stage"):
        text = json.dumps(dataclasses.asdict(MODEL))
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text(text)
    (tmp_path / "stage" / "done.json").write_text("{}")
    return tmp_path / "stage"


def write_settings(folder: Path, stage: str, **settings: Any) -> None:
    text = json.dumps({"stage": stage, **settings})
    (folder / "settings.json").write_text(text)


def write_metrics(folder: Path, *phases: str) -> None:
    rows = [
        {
            "step": n - 1,
            "time/step_seconds": 1.0,
            **{
                f"time/{phase}_tokens": 10.0 * n * (1 if phase == "rollout" else 3)
                for phase in phases
            },
        }
        for n in (1, 2)
    ]
    append_jsonl(folder / "metrics.jsonl", rows)


def write_rl(
    folder: Path,
    students: list,
    beta: float = 0.04,
    teaching: dict[str, Any] | None = None,
    **loop: Any,
) -> None:
    loop = {"group_size": 2, "self_teaching": False, "updates_per_rollout": 1} | loop
    settings = {"loop": loop, "students": students, "objective": {"beta": beta}}
    settings["teaching"] = teaching
    write_settings(folder, "rl", **settings)
    write_metrics(folder, "rollout", "score", "update")


def test_a_stage_without_traces_costs_nothing(folder: Path) -> None:
    write_settings(folder, "sft")
    (folder / "done.json").write_text(json.dumps({"summary": {"steps": 0}}))
    assert set(stage_cost(folder).values()) == {0.0}


def test_fine_tuning_is_three_forward_passes(folder: Path) -> None:
    write_settings(folder, "sft")
    write_metrics(folder, "step")
    assert stage_cost(folder) == {
        "decoded_tokens": 0,
        "scored_tokens": 0,
        "trained_tokens": 90,
        "flops": 90 * 3 * PER_TOKEN,
    }


def test_rl_with_two_students_and_a_reference(folder: Path) -> None:
    write_rl(folder, [BASE, BASE])
    # Prompts, 60 tokens in all, are computed once for two completions. Policy, reference
    # and both students score.
    once = 30 + 60 / 2
    assert stage_cost(folder) == {
        "decoded_tokens": 30,
        "scored_tokens": 90,
        "trained_tokens": 90,
        "flops": (once + 90 * (2 + 2 + 3)) * PER_TOKEN,
    }


@pytest.mark.parametrize(
    ("students", "beta", "loop", "passes"),
    [
        ([], 0.0, {}, 0),
        ([], 0.1, {}, 1),
        ([], 0.0, {"updates_per_rollout": 2}, 1),
        ([], 0.0, {"self_teaching": True}, 2),
        ([BASE], 0.1, {}, 3),
        ([], 0.0, {"teaching": {"kind": "reverse", "teacher": None}}, 1),
        ([], 0.0, {"teaching": {"kind": "advantage", "teacher": BASE}}, 2),
    ],
)
def test_only_what_is_scored_costs(
    folder: Path, students: list, beta: float, loop: dict[str, Any], passes: int
) -> None:
    write_rl(folder, students, beta, **loop)
    cost = stage_cost(folder)
    assert cost["scored_tokens"] == (90 if passes else 0)
    assert cost["flops"] == (60 + 90 * (passes + 3)) * PER_TOKEN


def test_sampling_with_and_without_students(folder: Path) -> None:
    rows = [
        {"question": question, "prompt_tokens": prompt, "tokens": tokens}
        for question, prompt, tokens in (("a", 3, 4), ("a", 3, 5), ("b", 2, 1))
    ]
    append_jsonl(folder / "samples.jsonl", rows)
    append_jsonl(folder / "traces.jsonl", rows)
    write_settings(folder, "evaluate", model=BASE)
    # The prompt of a question is computed once.
    sampling = {"decoded_tokens": 10, "scored_tokens": 0, "trained_tokens": 0}
    assert stage_cost(folder) == sampling | {"flops": (10 + 5) * PER_TOKEN}
    # Teacher and student score every row with its prompt.
    write_settings(folder, "collect", teacher=BASE, students=[BASE])
    expected = sampling | {"scored_tokens": 18, "flops": (15 + 2 * 18) * PER_TOKEN}
    assert stage_cost(folder) == expected


def test_stages_without_a_known_cost(folder: Path) -> None:
    write_settings(folder, "plan")
    with pytest.raises(
        UserError, match="stage'?='plan': one of sft, rl, collect, eval"
    ):
        stage_cost(folder)
    (folder / "done.json").unlink()
    with pytest.raises(UserError, match="done.json is missing; run the stage 'stage'"):
        stage_cost(folder)
