"""The RL loop beyond its default settings."""

import itertools
import json
import logging
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from rlt_jax.errors import UserError
from rlt_jax.records import Problem
from rlt_jax.training import checkpoint
from rlt_jax.training.checkpoint import find_model
from rlt_jax.training.metrics import read_jsonl

Section = Callable[[str], dict[str, Any]]
RunStage = Callable[[dict[str, Any], Path], Path]


def summary(folder: Path) -> dict[str, float]:
    return json.loads((folder / "done.json").read_text(encoding="utf-8"))["summary"]


def metrics(folder: Path) -> list[dict[str, float]]:
    return read_jsonl(folder / "metrics.jsonl")


@pytest.fixture
def student_rl(section: Section) -> dict[str, Any]:
    """Correctness RL: no student, no RLT term."""
    rl = section("rl")
    rl["students"] = []
    rl["reward_terms"] = {"correctness": {}, "length": {"budget": 2, "weight": 0.1}}
    rl["loop"]["role"] = "student"
    return rl


def test_several_students_and_a_balanced_kl(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    rl = section("rl")
    rl["students"] *= 2
    rl["ensemble"] = {"combine": "weights", "weights": (3.0, 1.0)}
    rl["rlt_reward"] = {"explanation_kl_coef": "auto"}
    folder = run_stage(rl, tmp_path)
    result = summary(folder)
    score, divergence = (
        result[f"held_out_{name}_first"]
        for name in ("solution_score", "explanation_kl")
    )
    assert score < 0
    assert divergence > 0
    assert result["kl_coef"] == pytest.approx(-score / divergence, rel=0.5)
    assert result["held_out_format_penalty_first"] == -1
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(np.isfinite(list(row.values())).all() for row in rows)


def test_correctness_rl_needs_no_students(
    student_rl: dict[str, Any], run_stage: RunStage, tmp_path: Path
) -> None:
    student_rl["loop"]["updates_per_rollout"] = 2
    student_rl["objective"] = {"loss": "dapo", "clip_low": 0.2, "clip_high": 0.28}
    student_rl["objective"]["beta"] = 0.0
    folder = run_stage(student_rl, tmp_path)
    result = summary(folder)
    assert 0 <= result["held_out_accuracy_first"] <= 1
    for row in metrics(folder):
        total = row["reward/correctness_mean"] + 0.1 * row["reward/length_mean"]
        assert row["reward/value_mean"] == pytest.approx(total, abs=1e-5)
        assert "policy/kl_to_reference" not in row
        assert row["policy/sampler_difference"] < 1e-4
    assert "completion" in read_jsonl(folder / "samples.jsonl")[0]


def test_self_teaching_follows_the_policy(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    rl = section("rl")
    # A fixed student of the same initial weights, and the policy's own copy.
    fixed = metrics(run_stage(rl, tmp_path / "fixed"))
    rl["loop"]["offload"] = True
    offloaded = metrics(run_stage(rl, tmp_path / "fixed_offloaded"))
    rl["loop"]["offload"] = False
    name = "reward/solution_score_mean"
    assert [row[name] for row in offloaded] == [row[name] for row in fixed]
    rl["students"] = []
    rl["loop"]["self_teaching"] = True
    own = metrics(run_stage(rl, tmp_path / "own"))
    rl["loop"]["offload"] = True
    offloaded = metrics(run_stage(rl, tmp_path / "offloaded"))
    assert own[3][name] != fixed[3][name]
    assert [row[name] for row in offloaded] == [row[name] for row in own]
    rl["loop"]["student_sync_every"] = 0
    frozen = metrics(run_stage(rl, tmp_path / "frozen"))
    assert frozen[0][name] == own[0][name]
    assert frozen[3][name] != own[3][name]


def test_adapters_are_trained_on_what_the_merged_policy_writes(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    rl = section("rl")
    rl["students"] = []
    rl["loop"]["self_teaching"] = True
    full = metrics(run_stage(rl, tmp_path / "full"))
    rl["lora"] = {"rank": 4}
    low_rank = metrics(run_stage(rl, tmp_path / "low_rank"))
    # The adapters begin with a product of 0, and the gradient is not the same.
    names = ("reward/value_mean", "policy/loss", "policy/sampler_difference")
    for name in names:
        assert low_rank[0][name] == pytest.approx(full[0][name], abs=1e-6)
    name = "optimizer/gradient_norm"
    assert 0 < low_rank[0][name] < full[0][name]
    for row in low_rank:
        # What is merged writes, what is not merged learns.
        assert abs(row["policy/ratio_mean"] - 1) < 1e-4
        assert row["policy/sampler_difference"] < 1e-4
    # The reference and the student's copy follow the merged policy.
    name = "reward/solution_score_mean"
    assert low_rank[3][name] != full[3][name]
    name = "policy/kl_to_reference"
    assert abs(low_rank[0][name]) < 1e-6 < abs(low_rank[4][name]) < 0.1


def test_a_run_is_replayed_from_its_rollouts(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    rl = section("rl")
    rl["loop"]["rollouts"] = str(tmp_path / "rollouts")
    first = metrics(run_stage(rl, tmp_path / "first"))
    assert len(list((tmp_path / "rollouts").iterdir())) == 5
    again = metrics(run_stage(rl, tmp_path / "again"))
    assert [row["policy/loss"] for row in first] == [
        row["policy/loss"] for row in again
    ]
    assert [row["rollout/occupancy"] for row in again] == [0.0] * 5
    # Other prompts under the same ids are not taken for them.
    rl["data"] = rl["data"] | {"stream": 3}
    with pytest.raises(UserError, match="another prompt"):
        run_stage(rl, tmp_path / "other")


def test_the_best_policy_is_a_model_of_its_own(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    rl = section("rl")
    rl["loop"]["evaluate_every"] = 1
    folder = run_stage(rl, tmp_path)
    records = metrics(folder)
    rewards = [record["held_out/reward"] for record in records]
    assert len(rewards) == 5
    last = summary(folder)["held_out_explanation_kl_last"]
    assert records[-1]["held_out/explanation_kl"] == last
    if max(rewards) > summary(folder)["held_out_reward_first"]:
        assert find_model(str(folder / "best")) == folder / "best"


@pytest.mark.parametrize(
    ("every", "steps"), [(0, [0, 4]), (2, [0, 2, 4]), (3, [0, 3, 4])]
)
def test_each_held_out_evaluation_runs_once(
    every: int,
    steps: list[int],
    student_rl: dict[str, Any],
    run_stage: RunStage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    student_rl["loop"] |= {"steps": 4, "evaluate_every": every}
    with caplog.at_level(logging.INFO, "rlt_jax"):
        folder = run_stage(student_rl, tmp_path)
    messages = [record.getMessage() for record in caplog.records]
    assert sum(text.startswith("held out, ") for text in messages) == len(steps)
    held_out = student_rl["held_out"]["size"]
    records = read_jsonl(folder / "samples.jsonl")
    evaluated = [x["step"] for x in records if x["split"] == "held_out"]
    assert evaluated == [step for step in steps for _ in range(held_out)]
    rewards = {
        row["step"] + 1: row["held_out/reward"]
        for row in metrics(folder)
        if "held_out/reward" in row
    }
    assert list(rewards) == (steps[1:] if every else [])
    result = summary(folder)
    first, last = result["held_out_reward_first"], result["held_out_reward_last"]
    assert result["best"] == max(first, last, *rewards.values())
    assert last == rewards.get(4, last)


@pytest.mark.parametrize("best_step", [0, 2, 4])
def test_the_policy_with_the_best_held_out_reward_is_kept(
    best_step: int,
    student_rl: dict[str, Any],
    run_stage: RunStage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mesh: Mesh,
) -> None:
    """The rewards are the same for all completions, and largest at one step."""
    calls = itertools.count()  # an evaluation, 2 steps, an evaluation, ...
    values = {0: 1.0, 3: 2.0, 6: 3.0}
    values[3 * best_step // 2] = 4.0

    def reward(problems: Sequence[Problem], *_: Any) -> np.ndarray:
        return np.full(len(problems), values.get(next(calls), 0.0))

    module = types.SimpleNamespace(reward=reward)
    monkeypatch.setitem(sys.modules, "user_rewards", module)
    student_rl["reward_terms"] = {"user": {"function": "user_rewards:reward"}}
    # Equal rewards have no gradient; the weight decay changes the parameters.
    student_rl["optimizer"]["weight_decay"] = 0.5
    student_rl["loop"] |= {"steps": 4, "evaluate_every": 2}
    folder = run_stage(student_rl, tmp_path)
    assert next(calls) == 7
    assert summary(folder)["best"] == 4.0
    if not best_step:
        assert not (folder / "best").exists()
        return
    best, last = (
        checkpoint.load(checkpoint.ModelSource(str(path)), mesh, jax.random.key(0))
        for path in (folder / "best", folder)
    )
    same = jax.tree.map(np.array_equal, best.params, last.params)
    assert all(jax.tree.leaves(same)) == (best_step == 4)


def test_a_run_whose_steps_are_all_skipped_stops(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    rl = section("rl")
    rl["objective"] = {"skip_gradient_norm": 1e-6}
    rl["loop"]["max_skipped"] = 2
    with pytest.raises(UserError, match="3 updates in a row were skipped"):
        run_stage(rl, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"students": ()}, "the term `rlt` needs students"),
        ({"reward_terms": {"correctness": {}}}, "students need that term"),
        ({"reward_terms": {"rltt": {}}}, "reward term 'rltt'"),
        (
            {"reward_terms": {"value": {"function": "math:sqrt"}}},
            "reward term 'value': a name of results; pick another",
        ),
        ({"loop": {"self_teaching": True}}, "set `students` to \\(\\)"),
        ({"loop": {"role": "both"}}, "loop.role='both'"),
        ({"loop": {"group_size": 1}}, "at least 2"),
        ({"loop": {"sample_every": 0}}, "loop.sample_every=0: at least 1"),
        ({"rows": {"micro_batch_size": 0, "row_length": 8}}, "rows.micro_batch_size=0"),
    ],
)
def test_contradictions_are_refused(
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    rl = section("rl")
    for name, value in change.items():
        rl[name] = {**rl[name], **value} if name == "loop" else value
    with pytest.raises(UserError, match=message):
        run_stage(rl, tmp_path)
    shutil.rmtree(tmp_path)
