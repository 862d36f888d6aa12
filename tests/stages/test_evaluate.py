"""Stage `evaluate`: what it counts, and completions that others have sampled."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlt_jax.errors import UserError
from rlt_jax.stages import evaluate
from rlt_jax.training import hosts
from rlt_jax.training.metrics import read_jsonl

Section = Callable[[str], dict[str, Any]]
RunStage = Callable[[dict[str, Any], Path], Path]
ROOT = Path(__file__).parents[2]
OPEN, CLOSE = "<|begin_of_solution|>", "<|end_of_solution|>"
PROBLEMS = [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(1, 4)]
# Of 4 samples to each: 3 right; 1 right and a tie of three; 2 wrong alike.
TEXTS = [
    ["2", "2.0", "3", r"\boxed{2}"],
    ["4", "5", "6", None],
    ["7", "7", "{}{$$", "6"],
]
# pass@2: 1; 1 - C(3,2)/C(4,2) = 1/2; 1/2. Majority: 1, 1/3, 0.
EXPECTED = {
    "accuracy": 5 / 12,
    "pass_at_1": 5 / 12,
    "pass_at_2": 2 / 3,
    "pass_at_4": 1,
    "majority_at_4": 4 / 9,
    "num_questions": 3,
    "samples_per_question": 4,
    "unreadable": 1,
    "timed_out": 0,
    "crashed": 0,
    "truncated": None,
    "mean_tokens": None,
}


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def predicting(section: Section, tmp_path: Path) -> dict[str, Any]:
    """A section that grades completions of a file; its model does not exist."""
    rows = [
        {
            "question": problem["question"],
            "completions": [
                "no \ud83d idea" if text is None else f"so {OPEN}{text}{CLOSE}"
                for text in texts
            ],
        }
        for problem, texts in zip(PROBLEMS, TEXTS, strict=True)
    ]
    values = section("evaluate")
    values["data"] = {"task": "file", "path": write(tmp_path / "q.jsonl", PROBLEMS)}
    values["predictions"] = write(tmp_path / "p.jsonl", rows)
    values["model"] = {"path": str(tmp_path / "nowhere")}
    return values


def test_predictions_are_graded_without_a_model(
    predicting: dict[str, Any], run_stage: RunStage, tmp_path: Path
) -> None:
    folder = run_stage(predicting, tmp_path / "run")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for name, value in EXPECTED.items():
        assert results[name] == pytest.approx(value), name
    # Shares 3/4, 1/4 and 1/4 of the questions.
    assert results["standard_error"] == pytest.approx((1 / 12) ** 0.5 / 3**0.5)
    assert results["pass_at_4_standard_error"] == 0
    rows = read_jsonl(folder / "samples.jsonl")
    assert [row["extracted"] for row in rows] == [t for texts in TEXTS for t in texts]
    assert [row["read"] for row in rows[:8]] == [*"2232", *"456", None]
    assert rows[7]["completion"] == "no \ud83d idea"

    # What the stage has written can be graded again.
    predicting["predictions"] = str(folder / "samples.jsonl")
    again = run_stage(predicting, tmp_path / "again")
    assert read_jsonl(again / "samples.jsonl") == rows


def test_right_completions_become_traces(
    predicting: dict[str, Any], run_stage: RunStage, tmp_path: Path
) -> None:
    thought = "<|begin_of_thought|>{}<|end_of_thought|>"
    texts = [
        thought.format("1+1=2") + f"{OPEN}2{CLOSE}",
        thought.format("2+2=5") + f"{OPEN}5{CLOSE}",
        f"{OPEN}6{CLOSE}",  # right, but there is nothing to learn
    ]
    rows = [
        {"question": problem["question"], "completion": text}
        for problem, text in zip(PROBLEMS, texts, strict=True)
    ]
    write(Path(predicting["predictions"]), rows)
    predicting["evaluate"]["keep_right"] = True
    folder = run_stage(predicting, tmp_path / "run")
    trace = {"question": "1+1?", "solution": "2", "answer": "2"}
    assert read_jsonl(folder / "traces.jsonl") == [trace | {"reasoning_trace": "1+1=2"}]
    assert json.loads((folder / "results.json").read_text())["traces"] == 1


def test_a_whole_text_can_be_graded(
    predicting: dict[str, Any], run_stage: RunStage, tmp_path: Path
) -> None:
    texts = ["It is $1+1$", "The answer is 4.", f"7, no: {OPEN}6{CLOSE}"]
    rows = [
        {"question": problem["question"], "completion": text}
        for problem, text in zip(PROBLEMS, texts, strict=True)
    ]
    write(Path(predicting["predictions"]), rows)
    for untagged, accuracy in (("wrong", 1 / 3), ("whole", 1)):
        predicting["evaluate"]["untagged"] = untagged
        folder = run_stage(predicting, tmp_path / untagged)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        assert results["accuracy"] == pytest.approx(accuracy)
    predicting["evaluate"]["untagged"] = "right"
    with pytest.raises(UserError, match="untagged='right'.*wrong, whole"):
        run_stage(predicting, tmp_path / "right")


def test_grading_goes_on_where_it_was_stopped(
    predicting: dict[str, Any],
    run_stage: RunStage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run_stage(predicting, tmp_path / "whole")
    answers = iter([False, False, True])  # before the stage, then after two batches
    graded: list[int] = []
    grade = evaluate.grade

    def count(problems: Any, texts: Any) -> Any:
        graded.append(len(texts))
        return grade(problems, texts)

    monkeypatch.setattr(evaluate, "grade", count)
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "stopping", lambda: next(answers))
        with pytest.raises(hosts.Stopped):
            run_stage(predicting, tmp_path / "stopped")
    assert graded == [4, 4]
    resumed = run_stage(predicting, tmp_path / "stopped")
    assert graded == [4, 4, 4]
    for name in ("samples.jsonl", "results.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_two_evaluations_are_compared(
    predicting: dict[str, Any], run_stage: RunStage, tmp_path: Path
) -> None:
    other = run_stage(predicting, tmp_path / "other")
    rows = [
        {"question": p["question"], "completion": f"{OPEN}{p['answer']}{CLOSE}"}
        for p in PROBLEMS
    ]
    write(Path(predicting["predictions"]), rows)
    for path in (other, other / "samples.jsonl"):
        predicting["evaluate"]["compare_with"] = str(path)
        folder = run_stage(predicting, tmp_path / path.name)
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        found = results["difference"]
        assert found["compared_with"] == str(path)
        assert found["difference"] == pytest.approx(1 - 5 / 12)
        assert found["standard_error"] == pytest.approx(1 / 6)
        assert found["low"] < found["difference"] < found["high"]
        assert 0 < found["p_value"] < 1
    write(Path(predicting["data"]["path"]), PROBLEMS[:2])
    with pytest.raises(UserError, match="'this one' .* 2 and 3 questions, 2 of them"):
        run_stage(predicting, tmp_path / "fewer")
    write(Path(predicting["data"]["path"]), [*PROBLEMS, PROBLEMS[0]])
    with pytest.raises(UserError, match="4 problems of the data have only 3 different"):
        run_stage(predicting, tmp_path / "twice")


def test_an_incomplete_evaluation_is_not_compared_with(
    predicting: dict[str, Any], run_stage: RunStage, tmp_path: Path
) -> None:
    other = run_stage(predicting, tmp_path / "other")
    predicting["evaluate"]["compare_with"] = str(other)
    samples = other / "samples.jsonl"
    lines = samples.read_text(encoding="utf-8").splitlines(keepends=True)
    for text, message in (
        ("".join(lines[:-4]), "samples.jsonl has 8 records, but results.json has 12"),
        (
            "".join(lines)[:-9],
            "samples.jsonl: the last line is cut off. .* --only=par",
        ),
    ):
        samples.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            run_stage(predicting, tmp_path / "run")
    predicting["evaluate"]["compare_with"] = str(samples)
    with pytest.raises(UserError, match="4 samples of the question '1.1.', but 3 of"):
        run_stage(predicting, tmp_path / "run")
    (other / "done.json").unlink()
    for path in (other, tmp_path / "nothing"):
        predicting["evaluate"]["compare_with"] = str(path)
        with pytest.raises(
            UserError, match="name the folder of a complete evaluate st"
        ):
            run_stage(predicting, tmp_path / "run")


def test_samples_of_a_model_have_their_lengths(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    folder = run_stage(section("evaluate"), tmp_path)
    rows = read_jsonl(folder / "samples.jsonl")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert all(1 <= row["tokens"] <= 8 for row in rows)
    assert results["mean_tokens"] == pytest.approx(sum(r["tokens"] for r in rows) / 10)
    # A tiny random model hardly ever ends within 8 tokens.
    assert results["truncated"] == sum(row["truncated"] for row in rows) > 0
    assert results["unreadable"] == sum(row["read"] is None for row in rows)


def test_a_grader_is_checked_before_anything_is_sampled(
    predicting: dict[str, Any], run_stage: RunStage, tmp_path: Path
) -> None:
    predicting["data"]["grader"] = "maths"
    with pytest.raises(UserError, match="unknown grader 'maths'"):
        run_stage(predicting, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_the_recipe_grades_a_file_from_the_command_line(tmp_path: Path) -> None:
    problems = [
        {"problem": "1+1?", "solution": "s", "answer": "2"},
        {"problem": "Half of 1?", "solution": "s", "answer": "\\frac{1}{2}"},
    ]
    predictions = [
        {"question": "1+1?", "completions": ["The answer is 2.", "3"]},
        {"question": "Half of 1?", "completions": ["so \\boxed{0.5}", "$2/4$"]},
    ]

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, "-m", "rlt_jax.main"),
                "--config=configs/evaluate.py",
                f"--workdir={tmp_path / 'run'}",
                f"--config.data.path={write(tmp_path / 'q.jsonl', problems)}",
                "--config.evaluate.untagged=whole",
                *arguments,
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    found = command(f"--config.predictions={tmp_path / 'p.jsonl'}")
    assert found.returncode == 1
    assert "no such file" in found.stderr.splitlines()[-1]
    path = write(tmp_path / "p.jsonl", predictions)
    found = command(f"--config.predictions={path}", "--config.data.limit=2")
    assert found.returncode == 0, found.stderr
    text = (tmp_path / "run" / "evaluate" / "results.json").read_text(encoding="utf-8")
    results = json.loads(text)
    assert (results["accuracy"], results["pass_at_2"]) == (0.75, 1.0)
    assert results["majority_at_2"] == 0.75
