"""configs/rlt.py as a user types it, with a tiny model: own questions, and GSM8K."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.convert import write_model
from rlt_jax.models.transformer import Transformer
from rlt_jax.settings import resolve
from rlt_jax.stages import run_pipeline, stage_sections
from tests.conftest import random_params

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "rlt.py"
EMBEDDED = ROOT / "rlt_jax" / "models" / "assets" / "embedded"
DEEPSEEK = Path("data", "tokenizers", "deepseek_r1")
SHORT = {
    "template": "tiny",
    "steps": 1,
    "batch_size": 2,
    "group_size": 2,
    "max_new_tokens": 8,
    "row_length": 256,
    "device": "cpu",
}


def write_tiny(folder: Path, tokenizer: Path, vocab_size: int) -> str:
    """A model in Hugging Face layout with random weights."""
    shape = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    config = ModelConfig(
        vocab_size=vocab_size, head_dim=8, mlp_dim=16, max_length=4096, **shape
    )
    params = random_params(Transformer(config), 0)
    write_model(folder, config, params, "llama", tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny", EMBEDDED, 512)


def write_rows(file: Path, **columns: str) -> str:
    rows = [
        {name: text.format(n=n, m=n + 1) for name, text in columns.items()}
        for n in range(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def recipe(variant: str = "own", **values: Any) -> ml_collections.ConfigDict:
    config = runpy.run_path(str(CONFIG))["get_config"](variant)
    config.update(values)
    return config


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_the_command_line_on_questions_with_solutions(
    model: str, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "mine.jsonl", question="{n}+1?", solution="It is {m}.")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rlt_jax.main", "--config=configs/rlt.py"),
            *(f"--config.model={model}", f"--config.data={data}"),
            f"--workdir={tmp_path / 'run'}",
            *(f"--config.{key}={value}" for key, value in SHORT.items()),
            "--config.export=True",
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    # No solution shows its working, so there is nothing to warm up on.
    stages = {path.parent.name for path in run.glob("*/done.json")}
    assert stages == {
        *("eval_base", "rl", "collect", "distil", "eval_student", "report"),
        *("export_student", "export_teacher"),
    }
    trained = {row["question"] for row in read_rows(run / "collect" / "traces.jsonl")}
    held_out = read_rows(run / "eval_student" / "samples.jsonl")
    assert len(trained) == 18
    assert len(held_out) == 2
    assert not trained & {row["question"] for row in held_out}
    # The number at the end of a solution is the answer that is graded.
    assert all(f"It is {row['answer']}." == row["solution"] for row in held_out)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["solution_log_prob_student"] < 0
    assert summary["solution_log_prob_without_thought_base"] < 0
    quantities = [row["quantity"] for row in summary["comparisons"]]
    assert quantities[0] == "accuracy"
    assert len(quantities) == 3
    assert (run / "export_student" / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("variant", "device", "task"),
    [
        ("own", "auto", "file"),
        ("on_policy", "auto", "file"),
        ("v5e:2x4", "v5e-8", "file"),
        ("gsm8k:v6e:1x1", "v6e-1", "gsm8k"),
    ],
)
def test_variants_and_slices(variant: str, device: str, task: str) -> None:
    config = recipe(variant)
    assert (config.device, config.task) == (device, task)


@pytest.mark.parametrize("variant", ["mine", "mine:v5e:1x1"])
def test_an_unknown_variant_is_refused(variant: str) -> None:
    with pytest.raises(UserError, match="mine"):
        recipe(variant)


@pytest.mark.parametrize(
    ("columns", "warmed_up"),
    [
        ({"solution": "{n}"}, False),
        ({"solution": "{n}", "reasoning_trace": "1+{n}={m}"}, True),
        ({"solution": "one step after the other " * 4}, True),
        ({"solution": "先算第一步，再算第二步。" * 7}, True),
    ],
)
def test_what_there_is_to_warm_up_on(
    columns: dict[str, str],
    warmed_up: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_rows(tmp_path / "mine.jsonl", question="{n}+1?", **columns)
    config = recipe(model="embedded", data=data)
    resolve(config)
    assert ("warmup" in config.pipeline) == warmed_up
    assert config.distil.data.keep_cut_off != warmed_up
    assert ("no teacher is warmed up" in caplog.text) != warmed_up


@pytest.mark.slow
def test_traces_warm_the_teacher_up(model: str, tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "mine.jsonl",
        question="Say {n}?",
        solution="word {n} and no number",
        reasoning_trace="one " * 20,
    )
    config = recipe("on_policy", model=model, data=data, **SHORT)
    config.distil.data.keep_cut_off = True
    run_pipeline(config, tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "rl" / "settings.json").read_text())
    assert settings["policy"]["path"] == str(tmp_path / "run" / "warmup")
    done = json.loads((tmp_path / "run" / "warmup" / "done.json").read_text())
    assert done["summary"]["traces"]["data"]["used"] == 18
    # What the teacher says of attempts needs no answers.
    rows = read_rows(tmp_path / "run" / "taught" / "metrics.jsonl")
    assert all("policy/divergence" in row for row in rows)
    # Nothing can be graded: the log-probability is all there is.
    results = json.loads((tmp_path / "run" / "eval_base" / "results.json").read_text())
    assert results["accuracy"] is None
    assert results["num_graded"] == 0
    assert results["solution_log_prob"] < 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {row["quantity"] for row in summary["comparisons"]} == {
        "solution_log_prob",
        "solution_log_prob_without_thought",
    }


@pytest.mark.slow
def test_gsm8k_compares_all_students(shared: Path, tmp_path: Path) -> None:
    tokenizer = shared / DEEPSEEK
    model = write_tiny(tmp_path / "tiny", tokenizer, 128_815)
    gsm8k = shared / "data" / "gsm8k"
    top = SHORT | {"row_length": 512, "template": "short"}
    top |= {"model": model, "data": f"{gsm8k}/train.jsonl"}
    top |= {"on_policy": True, "test_data": f"{gsm8k}/test.jsonl"}
    config = recipe("smollm2_cpu", **top)
    for stage in config.values():
        if isinstance(stage, ml_collections.ConfigDict) and "data" in stage:
            if stage.data.task == "gsm8k":
                stage.data.limit = 4
            else:
                stage.data.keep_cut_off = True
            if "held_out" in stage and stage.held_out:
                stage.held_out.limit = 1
            if "sft" in stage:
                stage.sft.epochs = 0.1
    # An untrained solver has no right answers to learn from.
    left_out = ("solve", "distil_solved", "eval_solved")
    names = tuple(name for name in stage_sections(config) if name not in left_out)
    config.pipeline = names
    run_pipeline(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    labels = {row["with"] for row in summary["comparisons"]}
    assert labels == {"base", "worked", "warmup", "solver", "taught"}
    traces = read_rows(tmp_path / "run" / "collect" / "traces.jsonl")
    assert traces[0]["question"].startswith("Natalia sold clips to 48 of her friends")


def test_settings_follow_from_the_top(model: str) -> None:
    config = recipe(model=model, data="d", device="v5e-8", lora_rank=8, students=("s",))
    config.task, config.on_policy = "gsm8k", True
    config.rl.sampling.max_new_tokens = 77
    sections = {name: x.to_dict() for name, x in stage_sections(config).items()}
    rl = sections["rl"]
    assert rl["rows"] == {"micro_batch_size": 8, "row_length": 2048}
    assert rl["lora"]["rank"] == 8
    assert rl["optimizer"]["learning_rate"] == pytest.approx(1e-5)
    assert rl["policy"]["param_dtype"] == rl["policy"]["dtype"] == "bfloat16"
    assert rl["loop"]["offload"]
    assert rl["sampling"]["max_new_tokens"] == 77
    assert sections["collect"]["sampling"]["max_new_tokens"] == 512
    assert [student["path"] for student in rl["students"]] == ["s"]
    assert sections["distil"]["model"]["path"] == "s"
    assert sections["warmup"]["model"]["path"] == model
    # The student has another vocabulary, perhaps.
    assert sections["taught"]["teaching"]["kind"] == "advantage"
    assert sections["taught"]["policy"]["param_dtype"] == "bfloat16"
    config.lora_rank = 0
    (policy,) = (stage_sections(config)["rl"].policy,)
    assert policy.param_dtype == "float32"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "config.model is empty: name a model"),
        ({"model": "m"}, "config.data is empty"),
        ({"model": "m", "data": "/none/q.jsonl"}, "no such file"),
        ({"model": "m", "data": "", "device": "b200"}, "config.data is empty"),
    ],
)
def test_what_is_missing_is_named(values: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stage_sections(recipe(**values))


def test_devices_have_presets() -> None:
    module = runpy.run_path(str(CONFIG))
    find_device, presets = module["find_device"], module["DEVICES"]
    assert find_device("h100") == (presets["h100"], 1)
    assert find_device("v5e-8") == (presets["v5e"], 8)
    assert find_device("a100-40") == (presets["a100-40"], 1)
    assert find_device("a100-40-4") == (presets["a100-40"], 4)
    preset, count = find_device("auto")
    assert preset == presets["cpu"]
    assert count >= 1
    for name in ("b200", "h100-0", "h100-x", ""):
        with pytest.raises(UserError, match="choose one of cpu, t4"):
            find_device(name)
