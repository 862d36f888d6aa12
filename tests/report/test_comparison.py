"""Routes over seeds: statistics by hand, made-up workdirs, and the command itself."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlt_jax.errors import UserError
from rlt_jax.report.comparison import TOO_FEW, compare
from rlt_jax.report.comparison_config import CompareConfig
from rlt_jax.report.comparison_pages import write_comparison

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"
T_2 = 4.302653  # 97.5% quantile of Student's t with two degrees of freedom
T_3 = 3.182446
HOSTILE = '<script>alert(1)</script> | $x^2$ & "é" \''

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
    "copy": {seed: [[1, 0], [1, 1], [0, 0], [0, 1]] for seed in (10, 11, 12)},
    "same": {seed: [[1, 1], [0, 1], [0, 0], [1, 0]] for seed in (10, 11, 12)},
}
# Rewards of the traces of two questions; the third is not in all routes.
REWARDS = {"rlt": [-1.0, -1.0], "warmup": [-3.0, -2.0], "copy": [-2.0, -2.0]}
REWARDS["same"] = [-4.0, -5.0, 0.0]


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_evaluation(folder: Path, marks: Sequence[Sequence[int]]) -> None:
    rows = [
        {"question": f"{HOSTILE} {q}", "answer": str(q), "correct": bool(mark)}
        for q, of_question in enumerate(marks)
        for mark in of_question
    ]
    _write(folder / "samples.jsonl", rows)
    results = {"num_questions": len(marks), "samples_per_question": len(marks[0])}
    _write(folder / "results.json", [results])
    _write(folder / "done.json", [{}])


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    for name, seeds in MARKS.items():
        for seed, marks in seeds.items():
            _write_evaluation(tmp_path / f"{name}_eval_{seed}", marks)
            # Two traces a question, whose mean is the reward above.
            scores = [
                {"question": f"q{q}", "reward": reward + side}
                for q, reward in enumerate(REWARDS[name])
                for side in (-0.25, 0.25)
            ]
            _write(tmp_path / f"{name}_score_{seed}" / "scores.jsonl", scores)
            _write(tmp_path / f"{name}_score_{seed}" / "done.json", [{}])
            cost = {"decoded_tokens": 100.0 * seed, "flops": 1e12 * seed}
            done = {"seconds": float(seed), "summary": {"cost": cost, "a": {"b": seed}}}
            _write(tmp_path / f"{name}_rl_{seed}" / "done.json", [done])
    _write(tmp_path / "pretrain" / "done.json", [{"seconds": 5.0, "summary": None}])
    return tmp_path


def _routes(**changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "label": f"{HOSTILE} {name}",
            "section": "1 Traces" if name != "same" else "2 Others",
            "evaluation": f"{name}_eval_{{seed}}",
            "stages": ["pretrain", f"{name}_rl_{{seed}}"],
            "traces": f"{name}_score_{{seed}}",
        }
        | changes
        for name in MARKS
    ]


def _config(**changes: Any) -> CompareConfig:
    claim = {"title": "RLT helps", "published": "It did.", "section": "1 Traces"}
    values = {
        "seeds": (10, 11, 12),
        "routes": _routes(),
        "claims": [
            claim | {"better": "rlt", "worse": "warmup"},
            claim | {"better": "warmup", "worse": "rlt", "section": "2 Others"},
            claim | {"better": "copy", "worse": "same"},
        ],
        "measures": [
            {"label": HOSTILE, "folder": "rlt_rl_{seed}", "key": "summary.a.b"},
        ],
        "correlation": ("rlt", "warmup", "copy", "same"),
    }
    return CompareConfig(**values | changes)


def test_a_claim_equals_hand_computed_numbers(workdir: Path) -> None:
    seen, opposite, nothing = compare(workdir, _config())["claims"]
    # Differences of the questions: seed 10: 1, 1, 0.5, 0.5; 11: all 0.5; 12: all 1.
    error = (0.25 / 3) ** 0.5 / 2
    assert seen["seeds"]["10"] == {
        "difference": pytest.approx(0.75),
        "standard_error": pytest.approx(error),
        "interval": pytest.approx([0.75 - T_3 * error, 0.75 + T_3 * error]),
    }
    assert [seen["seeds"][seed]["difference"] for seed in ("11", "12")] == [0.5, 1.0]
    # Questions of the seeds 11 and 12 tell nothing of how much questions differ.
    assert seen["seeds"]["11"]["interval"] is None
    runs, questions = T_2 * 0.25 / 3**0.5, T_3 * error / 3
    assert seen["difference"] == {
        "mean": pytest.approx(0.75),
        "standard_deviation": pytest.approx(0.25),
        "over_runs": pytest.approx([0.75 - runs, 0.75 + runs]),
        "over_questions": pytest.approx([0.75 - questions, 0.75 + questions]),
    }
    assert (seen["verdict"], opposite["verdict"]) == ("seen", "opposite")
    # Questions differ, and yet the effect is exactly zero in every run.
    assert nothing["difference"]["mean"] == nothing["seeds"]["10"]["difference"] == 0
    assert nothing["seeds"]["10"]["standard_error"] > 0
    assert nothing["verdict"] == "not seen"


def test_runs_that_agree_on_few_questions_show_nothing(workdir: Path) -> None:
    for seed in (10, 11, 12):
        _write_evaluation(workdir / f"rlt_eval_{seed}", [[1], [1], [1], [0]])
        _write_evaluation(workdir / f"warmup_eval_{seed}", [[0], [0], [0], [0]])
    found = compare(workdir, _config())["claims"][0]
    assert found["difference"]["over_runs"] == [0.75, 0.75]
    # Differences 1, 1, 1, 0 in every run, of the same questions.
    ends = [0.75 - T_3 * 0.25, 0.75 + T_3 * 0.25]
    assert found["difference"]["over_questions"] == pytest.approx(ends, abs=1e-6)
    assert found["verdict"] == "not seen"
    # Nor do five questions without any difference between them; six do.
    for count, verdict in ((5, "not seen"), (6, "seen")):
        for name in MARKS:
            for seed in (10, 11, 12):
                marks = [[int(name == "rlt")]] * count
                _write_evaluation(workdir / f"{name}_eval_{seed}", marks)
        assert compare(workdir, _config())["claims"][0]["verdict"] == verdict
        write_comparison(workdir, _config())
        page = (workdir / "comparison" / "index.html").read_text(encoding="utf-8")
        assert ("too few questions" in page) == (count == 5)


def test_a_single_run_gives_no_verdict_and_no_interval_over_runs(workdir: Path) -> None:
    found = compare(workdir, _config(seeds=(10,)))
    assert {claim["verdict"] for claim in found["claims"]} == {"one run only"}
    difference = found["claims"][0]["difference"]
    assert difference["over_runs"] is difference["standard_deviation"] is None
    assert difference["over_questions"] == found["claims"][0]["seeds"]["10"]["interval"]
    write_comparison(workdir, _config(seeds=(10,)))
    page = (workdir / "comparison" / "index.html").read_text(encoding="utf-8")
    assert "One run only:" in page
    assert "seed 75.0)." in page


def test_routes_need_not_have_all_seeds(workdir: Path) -> None:
    routes = _routes()
    routes[1]["seeds"] = (12, 10)
    found = compare(workdir, _config(routes=routes))
    assert list(found["claims"][0]["seeds"]) == ["10", "12"]
    assert list(found["correlation"]["seeds"]) == ["10", "12"]
    assert list(found["routes"]["rlt"]["seeds"]) == ["10", "11", "12"]


def test_routes_and_costs_equal_hand_computed_numbers(workdir: Path) -> None:
    route = compare(workdir, _config())["routes"]["rlt"]
    # Accuracies 7/8, 6/8 and 1; of the first the questions' are 1, 1, 1, 0.5.
    assert route["accuracy"]["mean"] == pytest.approx(0.875)
    assert route["accuracy"]["standard_deviation"] == pytest.approx(0.125)
    assert route["seeds"]["10"] == {
        "accuracy": pytest.approx(0.875),
        "standard_error": pytest.approx(0.25 / 2),
        "questions": 4,
        "samples_per_question": 2,
    }
    # The shared stage costs its seconds alone.
    assert route["cost"]["mean"] == {
        "seconds": pytest.approx(11.0 + 5.0),
        "decoded_tokens": pytest.approx(1100.0),
        "scored_tokens": 0.0,
        "trained_tokens": 0.0,
        "flops": pytest.approx(1.1e13),
    }
    assert route["cost"]["seeds"]["12"]["seconds"] == 17.0


def test_ranks_and_correlation_of_the_workdir(workdir: Path) -> None:
    found = compare(workdir, _config())["correlation"]
    of_seed = found["seeds"]["11"]
    ranks = {name: run["mean_rank"] for name, run in of_seed["routes"].items()}
    # First question: same, warm-up, copy, RLT; second: warm-up and copy tie.
    assert ranks == {"rlt": 4.0, "warmup": 2.25, "copy": 2.75, "same": 1.0}
    assert of_seed["questions"] == 2
    assert found["pooled"]["points"] == 12
    # Accuracies 0.75, 0.25, 0.5, 0.5 against these ranks.
    x, y = [1.5, -0.25, 0.25, -1.5], [0.25, -0.25, 0.0, 0.0]
    above = sum(a * b for a, b in zip(x, y))
    below = (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5
    assert of_seed["pearson"]["value"] == pytest.approx(above / below)
    assert "without" not in found
    three = _config(correlation=("rlt", "warmup", "copy"))
    fewer = compare(workdir, three)["correlation"]
    assert fewer["verdict"] == TOO_FEW
    both = _config(correlation_without=("same",))
    del fewer["published"]
    assert compare(workdir, both)["correlation"]["without"] == fewer


def test_measures_are_read_by_their_path(workdir: Path) -> None:
    (measure,) = compare(workdir, _config())["measures"]
    assert measure["seeds"] == {"10": 10.0, "11": 11.0, "12": 12.0}
    assert measure["mean"] == pytest.approx(11.0)
    assert measure["standard_deviation"] == pytest.approx(1.0)
    for key in ("summary.a.c", "summary.a", "seconds.b"):
        wrong = {"label": "x", "folder": "rlt_rl_{seed}", "key": key}
        with pytest.raises(UserError, match=f"done.json has no number '{key}'"):
            compare(workdir, _config(measures=[wrong]))


def test_a_measure_that_nobody_counted_is_absent(workdir: Path) -> None:
    _write(workdir / "rlt_rl_11" / "done.json", [{"seconds": 1, "summary": {"a": {}}}])
    summary = {"a": {"c": 4}}
    _write(workdir / "rlt_rl_12" / "done.json", [{"seconds": 1, "summary": summary}])
    one = {"label": "x", "folder": "rlt_rl_{seed}", "key": "summary.a.c"}
    one |= {"seeds": (10, 12)}
    with pytest.raises(UserError, match="rlt_rl_10/done.json has no number"):
        compare(workdir, _config(measures=[one]))
    (found,) = compare(workdir, _config(measures=[one | {"absent": 0.5}]))["measures"]
    assert found["seeds"] == {"10": 0.5, "12": 4.0}
    # Where nothing at all was counted, or the key is wrong before its end.
    for changes in ({"seeds": (11,)}, {"key": "summary.b.c"}, {"absent": "none"}):
        with pytest.raises(UserError, match="has no number"):
            compare(workdir, _config(measures=[one | {"absent": 0.5} | changes]))


def test_seconds_of_several_sessions_are_marked(workdir: Path) -> None:
    write_comparison(workdir, _config())
    markdown = (workdir / "comparison.md").read_text(encoding="utf-8")
    assert "share its cores" in markdown
    assert "†" not in markdown
    file = workdir / "copy_rl_11" / "done.json"
    _write(file, [json.loads(file.read_text()) | {"sessions": 2}])
    write_comparison(workdir, _config())
    found = json.loads((workdir / "comparison.json").read_text(encoding="utf-8"))
    seeds = found["routes"]["copy"]["cost"]["seeds"]
    assert [seeds[seed]["sessions"] for seed in seeds] == [1, 2, 1]
    markdown = (workdir / "comparison.md").read_text(encoding="utf-8")
    assert markdown.count("16† |") == 1
    assert "\n† A stage was cut off" in markdown
    page = (workdir / "comparison" / "index.html").read_text(encoding="utf-8")
    assert "<td>16†</td>" in page
    assert "† A stage was cut off" in page


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (-9, "warmup_eval_12/samples.jsonl: the last line is cut off"),
        (0, "samples.jsonl has 0 rows, but results.json is of 8"),
    ],
)
def test_an_incomplete_evaluation_is_refused(
    workdir: Path, kept: int, message: str
) -> None:
    path = workdir / "warmup_eval_12" / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=message):
        compare(workdir, _config())


def test_routes_of_other_sizes_are_shown_but_not_claimed(workdir: Path) -> None:
    for seed in (10, 11, 12):
        _write_evaluation(workdir / f"same_eval_{seed}", [[1, 1, 0]] * 2)
    write_comparison(workdir, _config(claims=()))
    markdown = (workdir / "comparison.md").read_text(encoding="utf-8")
    assert (markdown.count("| 4 × 2 |"), markdown.count("| 2 × 3 |")) == (3, 1)
    with pytest.raises(UserError, match="'copy of seed 10' and 'same of seed 10'"):
        compare(workdir, _config())


def test_page_markdown_and_pictures(workdir: Path) -> None:
    counts = write_comparison(workdir, _config())
    assert counts == {
        "routes": 4,
        "verdicts": {"seen": 1, "opposite": 1, "not seen": 1},
    }
    folder = workdir / "comparison"
    names = {"routes", "claims", "correlation", "costs"}
    assert {file.stem for file in folder.glob("*.png")} == names
    assert all(file.read_bytes().startswith(PNG) for file in folder.glob("*.png"))
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,iVBOR") == len(names)
    assert "<script" not in page
    assert "75.0 points above" in page
    assert "95% over runs 12.9 to 137.1; 95% over questions 59.7 to 90.3" in page
    assert "seeds 75.0, 50.0, 100.0)" in page
    assert "75.0 points below" in page
    found = json.loads((workdir / "comparison.json").read_text(encoding="utf-8"))
    assert found["claims"][0]["sentence"].startswith("Seen: <script>")
    markdown = (workdir / "comparison.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert any("87.5 ± 31.1 | ± " in line for line in tables)
    # Cells that hold a bar do not add columns.
    widths = {line.replace("\\|", "").count("|") for line in tables}
    assert widths == {5, 6, 7}


def test_a_second_correlation_is_told(workdir: Path) -> None:
    write_comparison(workdir, _config(correlation_without=("same",)))
    found = json.loads((workdir / "comparison.json").read_text(encoding="utf-8"))
    told = found["correlation"]["sentence"]
    assert "4 routes in 3 runs. Without " in told
    assert " same: Too few routes: rank of" in told
    assert told.endswith("3 routes in 3 runs.")
    fewer = found["correlation"]["without"]
    value = fewer["pooled"]["pearson"]["value"]
    markdown = (workdir / "comparison.md").read_text(encoding="utf-8")
    (row,) = [x for x in markdown.splitlines() if x.startswith("| Pearson. Without")]
    assert row.endswith(f" {value:.2f} |")


def test_a_comparison_of_routes_alone(workdir: Path) -> None:
    routes = _routes(stages=(), section="")
    config = _config(routes=routes, claims=(), measures=(), correlation=())
    write_comparison(workdir, config)
    folder = workdir / "comparison"
    assert [file.stem for file in folder.glob("*.png")] == ["routes"]
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert not [word for word in ("Costs", "claims", "Fisher") if word in page]


def test_other_questions_are_refused(workdir: Path) -> None:
    file = workdir / "rlt_eval_11" / "samples.jsonl"
    file.write_text(file.read_text().replace("' 3", "' 4"))
    with pytest.raises(
        UserError, match="'rlt of seed 11' and 'warmup of seed.*3 of them the"
    ):
        compare(workdir, _config())


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("warmup_eval_12", "samples.jsonl"),
        ("warmup_eval_12", "results.json"),
        ("warmup_eval_12", "done.json"),
        ("rlt_rl_10", "done.json"),
        ("copy_score_11", "scores.jsonl"),
        ("copy_score_11", "done.json"),
    ],
)
def test_a_missing_stage_is_named(workdir: Path, folder: str, file: str) -> None:
    (workdir / folder / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing. The stage '{folder}'"):
        compare(workdir, _config())


def test_the_command(workdir: Path) -> None:
    file = workdir / "config.py"
    file.write_text(
        f"""
from rlt_jax.report.comparison_config import CompareConfig
from rlt_jax.settings import section
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.pipeline = ("compare",)
    config.compare = section(
        CompareConfig,
        seeds=(10, 11, 12),
        routes={tuple(_routes())!r},
        claims=({{"title": "t", "published": "p", "better": "rlt", "worse": "warmup"}},),
    )
    config.compare.stage = "compare"
    return config
"""
    )
    result = subprocess.run(
        [
            *(sys.executable, "-m", "rlt_jax.main"),
            *(f"--config={file}", f"--workdir={workdir}"),
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((workdir / "comparison.json").read_text(encoding="utf-8"))
    # RLT less warm-up: 0.875 less 0.125, 0.75 less 0.25, 1 less 0.
    seeds = found["claims"][0]["seeds"].values()
    assert [of_seed["difference"] for of_seed in seeds] == [0.75, 0.5, 1.0]
    done = json.loads((workdir / "compare" / "done.json").read_text())
    assert done["summary"] == {"routes": 4, "verdicts": {"seen": 1}}
    assert (workdir / "comparison" / "index.html").is_file()
