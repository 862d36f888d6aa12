"""The command line as a user types it, and what bad input ends in."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
QUICKSTART = "configs/quickstart.py"
# The quickstart in seconds: everything happens, nothing is learned.
SHRUNK = {
    "warmup.data.size": 32,
    "warmup.sft.steps": 30,  # enough to end explanations; cut-off ones are not learned
    "rl.data.size": 8,
    "rl.held_out.size": 4,
    "rl.loop.steps": 2,
    "rl.loop.batch_size": 2,
    "rl.loop.group_size": 2,
    **{
        f"collect_{teacher}.{key}": value
        for teacher in ("warmup", "rlt")
        for key, value in (("data.size", 4), ("collect.batch_size", 4))
    },
    **{f"distil_{traces}.sft.steps": 2 for traces in ("warmup", "rlt")},
    **{
        f"eval_{model}.{key}": value
        for model in ("base", "student_warmup", "student_rlt")
        for key, value in (("data.size", 4), ("evaluate.batch_size", 16))
    },
}
MODEL = {
    "architecture": {
        "embed_dim": 8,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "mlp_dim": 8,
        "max_length": 96,
    },
    "tokenizer": "embedded",
}
GOOD_ROW = {"question": "1+1?", "solution": "2", "reasoning_trace": "1+1=2"}


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m rlt_jax.main` with these arguments in the repository."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rlt_jax.main", *arguments],
            cwd=ROOT,
            env=os.environ | cache | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def assert_one_message(
    result: subprocess.CompletedProcess[str], *expected: str
) -> None:
    """The run failed, and all that it said of it is in the last line of stderr."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    for text in expected:
        assert text in result.stderr.splitlines()[-1]


def test_quickstart_from_the_command_line(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    overrides = [f"--config.{key}={value}" for key, value in SHRUNK.items()]
    workdir = tmp_path / "run"
    result = command(
        f"--config={QUICKSTART}", f"--workdir={workdir}", "--config.seed=3", *overrides
    )
    assert result.returncode == 0, result.stderr

    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    stages = {path.parent.name for path in workdir.glob("*/done.json")}
    assert summary["seed"] == 3
    assert summary["n_eval"] == 4
    assert set(summary["seconds"]) == stages - {"report"}
    assert summary["seconds_total"] == pytest.approx(sum(summary["seconds"].values()))
    assert summary["teacher_reward_warmup"] < 0
    assert summary["teacher_reward_rl"] < 0
    assert summary["teacher_reward_rl"] != summary["teacher_reward_warmup"]
    for model in ("base", "student_warmup_traces", "student_rlt_traces"):
        assert 0 <= summary[f"accuracy_{model}"] <= 1

    assert stages == {path.parent.name for path in workdir.glob("*/settings.json")}
    for name, lines in (
        ("warmup/metrics.jsonl", 30),
        ("rl/metrics.jsonl", 2),
        ("collect_warmup/traces.jsonl", 4),
        ("collect_rlt/traces.jsonl", 4),
        ("distil_warmup/metrics.jsonl", 2),
        ("distil_rlt/metrics.jsonl", 2),
        ("eval_base/samples.jsonl", 16),
        ("eval_student_warmup/samples.jsonl", 16),
        ("eval_student_rlt/samples.jsonl", 16),
    ):
        text = (workdir / name).read_text(encoding="utf-8")
        assert text.count("\n") == lines, name
    assert (workdir / "report" / "index.html").is_file()
    assert {"reward", "accuracy"} <= {p.stem for p in workdir.glob("report/*.png")}


def test_help_explains_itself(
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    text = command("--help").stdout
    example = f"python -m rlt_jax.main --config={QUICKSTART} --workdir=runs/quickstart"
    assert example in text
    assert "--config.seed=1" in text
    for flag in ("--config:", "--workdir:", "--only:"):
        assert flag in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.unknown=1"], ["KEY=VALUE", "config lacks: --config.unknown"]),
        (["--config.rl.loop.format=teacher"], ["loop.format is now called loop.role"]),
        (["--config.rl.students.combine=min"], ["KEY=VALUE"]),
        (["--config.rl.loop.stepz=1"], ["did you mean --config.rl.loop.steps?"]),
        (["--config.rl.loop.steps.x=1"], ["KEY=VALUE", "rl.loop.steps.x"]),
        (["--config=nowhere/config.py", "--config.seed=1"], ["No such file"]),
        (["--config=configs/rlt.py:nope"], ["--config: ", "'nope': one of own"]),
        ([f"--config={QUICKSTART}:nope"], ["--config: get_config() takes 0"]),
        (["--config.=1"], ["KEY=VALUE", "Could not parse ''"]),
        (["--stall_timeout=nan"], ["--stall_timeout=nan: give 0 or more"]),
        (["--workdir=README.md/x"], ["--workdir=README.md/x: name a folder"]),
    ],
)
def test_flags_that_do_not_fit_the_config(
    arguments: list[str],
    expected: list[str],
    command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    workdir = tmp_path / "run"
    result = command(f"--config={QUICKSTART}", f"--workdir={workdir}", *arguments)
    assert_one_message(result, "rlt_jax: ", *expected)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([f"--config={QUICKSTART}"], "--workdir must have a value"),
        (["--workdir=run"], "--config must have a value"),
    ],
)
def test_flags_that_are_missing(
    arguments: list[str],
    expected: str,
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = command(*arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert expected in result.stderr


def test_an_error_in_the_config_file_keeps_its_traceback(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    config = tmp_path / "config.py"
    config.write_text("def get_config():\n    return {}.nothing\n", encoding="utf-8")
    result = command(f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 1
    assert "return {}.nothing" in result.stderr


def test_bad_data_from_the_command_line(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    config, data = tmp_path / "config.py", tmp_path / "data.jsonl"
    values = {"seed": 0, **sft_section(data)}
    config.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({values!r})\n",
        encoding="utf-8",
    )
    data.write_text(json.dumps(GOOD_ROW) + '\n{"question": \n', encoding="utf-8")
    result = command(f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert_one_message(result, f"rlt_jax: {data}, line 2: not valid JSON")


def sft_section(data: Path) -> dict[str, Any]:
    return {
        "stage": "sft",
        "model": MODEL,
        "template": "tiny",
        "data": {"task": "file", "path": str(data)},
        "held_out": None,
        "sft": {"role": "student", "steps": 1, "batch_size": 1, "row_length": 96},
        "lora": {},
        "optimizer": {"learning_rate": 1e-3},
        "mesh": {},
    }
