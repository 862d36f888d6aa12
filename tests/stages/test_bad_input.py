"""Bad input is one clear message, and whatever was done before it is kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from rlt_jax.errors import UserError
from rlt_jax.records import Problem
from rlt_jax.stages import run_pipeline

Section = Callable[[str], dict[str, Any]]
RunStage = Callable[[dict[str, Any], Path], Path]
GOOD_ROW = {"question": "1+1?", "solution": "2", "reasoning_trace": "1+1=2"}
LONG = "1+1?" * 99
UNGRADED = {"task": "tests.stages.test_bad_input:ungraded", "size": 3}


def ungraded(size: int) -> list[Problem]:
    return [Problem(f"{n}?", "2", "2", "maths") for n in range(size)]


def write(file: Path, *lines: str | dict[str, Any]) -> dict[str, str]:
    """Writes lines, or rows as lines; gives the data section that reads them."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return {"task": "file", "path": str(file)}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (None, ["data.jsonl", "no such file"]),
        ([], ["data.jsonl", "no records"]),
        ([GOOD_ROW, "{"], ["data.jsonl, line 2", "not valid JSON"]),
        ([GOOD_ROW, "", "[1]"], ["data.jsonl, line 3", "not an object"]),
        ([{"question": "1+1?", "solution": "2"}], ["line 1", "reasoning_trace"]),
        ([{"solution": "2", "reasoning_trace": ""}], ["line 1", "question"]),
        (
            [GOOD_ROW | {"question": LONG}],
            ["sft.row_length", "sequence 0 has", "the limit is 128"],
        ),
    ],
)
def test_bad_data_is_one_message_and_mended_data_goes_on(
    lines: list[str | dict[str, Any]] | None,
    expected: list[str],
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
) -> None:
    file = tmp_path / "data.jsonl"
    values = section("sft")
    values["data"] = write(file, *(lines or []))
    values["sft"]["steps"] = 1
    if lines is None:
        file.unlink()
    with pytest.raises(UserError) as error:
        run_stage(values, tmp_path / "run")
    for text in expected:
        assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("*"))
    write(file, GOOD_ROW)
    assert (run_stage(values, tmp_path / "run") / "done.json").is_file()


def test_stages_before_the_bad_one_are_kept_and_not_run_again(
    section: Section, tmp_path: Path
) -> None:
    first, second = section("sft"), section("sft")
    first["sft"]["steps"] = second["sft"]["steps"] = 1
    second["model"] = {"path": "{workdir}/first"}
    second["data"] = {"task": "file", "path": str(tmp_path / "data.jsonl")}
    values = {"seed": 0, "pipeline": ("first", "second")}
    config = ml_collections.ConfigDict(values | {"first": first, "second": second})
    # What is missing, or wrong in it, is known at the start.
    with pytest.raises(UserError, match="data.jsonl.*no such file"):
        run_pipeline(config, tmp_path / "run")
    write(tmp_path / "data.jsonl", {"question": "1+1?"})
    with pytest.raises(UserError, match="data.jsonl, line 1"):
        run_pipeline(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    write(tmp_path / "data.jsonl", GOOD_ROW)
    run_pipeline(config, tmp_path / "run", only="first")
    done = tmp_path / "run" / "first" / "done.json"
    before = done.read_bytes()
    write(tmp_path / "data.jsonl", {"question": "1+1?"})
    with pytest.raises(UserError, match="data.jsonl, line 1"):
        run_pipeline(config, tmp_path / "run")
    write(tmp_path / "data.jsonl", GOOD_ROW)
    run_pipeline(config, tmp_path / "run")
    assert done.read_bytes() == before
    assert (tmp_path / "run" / "second" / "done.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop": {"steps": 1, "batch_size": 11, "group_size": 2}}, "but only 10 prob"),
        ({"rows": {"micro_batch_size": 2, "row_length": 32}}, "rows.row_length=32"),
        ({"students": [{"path": "no/such/model"}]}, "no/such/model"),
        ({"policy": {"path": "{workdir}/frist"}}, "frist"),
        ({"template": "distilqwen"}, "template 'distilqwen'"),
    ],
)
def test_later_stages_are_checked_before_the_first_one_works(
    changes: dict[str, Any], message: str, section: Section, tmp_path: Path
) -> None:
    sft, rl = section("sft"), section("rl")
    rl["policy"] = {"path": "{workdir}/first"}
    rl["students"] = [{"path": "{workdir}/first"}]
    values = {"seed": 0, "pipeline": ("first", "second", "third"), "first": sft}
    rl["loop"] |= {"steps": 1}
    values["second"] = sft | {"model": {"path": "{workdir}/first"}}
    values["third"] = rl | changes
    with pytest.raises(UserError, match=message):
        run_pipeline(ml_collections.ConfigDict(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["first", "second", "last"])
def test_a_stage_that_needs_its_own_model(
    source: str, section: Section, tmp_path: Path
) -> None:
    """Itself, each other, or one that makes no model: a message, and no endless search."""
    values: dict[str, Any] = {"seed": 0, "pipeline": ("zero", "first", "second")}
    values["zero"] = section("sft")
    values["second"] = section("sft") | {"model": {"path": "{workdir}/first"}}
    values["first"] = section("sft") | {"model": {"path": f"{{workdir}}/{source}"}}
    values["last"] = {"stage": "report", "rl": "rl", "traces": (), "evaluations": ()}
    values["last"] |= {"num_examples": 1}
    values["pipeline"] += ("last",)
    with pytest.raises(UserError, match="neither a config.json"):
        run_pipeline(ml_collections.ConfigDict(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_will_be_made_are_not_looked_at(
    section: Section, tmp_path: Path
) -> None:
    sft, collect, distil = section("sft"), section("collect"), section("sft")
    sft["sft"]["steps"] = distil["sft"]["steps"] = 1
    collect["teacher"] = {"path": "{workdir}/warmup"}
    distil["data"] = {"task": "file", "path": "{workdir}/collect/traces.jsonl"}
    distil["data"]["keep_cut_off"] = True
    values = {"seed": 0, "pipeline": ("zero", "warmup", "collect", "distil")}
    values |= {"zero": sft, "warmup": sft, "collect": collect, "distil": distil}
    config = ml_collections.ConfigDict(values)
    run_pipeline(config, tmp_path)
    (tmp_path / "collect" / "traces.jsonl").write_text("{", encoding="utf-8")
    (tmp_path / "distil" / "done.json").unlink()
    shutil.rmtree(tmp_path / "warmup")
    run_pipeline(config, tmp_path)
    assert (tmp_path / "collect.1").is_dir()
    assert (tmp_path / "distil" / "done.json").is_file()


def test_one_stage_afresh_keeps_the_old_folder_if_it_cannot_run(
    section: Section, tmp_path: Path
) -> None:
    sft = section("sft")
    sft["sft"]["steps"] = 1
    config = ml_collections.ConfigDict({"seed": 0, "pipeline": ("a",), "a": sft})
    run_pipeline(config, tmp_path)
    config.a.model = {"path": "{workdir}/b"}
    with pytest.raises(UserError, match="b"):
        run_pipeline(config, tmp_path, only="a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "run.json"]


@pytest.mark.parametrize(
    ("stage", "what", "limit"),
    [
        ("evaluate", "question", "the model's context=128"),
        ("collect", "teacher prompt", "rows.row_length=128"),
        ("rl", "teacher prompt", "rows.row_length=128"),
    ],
)
def test_a_question_longer_than_the_context(
    stage: str,
    what: str,
    limit: str,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
) -> None:
    rows = [{"question": q, "solution": "2", "answer": "2"} for q in ("?", LONG)]
    values = section(stage) | {"data": write(tmp_path / "data.jsonl", *rows)}
    with pytest.raises(UserError) as error:
        run_stage(values, tmp_path / "run")
    assert str(error.value).startswith(f"{what} 1 has ")
    assert f"more than {limit}. Raise the limit" in str(error.value)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_question_without_answer_cannot_be_graded(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    row = GOOD_ROW | {"solution": "It is so."}  # a number at its end would be graded
    values = section("evaluate") | {"data": write(tmp_path / "data.jsonl", row)}
    with pytest.raises(UserError, match="grading needs one for every question"):
        run_stage(values, tmp_path / "run")


@pytest.mark.parametrize("answer", [None, "", " "])
@pytest.mark.parametrize("name", ["data", "held_out", "attempt"])
def test_a_student_without_answers_cannot_be_rewarded(
    name: str,
    answer: str | None,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
) -> None:
    rows = [GOOD_ROW | {"question": f"{n}?", "answer": "2"} for n in range(3)]
    rows[2]["answer"] = answer
    values = section("rl") | {"students": (), "reward_terms": {"correctness": {}}}
    values["loop"]["role"] = "student"
    data = write(tmp_path / "data.jsonl", *rows)
    values["data" if name == "attempt" else name] = data
    if name == "attempt":
        values |= {"reward_terms": {}, "teaching": {"sees": "attempt"}}
    with pytest.raises(UserError, match="'2.' has no `answer`: grading needs"):
        run_stage(values, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "key", "value", "message"),
    [
        ("evaluate", "data.size", 0, "data of task 'arithmetic': it has no problems"),
        ("rl", "held_out.size", 0, "held_out of task 'arithmetic': it has no problems"),
        ("rl", "held_out", None, "config.part.held_out=None: keys and values"),
        ("rl", "held_out", UNGRADED, "has the unknown grader 'maths'"),
        ("collect", "collect.classify", "math:pi", "'math:pi' is not a "),
        ("collect", "collect.classify", "nowhere:f", "No module named 'nowhere'"),
        ("evaluate", "predictions", "/nowhere.jsonl", "/nowhere.jsonl': no such file"),
        ("evaluate", "evaluate.compare_with", "/nowhere", "no /nowhere/done.json"),
        ("evaluate", "evaluate.compare_with", "x" * 300, "File name too long"),
        ("evaluate", "template", "x" * 300, "^template 'x.*File name too long"),
        ("evaluate", "model", {"path": "x" * 300}, "^model 'x.*File name too long"),
    ],
)
def test_input_of_a_later_stage_is_looked_at_first(
    stage: str,
    key: str,
    value: Any,
    message: str,
    section: Section,
    tmp_path: Path,
) -> None:
    values = section(stage)
    *path, name = key.split(".")
    (values[path[0]] if path else values)[name] = value
    config = {"seed": 0, "pipeline": ("first", "part"), "first": section("sft")}
    with pytest.raises(UserError, match=message):
        run_pipeline(
            ml_collections.ConfigDict(config | {"part": values}), tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()


def test_a_report_names_stages_of_the_run(section: Section, tmp_path: Path) -> None:
    report = {"stage": "report", "rl": "rl", "traces": (), "evaluations": ()}
    report["num_examples"] = 1
    values = {"seed": 0, "pipeline": ("first", "last"), "first": section("sft")}
    for name, message in [
        ("rll", "rll/done.json is missing"),
        ("first", "stage 'sft'"),
    ]:
        values["last"] = report | {"rl": name}
        with pytest.raises(UserError, match=message):
            run_pipeline(ml_collections.ConfigDict(values), tmp_path / "run")
    values["last"] = report | {"traces": (("a", "x"), ("a", "y"))}
    with pytest.raises(UserError, match="config.last.traces=.*different labels"):
        run_pipeline(ml_collections.ConfigDict(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_to_come_is_not_looked_for_yet(
    section: Section, tmp_path: Path
) -> None:
    first, second = section("evaluate"), section("evaluate")
    second["evaluate"]["compare_with"] = "{workdir}/first"
    second["template"] = "nowhere"
    values = {"seed": 0, "pipeline": ("zero", "first", "second"), "first": first}
    values |= {"zero": section("sft"), "second": second}
    with pytest.raises(UserError, match="template 'nowhere'"):
        run_pipeline(ml_collections.ConfigDict(values), tmp_path / "run")


def test_fewer_problems_than_a_batch(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    values = section("rl") | {"data": write(tmp_path / "data.jsonl", GOOD_ROW)}
    with pytest.raises(UserError, match="batch_size=2 prompts, but only 1 problems"):
        run_stage(values, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_model_that_is_not_there(
    exists: bool, section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    if exists:
        model.mkdir()
    values = section("sft") | {"model": {"path": str(model)}}
    with pytest.raises(UserError, match="neither a config.json .* nor a model.json"):
        run_stage(values, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_an_unknown_key_of_an_architecture(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    values = section("sft")
    values["model"]["architecture"]["embed_dims"] = 16
    with pytest.raises(UserError, match="architecture: unknown key 'embed_dims'"):
        run_stage(values, tmp_path / "run")


def test_a_cache_without_room_is_refused_before_the_stage_works(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    values = section("collect")
    values["engine"] |= {"cache_tokens": 10**15}
    with pytest.raises(UserError, match="are free: at most engine.cache_tokens="):
        run_stage(values, tmp_path / "run")
