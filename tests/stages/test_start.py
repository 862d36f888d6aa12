"""What can be known at the start is checked before weights are read."""

import datetime
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
import sentencepiece
from jax.sharding import Mesh

from rlt_jax.data.tokenizer import SHIPPED, Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.models.transformer import Transformer
from rlt_jax.stages import run_pipeline
from rlt_jax.training import checkpoint
from rlt_jax.types import Params

Section = Callable[[str], dict[str, Any]]
RunStage = Callable[[dict[str, Any], Path], Path]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test."""

    def load_params(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(checkpoint, "load_params", load_params)


def score_section(section: Section, file: Path) -> dict[str, Any]:
    rows = [
        {"question": "1+1?", "solution": "2", "completions": ["1+1=2"]},
        {"question": "2+2?", "solution": "4", "completions": ["2+2=4" * 16]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = ("teacher", "students", "ensemble", "template", "rlt_reward", "mesh")
    collect = section("collect")
    return {name: collect[name] for name in common} | {
        "stage": "score",
        "data": {"path": str(file)},
        "select": {},
        "teacher_temperature": 0.7,
        "batch_size": 1,
        "assume_closed": False,
        "per_token": False,
        "controls": False,
        "num_examples": 1,
    }


@pytest.mark.parametrize("stage", ["rl", "collect", "score"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_student_with_a_short_context_is_refused(
    stage: str,
    number: int,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    no_weights: None,
) -> None:
    if stage == "score":
        values = score_section(section, tmp_path / "data.jsonl")
    else:
        values = section(stage)
    (student,) = values["students"]
    short = student | {"architecture": student["architecture"] | {"max_length": 36}}
    values["students"] = [short] if number == 0 else [student, short]
    with pytest.raises(UserError) as error:
        run_stage(values, tmp_path / "run")
    assert "36" in str(error.value) and "context" in str(error.value)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.fixture
def spelling(tmp_path: Path) -> Path:
    """A tokenizer that needs a token for every character, and for every byte of tags."""
    folder = tmp_path / "spelling"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Start at 4: +3 *7. Last digit?", "it is 9"]),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="char",
        vocab_size=284,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir()
    shutil.move(tmp_path / "tokenizer.model", folder)
    config = json.loads((SHIPPED["embedded"] / "tokenizer_config.json").read_text())
    text = json.dumps(config | {"eos_token": "</s>"})
    (folder / "tokenizer_config.json").write_text(text)
    return folder


@pytest.mark.parametrize("stage", ["rl", "collect"])
def test_a_student_that_needs_more_tokens_is_checked_for_every_problem(
    stage: str,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    spelling: Path,
    no_weights: None,
) -> None:
    values = section(stage)
    (student,) = values["students"]
    wordy = student | {"tokenizer": str(spelling)}
    wordy["architecture"] = student["architecture"] | {"max_length": 1024}
    values["students"] = [student, wordy]
    with pytest.raises(
        UserError,
        match=r"sequence of students\[1\] without an explanation \d has \d{3} tokens, .*"
        r"more than rows.row_length=128. Raise the limit",
    ):
        run_stage(values, tmp_path / "run")


def test_the_message_says_which_max_new_tokens_fits(
    section: Section, run_stage: RunStage, tmp_path: Path, no_weights: None
) -> None:
    for stage in ("rl", "collect", "evaluate"):
        values = section(stage)
        values["sampling"]["max_new_tokens"] = 120
        with pytest.raises(UserError, match="Set max_new_tokens to at most ") as error:
            run_stage(values, tmp_path / "run")
        fits = int(str(error.value).partition("at most ")[2].partition(",")[0])
        values["sampling"]["max_new_tokens"] = fits + 1
        with pytest.raises(UserError, match=f"at most {fits}, "):
            run_stage(values, tmp_path / "run")
        values["sampling"]["max_new_tokens"] = fits
        with pytest.raises(AssertionError, match="weights were read"):
            run_stage(values, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")


def test_a_later_score_is_checked_first(
    section: Section, tmp_path: Path, no_weights: None
) -> None:
    values = score_section(section, tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_text('{"question": "q"}', encoding="utf-8")
    config = {"seed": 0, "pipeline": ("a", "b"), "a": section("sft"), "b": values}
    with pytest.raises(UserError, match="data.jsonl, line 1"):
        run_pipeline(ml_collections.ConfigDict(config), tmp_path / "run")


@pytest.mark.parametrize("stage", ["sft", "rl", "collect", "evaluate"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "nowhere.json"}, "template 'nowhere.json' is neither a file"),
        ({"chat_template": "nowhere"}, "there is no chat template 'nowhere'"),
        ({"chat_template": "broken.jinja"}, "broken.jinja|the chat template fails"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_files_exist_and_render(
    stage: str,
    changes: dict[str, str],
    message: str,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    no_weights: None,
) -> None:
    (tmp_path / "broken.jinja").write_text("{% for x in messages %}")
    values = section(stage)
    model = next(name for name in ("model", "policy", "teacher") if name in values)
    if "chat_template" in changes:
        name = changes["chat_template"].replace("broken", str(tmp_path / "broken"))
        values[model] = values[model] | {"chat_template": name}
    elif "data" in changes:
        values["data"] = {"task": "file", "path": str(tmp_path / changes["data"])}
    else:
        values |= changes
    with pytest.raises(UserError, match=message):
        run_stage(values, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "nowhere.json"}, "template 'nowhere.json' is neither a file"),
        ({"data": {"task": "file", "path": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"held_out": {"task": "file", "path": "nowhere*.csv"}}, "nowhere"),
        (
            {"data": {"task": "mix", "sources": {"a": {"task": "file", "path": "no"}}}},
            "'no': no such file",
        ),
    ],
)
def test_files_of_all_stages_are_looked_for_before_the_first(
    changes: dict[str, Any],
    message: str,
    section: Section,
    tmp_path: Path,
    no_weights: None,
) -> None:
    first, second = section("sft"), section("sft") | changes
    config = {"seed": 0, "pipeline": ("first", "second")}
    config = ml_collections.ConfigDict(config | {"first": first, "second": second})
    with pytest.raises(UserError, match=message):
        run_pipeline(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # A stage that is complete needs its files no more.
    for name in ("first", "second"):
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        (folder / "done.json").write_text('{"stage": "sft"}')
    run_pipeline(config, tmp_path / "run")


DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_run_keeps_its_date_and_its_chat_template(
    section: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    first, second = section("sft"), section("evaluate")
    first["sft"]["steps"] = 1
    first["model"] |= {"chat_template": str(template), "chat_template_kwargs": {"x": 1}}
    second["model"] = {"path": "{workdir}/first"}
    config = {"seed": 0, "pipeline": ("first",), "first": first, "second": second}
    run_pipeline(ml_collections.ConfigDict(config), tmp_path / "run")
    today = json.loads((tmp_path / "run" / "run.json").read_text())["date"]
    settings = json.loads((tmp_path / "run" / "first" / "settings.json").read_text())
    assert settings["model"]["chat_template"] == str(template)
    template.unlink()

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.fromisoformat(today) + datetime.timedelta(days=1)

    monkeypatch.setattr(datetime, "datetime", Tomorrow)
    opened = checkpoint.open_model(checkpoint.ModelSource(str(tmp_path / "run/first")))
    assert opened.tokenizer.chat.source == DATED
    assert opened.tokenizer.variables == {"x": 1}
    config["pipeline"] = ("first", "second")
    # The first stage is complete with the same settings; the second has the same date.
    run_pipeline(ml_collections.ConfigDict(config), tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "second" / "settings.json").read_text())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["date"] == today
    # The sections do not name the date.
    assert settings["model"]["date"] == today


def test_the_date_of_the_run_is_that_of_prompts() -> None:
    source = checkpoint.ModelSource("embedded", date="2024-07-26T10:00:00+02:00")
    tokenizer = checkpoint.open_model(source).tokenizer
    assert tokenizer.chat is not None
    dated = checkpoint.load_tokenizer("embedded", date=source.date)
    assert dated.render([{"role": "user", "content": "q"}]).startswith("<|user|>q")


# Orbax abandons the other reads of a step when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["cut", "emptied", "largest", "params"])
def test_the_newest_whole_checkpoint_is_used(
    how: str,
    tmp_path: Path,
    mesh: Mesh,
    text_model: Transformer,
    teacher_params: Params,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint.describe(tmp_path, text_model, tokenizer)
    other = jax.tree.map(lambda x: 2 * x, teacher_params)
    with checkpoint.open_manager(tmp_path, keep=3) as manager:
        for step, params in ((1, teacher_params), (2, other), (3, other)):
            checkpoint.save(manager, step, {"params": params}, {"step": step})
    damage(tmp_path / "checkpoints" / "3", how)
    damage(tmp_path / "checkpoints" / "2", how)
    source = checkpoint.ModelSource(str(tmp_path))
    loaded = checkpoint.load(source, mesh, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, teacher_params)
    assert caplog.text.count("an older one is used") == 2
    with checkpoint.open_manager(tmp_path, keep=3) as manager:
        data: dict[str, int] = {}
        items = manager, {"params": other}, data.update
        step, trees = checkpoint.restore_latest(*items)
        assert (step, data) == (1, {"step": 1})
        jax.tree.map(np.testing.assert_array_equal, trees["params"], teacher_params)
        # The run gets to the damaged steps again.
        checkpoint.save(manager, 2, {"params": other}, {"step": 2})
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [1, 2]
        kept = tmp_path.glob("damaged_checkpoint_*/*")
        assert sorted(folder.name for folder in kept) == ["2", "3"]
    damage(tmp_path / "checkpoints" / "1", how)
    damage(tmp_path / "checkpoints" / "2", how)
    with pytest.raises(UserError, match="checkpoints/1 cannot be read .*; remove its"):
        checkpoint.load(source, mesh, jax.random.key(0))
    gc.collect()


def damage(folder: Path, how: str) -> None:
    """What a full disk, a killed process or a hand may do to a checkpoint."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    files.sort(key=lambda file: file.stat().st_size)
    assert len(files) > 3
    if how == "cut":
        for file in files:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    elif how == "emptied":
        for file in files:
            file.write_bytes(b"")
    elif how == "largest":
        files[-1].unlink()
    else:
        shutil.rmtree(folder / "params")


def test_a_setting_may_be_infinite(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    values = section("sft")
    values["sft"]["steps"] = 1
    values["optimizer"]["clip_norm"] = float("inf")
    folder = run_stage(values, tmp_path / "run")
    (folder / "done.json").unlink()
    assert (run_stage(values, tmp_path / "run") / "done.json").is_file()


def test_questions_are_told_apart_by_their_history(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    file = tmp_path / "data.jsonl"
    rows = [
        {
            "prompt": [
                {"role": "user", "content": f"{n}+{n}?"},
                {"role": "assistant", "content": str(2 * n)},
                {"role": "user", "content": "Explain."},
            ],
            "solution": str(2 * n),
            "reasoning_trace": f"{n}+{n}={2 * n}",
        }
        for n in range(1, 5)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = section("sft")
    values["data"] = {"task": "file", "path": str(file)}
    values["sft"] |= {"steps": 1, "traces_per_question": 1}
    done = json.loads((run_stage(values, tmp_path / "run") / "done.json").read_text())
    assert done["summary"]["traces"]["data"]["used"] == 4
