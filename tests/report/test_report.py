"""The report of a made-up run: its numbers, its pictures, and that nothing leaks out."""

import dataclasses
import html.parser
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from rlt_jax.errors import UserError
from rlt_jax.report import plots
from rlt_jax.report.explanations import write_explanations
from rlt_jax.report.pages import ReportConfig, write_report
from rlt_jax.stages import report

# Ways to smuggle an active element into a page, each of which has to arrive as text.
PAYLOADS = (
    '<script>alert("1")</script>',
    "</pre><img src=x onerror=y>",
    "</title><script src=//evil>",
    "</style><style>@import '//evil'</style>",
    "<svg onload=alert(1)>",
    "<svg><script>alert&#40;1)</script>",
    "<math><mi xlink:href='javascript:x'>",
    "<iframe srcdoc='<script>x</script>'>",
    "<object data=//evil></object>",
    "<embed src=//evil>",
    "<base href=//evil/>",
    "<link rel=stylesheet href=//evil>",
    "<meta http-equiv=refresh content='0;url=//evil'>",
    "<form action=//evil><input autofocus onfocus=x>",
    "<a href=javascript:alert(1)>x</a>",
    "<details open ontoggle=x>",
    "<video><source onerror=x>",
    "<body onload=x>",
    "<textarea></textarea><noscript><p title='</noscript><img src=x onerror=y>'>",
    "<template><script>x</script></template>",
    "<!--><script>x</script>-->",
    "<![CDATA[<script>x</script>]]>",
    "'><script>x</script>",
    '"><script>x</script>',
    "' onmouseover='x",
    '" style="background:url(//evil)" x="',
    "{{ 7 * 7 }}{% raw %}",
    "&lt;script&gt;x&lt;/script&gt;",
    "<scr\u0131pt>\u2028</scr\u0131pt>",
    "<%2Fpre><ScRiPt >x</sCrIpT >",
)
HOSTILE = " & 'é' 数 \u2028 ".join(PAYLOADS)
PNG = b"\x89PNG\r\n\x1a\n"
CONFIG = ReportConfig(
    rl="rl",
    traces=(("warmup", "collect_warmup"), ("r$l<b>t", "collect_rlt")),
    evaluations=(
        ("base", "eval_base"),
        ("student_warmup_traces", "eval_student_warmup"),
        ("student_<i>$rlt_traces", "eval_student_rlt"),
    ),
    num_examples=2,
)
# Right answers of each evaluation: two samples of each of four questions.
MARKS = {
    "eval_base": [[0, 0], [0, 0], [0, 0], [0, 1]],
    "eval_student_warmup": [[0, 0], [0, 1], [1, 1], [0, 0]],
    "eval_student_rlt": [[1, 1], [0, 1], [1, 1], [0, 1]],
}


def _write(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def _question(number: int) -> str:
    return f"{HOSTILE} question {number}"


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A run with every file that the report reads, and hostile text in all of them."""
    held_out = {
        "held_out_reward_first": -0.5,
        "held_out_reward_standard_error_first": 0.02,
        "held_out_reward_last": -0.25,
        "held_out_reward_standard_error_last": 0.01,
        "held_out_solution_score_first": -0.4,
        "held_out_solution_score_last": -0.2,
    }
    stages = ("rl", *dict(CONFIG.traces).values(), *dict(CONFIG.evaluations).values())
    for seconds, stage in enumerate(stages, start=1):
        summary = held_out if stage == "rl" else {}
        kind = stage.partition("_")[0].replace("eval", "evaluate")
        done = {"stage": kind, "seconds": seconds + 0.5, "summary": summary}
        if seconds < len(stages):
            done["peak_gib"] = seconds + 1.0
        _write(tmp_path / stage / "done.json", done)
    rows: list[dict[str, Any]] = [
        {"step": 0, "reward/value_mean": -0.5, "reward/value_std": 0.1},
        {"step": 1, "reward/value_mean": -0.4, "reward/solution_score_mean": -0.3},
        {"step": 2, "policy/entropy": 1.5, "rollout/length_mean": None},
        {"step": 3, "rollout/length_mean": 40.0, "time/step_seconds": 2.0},
    ]
    _write(tmp_path / "rl" / "metrics.jsonl", *rows)
    for _, folder in CONFIG.traces:
        traces = [
            {
                "question": _question(number),
                "solution": f"{HOSTILE} solution",
                "answer": HOSTILE,
                "reasoning_trace": f"{HOSTILE} {folder} explanation {number}",
                "closed": number == 0,
                "reward": -0.125,
                "terms": {"solution_score": -0.0625, HOSTILE: 1},
            }
            for number in (0, 0, 1, 2)
        ]
        _write(tmp_path / folder / "traces.jsonl", *traces)
    for folder, marks in MARKS.items():
        flat = [mark for of_question in marks for mark in of_question]
        results = {
            "accuracy": sum(flat) / len(flat),
            "standard_error": 0.125,
            "num_questions": 4,
            "samples_per_question": 2,
        }
        _write(tmp_path / folder / "results.json", results)
        samples = [
            {
                "question": _question(number),
                "answer": HOSTILE,
                "completion": f"{HOSTILE} completion \ud83d",
                "extracted": HOSTILE if mark else None,
                "correct": bool(mark),
            }
            for number, of_question in enumerate(marks)
            for mark in of_question
        ]
        lines = [json.dumps(sample) + "\n" for sample in samples]
        (tmp_path / folder / "samples.jsonl").write_text("".join(lines))
    return tmp_path


def test_summary_equals_hand_computed_numbers(workdir: Path) -> None:
    summary = write_report(workdir, CONFIG, seed=7)
    comparisons = summary.pop("comparisons")
    # Accuracy of each question, after minus before: 1, 0, 0, 0.5.
    mean = 1.5 / 4
    variance = ((1 - mean) ** 2 + 2 * mean**2 + (0.5 - mean) ** 2) / 3
    error = math.sqrt(variance / 4)
    t_975 = 3.182446  # of Student's distribution with three degrees of freedom
    assert summary == {
        "teacher_reward_warmup": -0.5,
        "teacher_reward_warmup_standard_error": 0.02,
        "teacher_reward_rl": -0.25,
        "teacher_reward_rl_standard_error": 0.01,
        "accuracy_base": 0.125,
        "accuracy_base_standard_error": 0.125,
        "accuracy_student_warmup_traces": 0.375,
        "accuracy_student_warmup_traces_standard_error": 0.125,
        "accuracy_student_<i>$rlt_traces": 0.75,
        "accuracy_student_<i>$rlt_traces_standard_error": 0.125,
        "n_eval": 4,
        "samples_per_question": 2,
        "seed": 7,
        "seconds_total": 24.0,
        "seconds": {
            "rl": 1.5,
            "collect_warmup": 2.5,
            "collect_rlt": 3.5,
            "eval_base": 4.5,
            "eval_student_warmup": 5.5,
            "eval_student_rlt": 6.5,
        },
        "peak_gib": {
            "rl": 2.0,
            "collect_warmup": 3.0,
            "collect_rlt": 4.0,
            "eval_base": 5.0,
            "eval_student_warmup": 6.0,
            "eval_student_rlt": None,  # of a version that did not measure it
        },
    }
    assert json.loads((workdir / "summary.json").read_text()) == summary | {
        "comparisons": comparisons
    }
    found = {(row["with"], row["quantity"]): row for row in comparisons}
    assert list(found) == [("base", "accuracy"), ("student_warmup_traces", "accuracy")]
    last = found["student_warmup_traces", "accuracy"]
    assert last["of"] == "student_<i>$rlt_traces"
    assert last["difference"] == pytest.approx(mean)
    assert last["standard_error"] == pytest.approx(error)
    assert last["low"] == pytest.approx(mean - t_975 * error)
    assert last["high"] == pytest.approx(mean + t_975 * error)
    assert last["p_value"] == pytest.approx(0.2152, abs=1e-4)
    assert found["base", "accuracy"]["difference"] == 0.625


@pytest.mark.parametrize("graded", [0, 1])
def test_too_few_graded_questions_are_not_compared(workdir: Path, graded: int) -> None:
    for folder in MARKS:
        file = workdir / folder / "samples.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows[2 * graded :]:
            row["correct"] = None
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "comparisons" not in write_report(workdir, CONFIG, seed=0)


@pytest.mark.parametrize("folder", ["report", "rl.1"])
def test_what_a_run_costs_is_that_of_the_stages_read(
    workdir: Path, folder: str
) -> None:
    first = write_report(workdir, CONFIG, seed=0)
    _write(workdir / folder / "done.json", {"seconds": 100.0})
    assert write_report(workdir, CONFIG, seed=0) == first


class _Page(html.parser.HTMLParser):
    """What a browser would see: elements, addresses, and the text of each <pre>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.pres: list[str] = []
        self.feed(text)

    def handle_starttag(
        self, tag: str, attributes: list[tuple[str, str | None]]
    ) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            self.attributes.setdefault(name, []).append(value or "")
        if tag == "pre":
            self.pres.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "pre":
            self.pres[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.tags.append("/" + tag)


def test_everything_is_escaped_and_nothing_is_loaded(workdir: Path) -> None:
    write_report(workdir, CONFIG, seed=0)
    page = _Page((workdir / "report" / "index.html").read_text(encoding="utf-8"))
    assert_harmless(page)
    sources = page.attributes["src"]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert f"{HOSTILE} collect_warmup explanation 0" in page.pres
    assert f"{HOSTILE} collect_rlt explanation 1" in page.pres
    assert f"{HOSTILE} solution" in page.pres
    assert f"{HOSTILE} completion ?" in page.pres  # half a surrogate pair
    # Two examples of each kind, and no question twice.
    assert page.pres.count(_question(0)) == page.pres.count(_question(1)) == 2
    assert _question(2) not in page.pres


def assert_harmless(page: _Page) -> None:
    tags = {tag.strip("/") for tag in page.tags}
    assert not tags & {"script", "link", "iframe", "svg", "math", "form", "a", "i"}
    assert not tags & {"object", "embed", "base", "video", "template", "details"}
    active = {"href", "srcset", "srcdoc", "http-equiv", "action", "data"}
    assert not active & set(page.attributes)
    assert not [name for name in page.attributes if name.startswith("on")]


def test_explanations_are_escaped(tmp_path: Path) -> None:
    texts = [*PAYLOADS, HOSTILE]
    record = {"question": HOSTILE, "solution": HOSTILE, "completion": HOSTILE}
    record |= {
        "reasoning_trace": HOSTILE,
        "reward": 1.0,
        "terms": {HOSTILE: 1.0},
        "closed": True,
    }
    record |= {"explanation_tokens": texts, "solution_tokens": texts}
    names = ("explanation_kl_tokens", "teacher_log_probs_explanation")
    names += ("student_log_probs_explanation", "student_log_probs_solution")
    record |= dict.fromkeys(names, [-1.0] * len(texts))
    write_explanations([record], tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert_harmless(_Page(text))
    assert "49" not in text.partition("<body")[2]


def test_pictures_lie_beside_the_page_and_in_it(workdir: Path) -> None:
    write_report(workdir, CONFIG, seed=0)
    names = {path.stem for path in (workdir / "report").glob("*.png")}
    areas = {"reward", "reward_terms", "policy", "rollout", "time"}
    assert names == areas | {"accuracy"}
    for path in (workdir / "report").glob("*.png"):
        assert path.read_bytes().startswith(PNG)
    text = (workdir / "report" / "index.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,iVBOR") == len(names)


def test_report_without_traces_and_evaluations(workdir: Path) -> None:
    config = ReportConfig(rl="rl", traces=(), evaluations=())
    summary = write_report(workdir, config, seed=0)
    assert not any("accuracy" in name or name == "n_eval" for name in summary)


@pytest.mark.parametrize(
    "name",
    [
        "rl/done.json",
        "rl/metrics.jsonl",
        "collect_rlt/traces.jsonl",
        "eval_base/results.json",
        "eval_student_rlt/samples.jsonl",
    ],
)
def test_a_missing_file_is_named(workdir: Path, name: str) -> None:
    (workdir / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        write_report(workdir, CONFIG, seed=0)


def test_a_broken_file_is_named(workdir: Path) -> None:
    file = workdir / "rl" / "metrics.jsonl"
    file.write_text('{"step\n{"step": 0}\n')
    with pytest.raises(
        UserError, match="metrics.jsonl:1 is damaged: it is not valid JSON"
    ):
        write_report(workdir, CONFIG, seed=0)
    # Cut off inside of a character.
    file.write_bytes('{"step": 0}\n{"step": "é'.encode()[:-1])
    with pytest.raises(UserError, match="metrics.jsonl: the last line is cut off"):
        write_report(workdir, CONFIG, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rl/done.json", {"stage": "sft", "summary": {}}, "'rl' is a stage 'sft'"),
        ("rl/done.json", {"stage": "rl", "summary": {}}, "held_out_reward_first"),
        ("rl/done.json", [], "keys and values"),
        ("collect_rlt/traces.jsonl", {"question": _question(0)}, "Undefined"),
        ("collect_rlt/traces.jsonl", {"question": []}, "unhashable"),
        ("eval_base/results.json", {}, "'num_questions'"),
        ("eval_base/samples.jsonl", {"correct": True}, "base: question=None: a text"),
        (
            "eval_base/samples.jsonl",
            {"question": "q", "correct": "yes"},
            "='yes': True",
        ),
    ],
)
def test_files_of_other_stages_are_refused(
    name: str, content: Any, message: str, workdir: Path
) -> None:
    (workdir / name).write_text(json.dumps(content) + "\n")
    with pytest.raises(UserError, match=message) as error:
        report.run(ConfigDict(dataclasses.asdict(CONFIG)), workdir / "report", 0)
    assert str(error.value).startswith("cannot write the report of ")


def test_evaluations_on_other_questions_are_refused(workdir: Path) -> None:
    path = workdir / "eval_student_rlt" / "samples.jsonl"
    path.write_text(path.read_text().replace("question 3", "question 4"))
    with pytest.raises(UserError, match="3 of them the same"):
        write_report(workdir, CONFIG, seed=0)
    path = workdir / "eval_base" / "results.json"
    path.write_text(
        path.read_text().replace('"num_questions": 4', '"num_questions": 5')
    )
    with pytest.raises(UserError, match="different numbers of questions"):
        write_report(workdir, CONFIG, seed=0)


def test_a_std_is_the_band_of_its_mean() -> None:
    row = {
        "step": 0,
        "reward/value_mean": 1.0,
        "reward/value_std": 1.0,
        "reward/explanation_kl_mean": 1.0,
        "policy/lonely_std": 1.0,
    }
    assert plots.metric_groups([row]) == {
        "reward": ["reward/value_mean"],
        "reward_terms": ["reward/explanation_kl_mean"],
        "policy": ["policy/lonely_std"],
    }


def test_an_accuracy_of_zero_can_be_drawn() -> None:
    results = {"base": {"accuracy": 0.0, "standard_error": 0.0}}
    assert plots.accuracy_bars(results).startswith(PNG)


def test_the_report_needs_no_jax() -> None:
    code = "import sys, rlt_jax.report.pages; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
