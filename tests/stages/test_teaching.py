"""Students that are taught on their own attempts, from the section `teaching`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from rlt_jax.data.pipeline import load_problems
from rlt_jax.data.templates import load_template
from rlt_jax.errors import UserError
from rlt_jax.stages import run_pipeline
from rlt_jax.training import checkpoint
from rlt_jax.training.metrics import read_jsonl
from tests.stages.conftest import MODEL, PROBLEMS

Section = Callable[[str], dict[str, Any]]
RunStage = Callable[[dict[str, Any], Path], Path]
GIVEN = "<|begin_of_thought|>0+0=0"
OTHER = {**MODEL, "architecture": {**MODEL["architecture"], "embed_dim": 24}}


@pytest.fixture
def student(section: Section) -> Callable[..., dict[str, Any]]:
    """The stage of a student with this section `teaching`."""

    def make(**teaching: Any) -> dict[str, Any]:
        values = section("rl")
        values |= {"students": [], "reward_terms": {"correctness": {}}}
        values["loop"] |= {"role": "student", "steps": 3}
        return values | {"teaching": teaching}

    return make


@pytest.fixture
def traces(tmp_path: Path) -> str:
    """A file with a short trace of every problem."""
    problems = load_problems(PROBLEMS, load_template("tiny"), 0)
    file = tmp_path / "traces.jsonl"
    rows = [
        {"question": p.question, "solution": p.solution, "reasoning_trace": "0+0=0"}
        for p in problems
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def other_tokenizer(tmp_path: Path) -> str:
    """The embedded one, but a piece that no text has is another one."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(checkpoint.SHIPPED["embedded"], folder)
    pieces = sentencepiece_model_pb2.ModelProto()
    pieces.ParseFromString((folder / "tokenizer.model").read_bytes())
    pieces.pieces[-1].piece = "\u2603"
    (folder / "tokenizer.model").write_bytes(pieces.SerializeToString())
    return str(folder)


@pytest.mark.parametrize(
    "teaching",
    [
        {},
        {"prompt": "teacher", "clip": 0.5, "baseline": "group", "mask_above": 9.0},
        {"teacher": OTHER, "reward_weight": 1.0, "sees": "nothing"},
        {"kind": "reverse", "sync_alpha": 0.1},
        {"kind": "forward", "prompt": "teacher", "teacher": OTHER, "top_k": 8},
        {"kind": "jensen_shannon", "sync_every": 0, "clip": 0.1, "sees": "other"},
        {"kind": "reverse", "sees": "attempt"},
    ],
)
def test_every_kind_of_teaching_runs(
    teaching: dict[str, Any],
    student: Callable[..., dict[str, Any]],
    run_stage: RunStage,
    tmp_path: Path,
) -> None:
    folder = run_stage(student(**teaching), tmp_path)
    rows = read_jsonl(folder / "metrics.jsonl")
    assert len(rows) == 3
    kind = teaching.get("kind", "advantage")
    assert all(np.isfinite(row["policy/loss"]) for row in rows)
    assert ("policy/divergence" in rows[0]) == (kind != "advantage")
    # Untrained students are not right, so no attempt is shown.
    taught = rows[0]["reward/taught_fraction_mean"]
    assert (taught == 0) == (teaching.get("sees") == "attempt")


def test_a_policy_that_sees_nothing_has_nothing_to_teach_itself(
    student: Callable[..., dict[str, Any]], run_stage: RunStage, tmp_path: Path
) -> None:
    values = student(sees="nothing", kind="reverse")
    values["loop"]["steps"] = 1
    (row,) = read_jsonl(run_stage(values, tmp_path) / "metrics.jsonl")
    assert row["reward/taught_fraction_mean"] == 1.0
    assert abs(row["policy/divergence"]) < 1e-6
    assert row["optimizer/gradient_norm"] < 1e-6
    values = student(sees="nothing")
    values["loop"]["steps"] = 1
    (row,) = read_jsonl(run_stage(values, tmp_path / "advantage") / "metrics.jsonl")
    assert abs(row["reward/teacher_log_ratio_mean"]) < 1e-5
    assert row["optimizer/gradient_norm"] < 1e-4


@pytest.mark.parametrize(
    "prompt", ["teacher", pytest.param("privileged", marks=pytest.mark.slow)]
)
def test_another_tokenizer_that_splits_alike_changes_nothing(
    prompt: str,
    other_tokenizer: str,
    student: Callable[..., dict[str, Any]],
    run_stage: RunStage,
    tmp_path: Path,
) -> None:
    found = []
    for tokenizer in ("embedded", other_tokenizer):
        teacher = {"path": "embedded", "tokenizer": tokenizer}
        values = student(prompt=prompt, teacher=teacher)
        # Texts of a trained model are tokenised as it has sampled them, and end.
        values |= {"policy": {"path": "embedded_small"}, "seed": 3}
        values["sampling"]["max_new_tokens"] = 56
        values["loop"]["steps"] = 1
        run = run_stage(values, tmp_path / Path(tokenizer).name)
        (row,) = read_jsonl(run / "metrics.jsonl")
        assert row["reward/taught_fraction_mean"] > 0
        found.append({k: x for k, x in row.items() if not k.startswith("time/")})
    assert found[0].pop("memory/peak_gib") and found[1].pop("memory/peak_gib")
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("own", [0.0, 0.5])
def test_traces_take_the_place_of_samples(
    own: float,
    student: Callable[..., dict[str, Any]],
    run_stage: RunStage,
    traces: str,
    tmp_path: Path,
) -> None:
    values = student(kind="forward", own_samples=own, traces=traces, teacher=OTHER)
    values["sampling"]["max_new_tokens"] = 40
    folder = run_stage(values, tmp_path / "run")
    rows = read_jsonl(folder / "metrics.jsonl")
    assert all(np.isfinite(row["policy/divergence"]) for row in rows)
    samples = read_jsonl(folder / "samples.jsonl")
    trained = [row["completion"] for row in samples if row["split"] == "train"]
    given = [text for text in trained if text.startswith(GIVEN)]
    assert len(trained) == 6
    assert 0 < len(given) < 6 if own else len(given) == 6


def test_a_problem_without_a_trace_is_told(
    student: Callable[..., dict[str, Any]],
    run_stage: RunStage,
    traces: str,
    tmp_path: Path,
) -> None:
    values = student(kind="forward", own_samples=0.5, traces=traces)
    values["sampling"]["max_new_tokens"] = 2
    with pytest.raises(UserError, match="10 of 10 questions have no trace of at most"):
        run_stage(values, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "teaching", "message"),
    [
        ({"role": "teacher"}, {}, "teaching is for loop.role='student'"),
        (
            {"objective": {"skip_equal_groups": True}},
            {},
            "skip_equal_groups leaves out",
        ),
        ({"reward_terms": {}}, {"reward_weight": 1.0}, "no reward_terms"),
        ({}, {"teacher": {"path": "nowhere"}}, "nowhere"),
        (
            {},
            {"teacher": "nowhere"},
            "teaching.teacher='nowhere': keys and values, or None",
        ),
        ({}, {"explanations": "no.jsonl", "sees": "explanation"}, "no.jsonl"),
        ({"batch_size": 1}, {"sees": "other"}, "needs loop.batch_size of 2"),
        (
            {"rows": {"micro_batch_size": 2, "row_length": 40}},
            {"prompt": "privileged"},
            "the teacher's prompt 0 has 35 tokens, with sampling.max_new_tokens=8",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told_before_any_weights(
    changes: dict[str, Any],
    teaching: dict[str, Any],
    message: str,
    student: Callable[..., dict[str, Any]],
    run_stage: RunStage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = student(**teaching)
    if changes.keys() & {"role", "batch_size"}:
        values["loop"] |= changes
    else:
        values |= changes
    monkeypatch.setattr(checkpoint, "load_params", None)
    with pytest.raises(UserError, match=message):
        run_stage(values, tmp_path / "run")


def test_a_vocabulary_is_compared_with_itself_only(
    other_tokenizer: str,
    student: Callable[..., dict[str, Any]],
    run_stage: RunStage,
    tmp_path: Path,
) -> None:
    values = student(kind="reverse", teacher=OTHER | {"tokenizer": other_tokenizer})
    with pytest.raises(UserError, match="kind='reverse' compares whole vocabularies"):
        run_stage(values, tmp_path / "run")


def test_questions_without_an_explanation_are_told(
    student: Callable[..., dict[str, Any]],
    run_stage: RunStage,
    traces: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = Path(traces).read_text("utf-8").splitlines(keepends=True)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(lines[:4]), encoding="utf-8")
    values = student(sees="explanation", explanations=str(few))
    values["loop"]["steps"] = 1
    run_stage(values, tmp_path / "run")
    assert "6 of 10 problems" in caplog.text
    few.write_text(lines[0].replace("Start at", "Begin at"), encoding="utf-8")
    with pytest.raises(UserError, match="10 of 10 problems"):
        run_stage(values, tmp_path / "none")


def test_a_bad_section_is_told_before_earlier_stages_work(
    student: Callable[..., dict[str, Any]], section: Section, tmp_path: Path
) -> None:
    """Also where the stage reads files that the run has yet to make."""
    collect = section("collect")
    traces = "{workdir}/collect/traces.jsonl"
    taught = student(kind="reverse", own_samples=0.5, traces=traces)
    values = {"seed": 0, "pipeline": ("collect", "taught"), "collect": collect}
    for bad, message in (({"kynd": 1}, "unknown key 'kynd'"), ({"clip": 0}, "clip=0")):
        values["taught"] = taught | {"teaching": taught["teaching"] | bad}
        with pytest.raises(UserError, match=message):
            run_pipeline(ml_collections.ConfigDict(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()
