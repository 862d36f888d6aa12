"""The experiment on students that are taught on their own attempts."""

import json
from pathlib import Path

import pytest

from experiments import on_policy, on_policy_claims
from rlt_jax.stages import stage_sections
from rlt_jax.stages.preflight import stages_read
from rlt_jax.training.metrics import append_jsonl


def test_what_is_compared_is_made_from_other_questions_and_before_it_is_read() -> None:
    config = on_policy.get_config("7")
    made = set()
    for name, section in stage_sections(config).items():
        values = json.loads(section.to_json().replace("{workdir}", "/runs"))
        assert {*stages_read(values, "/runs")} <= made
        made.add(name)
        data = section.data.to_dict()
        if data["task"] != "file":
            split = "test" if section.stage == "evaluate" else "train"
            assert data["split"] == split
    folders = [
        folder.format(seed=7)
        for route in on_policy_claims.STUDY.routes
        for folder in (route.evaluation, *route.stages)
    ]
    folders += [part.folder.format(seed=7) for part in on_policy_claims.STUDY.measures]
    assert {*folders} <= made


def test_routes_have_as_many_completions_of_the_same_questions() -> None:
    stages = stage_sections(on_policy.get_config("7"))
    count, seen = on_policy.QUESTIONS * on_policy.SAMPLES, []
    for name in ("warmup_traces_7", "rlt_traces_7"):
        stage = stages[name]
        assert stage.data["size"] * stage.collect.samples_per_problem == count
        seen.append(stage.data.to_dict())
    for name in ("solver_7", *(f"{name}_7" for name in on_policy.TAUGHT)):
        loop = stages[name].loop
        assert loop.steps * loop.batch_size * loop.group_size == count
        seen.append(stages[name].data.to_dict())
    assert all(data == seen[0] for data in seen)
    half, then = stages["half_traces_7"], stages["then_rlt_7"].loop
    sampled = half.data["size"] * half.collect.samples_per_problem
    assert sampled + then.steps * then.batch_size * then.group_size == count


def test_how_often_a_right_attempt_has_the_higher_log_ratio(tmp_path: Path) -> None:
    # Of the four pairs of a right and a wrong one, two are in order and one is a tie.
    rows = [(1.0, 0.5), (1.0, -1.0), (-0.5, -1.0), (-1.0, 0.0)]
    append_jsonl(
        tmp_path / "samples.jsonl",
        [
            {
                "split": "train",
                "terms": {"correctness": right, "teacher_log_ratio": ratio},
            }
            for right, ratio in rows
        ]
        + [{"split": "held_out", "terms": {"correctness": 1.0}}],
    )
    (tmp_path / "done.json").write_text("{}")
    found = on_policy_claims.judgement(tmp_path)
    assert found == {"auc": pytest.approx(0.625), "attempts": 4, "right": 0.5}
