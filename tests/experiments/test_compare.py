"""Routes over seeds in made-up workdirs: numbers by hand, and what readers get."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.compare import compare
from experiments.pages import write_comparison
from experiments.study import Claim, Measure, Route, Study
from rlt_jax.errors import UserError

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"
T_3 = 3.182446  # 97.5% quantile of Student's t with three degrees of freedom
HOSTILE = '<script>alert(1)</script> $x^2$ & "é" \''
SEEDS = (10, 11, 12)

# Right answers to four questions, two samples each, for each seed.
MARKS = {
    "rlt": {
        10: [[1, 1], [1, 1], [1, 1], [1, 0]],
        11: [[1, 1], [1, 1], [1, 0], [1, 0]],
        12: [[1, 1], [1, 1], [1, 1], [1, 1]],
    },
    "warmup": {
        10: [[0, 0], [0, 0], [1, 0], [0, 0]],
        11: [[1, 0], [0, 1], [0, 0], [0, 0]],
        12: [[0, 0], [0, 0], [0, 0], [0, 0]],
    },
    "copy": {seed: [[1, 0], [1, 1], [0, 0], [0, 1]] for seed in SEEDS},
    "same": {seed: [[1, 1], [0, 1], [0, 0], [1, 0]] for seed in SEEDS},
}
# Rewards of the traces of two questions; the third is not in all routes.
REWARDS = {"rlt": [-1.0, -1.0], "warmup": [-3.0, -2.0], "copy": [-2.0, -2.0]}
REWARDS["same"] = [-4.0, -5.0, 0.0]

ROUTES = [
    Route(
        name,
        f"{HOSTILE} {name}",
        "1 Traces" if name != "same" else "2 Others",
        f"{name}_eval_{{seed}}",
        ["pretrain", f"{name}_sft_{{seed}}"],
        f"{name}_score_{{seed}}",
    )
    for name in MARKS
]
STUDY = Study(
    ROUTES,
    [
        Claim("rlt", "warmup", "It helped.", "1 Traces"),
        Claim("warmup", "rlt", "It did not help.", "2 Others"),
        Claim("copy", "same", "It did not matter.", "2 Others"),
    ],
    [Measure(HOSTILE, "3 Numbers", "rlt_sft_{seed}", "a.b")],
    ranked=list(MARKS),
    ranked_published="It was so.",
)


def write(file: Path, *rows: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_evaluation(folder: Path, marks: Sequence[Sequence[int]]) -> None:
    rows = [
        {"question": f"{HOSTILE} {q}", "answer": str(q), "correct": bool(mark)}
        for q, of_question in enumerate(marks)
        for mark in of_question
    ]
    write(folder / "samples.jsonl", *rows)
    results = {"num_questions": len(marks), "samples_per_question": len(marks[0])}
    write(folder / "results.json", results)
    write(folder / "done.json", {})


def write_sft(folder: Path, tokens: int, summary: dict[str, Any] | None) -> None:
    write(folder / "settings.json", {"stage": "sft"})
    write(folder / "metrics.jsonl", {"step": 0, "time/step_tokens": float(tokens)})
    shape = {"vocab_size": 2, "embed_dim": 2, "num_layers": 1, "num_heads": 1}
    shape |= {"num_kv_heads": 1, "head_dim": 2, "mlp_dim": 2, "max_length": 8}
    write(folder / "model.json", shape)
    write(folder / "done.json", {"seconds": 1.0, "summary": summary})


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    for name, seeds in MARKS.items():
        for seed, marks in seeds.items():
            write_evaluation(tmp_path / f"{name}_eval_{seed}", marks)
            # Two traces a question, whose mean is the reward above.
            scores = [
                {"question": f"q{q}", "reward": reward + side}
                for q, reward in enumerate(REWARDS[name])
                for side in (-0.25, 0.25)
            ]
            write(tmp_path / f"{name}_score_{seed}" / "scores.jsonl", *scores)
            write(tmp_path / f"{name}_score_{seed}" / "done.json", {})
            write_sft(tmp_path / f"{name}_sft_{seed}", 100 * seed, {"a": {"b": seed}})
    write_sft(tmp_path / "pretrain", 7, None)
    return tmp_path


def test_a_claim_equals_hand_computed_numbers(workdir: Path) -> None:
    seen, opposite, nothing = compare(workdir, STUDY, SEEDS)["claims"]
    # Differences of the questions: seed 10: 1, 1, 0.5, 0.5; 11: all 0.5; 12: all 1.
    assert seen["each_run"] == {"10": 0.75, "11": 0.5, "12": 1.0}
    error = (0.25 / 3) ** 0.5 / 2
    own = seen["each_run_over_questions"]
    assert own["10"] == pytest.approx([0.75 - T_3 * error, 0.75 + T_3 * error])
    # Questions of the seeds 11 and 12 tell nothing of how much questions differ.
    assert own["11"] is own["12"] is None
    # Means 5/6, 5/6, 2/3, 2/3 of the questions, whose error is a third of seed 10's.
    expected = [0.75 - T_3 * error / 3, 0.75 + T_3 * error / 3]
    assert seen["over_questions"] == pytest.approx(expected)
    assert (seen["verdict"], opposite["verdict"]) == ("seen", "opposite")
    # Questions differ, and yet the effect is exactly zero in every run.
    assert set(nothing["each_run"].values()) == {0.0}
    assert nothing["over_questions"][0] < 0 < nothing["over_questions"][1]
    assert nothing["verdict"] == "not seen"


def test_runs_that_agree_on_few_questions_show_nothing(workdir: Path) -> None:
    for seed in SEEDS:
        write_evaluation(workdir / f"rlt_eval_{seed}", [[1], [1], [1], [0]])
        write_evaluation(workdir / f"warmup_eval_{seed}", [[0], [0], [0], [0]])
    claim = compare(workdir, STUDY, SEEDS)["claims"][0]
    assert claim["over_runs"] == [0.75, 0.75]
    # Differences 1, 1, 1, 0 in every run, of the same questions.
    ends = [0.75 - T_3 * 0.25, 0.75 + T_3 * 0.25]
    assert claim["over_questions"] == pytest.approx(ends, abs=1e-6)
    assert claim["verdict"] == "not seen"
    # Nor do five questions without any difference between them; six do.
    for count, verdict in ((5, "not seen"), (6, "seen")):
        for name in MARKS:
            for seed in SEEDS:
                marks = [[int(name == "rlt")]] * count
                write_evaluation(workdir / f"{name}_eval_{seed}", marks)
        comparison = compare(workdir, STUDY, SEEDS)
        assert comparison["claims"][0]["verdict"] == verdict
        page = write_comparison(workdir, comparison).read_text(encoding="utf-8")
        assert ("too few questions" in page) == (count == 5)


def test_a_single_run_gives_no_verdict_and_no_interval_over_runs(workdir: Path) -> None:
    comparison = compare(workdir, STUDY, (10,))
    claim = comparison["claims"][0]
    assert {one["verdict"] for one in comparison["claims"]} == {"one run only"}
    assert claim["over_runs"] is claim["standard_deviation"] is None
    assert claim["over_questions"] == claim["each_run_over_questions"]["10"]
    page = write_comparison(workdir, comparison).read_text(encoding="utf-8")
    assert "<td>one run only</td>" in page


def test_routes_and_costs_equal_hand_computed_numbers(workdir: Path) -> None:
    route = compare(workdir, STUDY, SEEDS)["routes"]["rlt"]
    assert route["each_run"] == {"10": 0.875, "11": 0.75, "12": 1.0}
    assert route["mean"] == pytest.approx(0.875)
    assert route["standard_deviation"] == pytest.approx(0.125)
    # Tokens: 1000, 1100 and 1200, and 7 of the stage that all routes and seeds share.
    # Kernels of 2 x (2 * (1 + 1) * 2 + 3 * 2) = 28, 2 x 2 in the head.
    assert route["cost"] == {
        "decoded_tokens": 0.0,
        "scored_tokens": 0.0,
        "trained_tokens": pytest.approx(1107.0),
        "flops": pytest.approx(1107.0 * 3 * 2 * (28 + 4)),
    }


def test_ranks_and_correlation_of_the_workdir(workdir: Path) -> None:
    found = compare(workdir, STUDY, SEEDS)["correlation"]
    points = [point for point in found["points"] if point["seed"] == 11]
    ranks = {point["route"]: point["mean_rank"] for point in points}
    # First question: same, warm-up, copy, RLT; second: warm-up and copy tie.
    assert ranks == {"rlt": 4.0, "warmup": 2.25, "copy": 2.75, "same": 1.0}
    pearson, spearman = found["correlations"]
    assert (pearson["label"], pearson["points"]) == ("Pearson, all trace sets", 12)
    # Accuracies 0.75, 0.25, 0.5, 0.5 against these ranks.
    x, y = [1.5, -0.25, 0.25, -1.5], [0.25, -0.25, 0.0, 0.0]
    above = sum(a * b for a, b in zip(x, y))
    below = (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5
    assert pearson["each_run"]["11"] == pytest.approx(above / below)
    assert spearman["label"] == "Spearman, all trace sets"


def test_a_second_correlation_is_that_of_fewer_routes(workdir: Path) -> None:
    both = compare(workdir, STUDY._replace(ranked_without=["same"]), SEEDS)
    three = STUDY._replace(ranked=["rlt", "warmup", "copy"])
    fewer = compare(workdir, three, SEEDS)["correlation"]["correlations"]
    second = both["correlation"]["correlations"][2:]
    assert [x["label"] for x in second] == [
        "Pearson, without same",
        "Spearman, without same",
    ]
    assert [x | {"label": ""} for x in second] == [x | {"label": ""} for x in fewer]
    assert {x["verdict"] for x in fewer} == {"too few routes"}
    page = write_comparison(workdir, both).read_text(encoding="utf-8")
    assert "<td>Pearson, without same</td>" in page


def test_measures_are_read_by_their_path(workdir: Path) -> None:
    (measure,) = compare(workdir, STUDY, SEEDS)["measures"]
    assert measure["each_run"] == {"10": 10.0, "11": 11.0, "12": 12.0}
    assert measure["mean"] == pytest.approx(11.0)
    for key in ("a.c", "a", "b.b"):
        wrong = STUDY.measures[0]._replace(key=key)
        with pytest.raises(UserError, match=f"done.json has no number '{key}'"):
            compare(workdir, STUDY._replace(measures=[wrong]), SEEDS)


def test_a_measure_that_was_not_counted_has_its_default(workdir: Path) -> None:
    one = STUDY.measures[0]._replace(key="a.c", default=0.5)
    write_sft(workdir / "rlt_sft_12", 1, {"a": {"c": 4}})
    (found,) = compare(workdir, STUDY._replace(measures=[one]), (10, 12))["measures"]
    assert found["each_run"] == {"10": 0.5, "12": 4.0}
    # If nothing at all was counted, or the key is wrong before its end.
    write_sft(workdir / "rlt_sft_11", 1, {"a": {}})
    for seed, key in ((11, "a.c"), (10, "b.c")):
        wrong = STUDY._replace(measures=[one._replace(key=key)])
        with pytest.raises(UserError, match="has no number"):
            compare(workdir, wrong, (seed,))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (-9, "warmup_eval_12/samples.jsonl: the last line is cut off"),
        (0, "samples.jsonl has 0 records, but results.json has 8"),
    ],
)
def test_an_incomplete_evaluation_is_refused(
    workdir: Path, kept: int, message: str
) -> None:
    path = workdir / "warmup_eval_12" / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=message):
        compare(workdir, STUDY, SEEDS)


def test_other_questions_are_refused(workdir: Path) -> None:
    file = workdir / "rlt_eval_11" / "samples.jsonl"
    file.write_text(file.read_text().replace("' 3", "' 4"))
    message = "'rlt of seed 11' and 'warmup of seed.*3 of them the"
    with pytest.raises(UserError, match=message):
        compare(workdir, STUDY, SEEDS)
    # Without a claim about them, routes may have other questions.
    assert compare(workdir, STUDY._replace(claims=[]), SEEDS)["claims"] == []


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("warmup_eval_12", "samples.jsonl"),
        ("warmup_eval_12", "results.json"),
        ("warmup_eval_12", "done.json"),
        ("rlt_sft_10", "done.json"),
        ("rlt_sft_10", "metrics.jsonl"),
        ("copy_score_11", "scores.jsonl"),
        ("copy_score_11", "done.json"),
    ],
)
def test_a_missing_stage_is_named(workdir: Path, folder: str, file: str) -> None:
    (workdir / folder / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing; run the stage '{folder}'"):
        compare(workdir, STUDY, SEEDS)


def test_page_markdown_and_pictures(workdir: Path) -> None:
    comparison = compare(workdir, STUDY, SEEDS)
    page = write_comparison(workdir, comparison)
    assert page == workdir / "comparison" / "index.html"
    pictures = {file.stem: file.read_bytes() for file in page.parent.glob("*.png")}
    assert set(pictures) == {"routes", "claims", "correlation", "costs"}
    assert all(png.startswith(PNG) for png in pictures.values())
    html = page.read_text(encoding="utf-8")
    assert all(f'src="{name}.png"' in html for name in pictures)
    assert "<script" not in html
    row = ["75.0", "12.9 to 137.1", "59.7 to 90.3", "75.0, 50.0, 100.0", "seen"]
    assert "\n".join(f"      <td>{x}</td>" for x in [*row, "It helped."]) in html
    assert json.loads((workdir / "comparison.json").read_text()) == comparison
    markdown = (workdir / "comparison.md").read_text(encoding="utf-8")
    titles = [line[4:] for line in markdown.splitlines() if line.startswith("###")]
    assert titles == [
        "Claims: 1 Traces",
        "Claims: 2 Others",
        "Accuracy (%): 1 Traces",
        "Accuracy (%): 2 Others",
        "Correlation: It was so.",
        "Measures: 3 Numbers",
        "Costs: 1 Traces",
        "Costs: 2 Others",
    ]
    (line,) = [x for x in markdown.splitlines() if "It helped." in x]
    assert [cell.strip() for cell in line.split("|")][2:-2] == row


def test_a_comparison_of_routes_alone(workdir: Path) -> None:
    routes = [route._replace(stages=()) for route in ROUTES]
    page = write_comparison(workdir, compare(workdir, Study(routes), SEEDS))
    assert [file.stem for file in page.parent.glob("*.png")] == ["routes"]
    html = page.read_text(encoding="utf-8")
    assert not [word for word in ("Costs", "Claims", "Fisher") if word in html]


@pytest.mark.parametrize(
    ("flag", "status", "message"),
    [
        ("--seeds=0,1", 1, "experiments.compare: .*base_eval_0/done.json is missing"),
        (
            "--seeds=0,x",
            2,
            "argument --seeds: seeds are different numbers such as 0,1,2, not '0,x'",
        ),
        ("--seeds=", 2, "argument --seeds: seeds are different numbers"),
    ],
)
def test_the_command(tmp_path: Path, flag: str, status: int, message: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "experiments.compare", f"--workdir={tmp_path}", flag],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr
