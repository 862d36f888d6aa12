"""The command line as a user types it, and what bad input ends in."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from rlt_jax import command_line, stages
from rlt_jax.errors import UserError
from tests.conftest import heeding_ctrl_c

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
        (["--config.rl.loop.format=teacher"], ["did you mean --config.rl.loop.role?"]),
        (["--config.rl.students.combine=min"], ["KEY=VALUE"]),
        (["--config.rl.loop.stepz=1"], ["did you mean --config.rl.loop.steps?"]),
        (["--config.rl.loop.steps.x=1"], ["KEY=VALUE", "rl.loop.steps.x"]),
        (["--config=nowhere/config.py", "--config.seed=1"], ["No such file"]),
        (
            ["--config=configs/rlt.py:nope"],
            ["--config=configs/rlt.py:nope: ", "one of own"],
        ),
        (
            [f"--config={QUICKSTART}:nope"],
            [f"{QUICKSTART}:nope: TypeError: get_config() t"],
        ),
        (
            ["--config.rl.students[9].path=x"],
            ["--config.rl.students[9].path (entries of"],
        ),
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


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("", "lacks: --config. (part, seed)"),
        ("x", "lacks: --config.x (part, seed)"),
        (
            "part.students[2].path",
            "--config.part.students[2].path (entries of part.stude",
        ),
        (
            "part.students[-3].path",
            "--config.part.students[-3].path (entries of part.st",
        ),
        (
            "part.students[x].path",
            "part.students[x].path (entries of part.students: 2)",
        ),
        ("part.students[].path", "part.students[].path (entries of part.students: 2)"),
        (
            "part.students[-1].pathh",
            "students[-1].pathh ('\\'pathh\\' Did you mean \"path\"",
        ),
        ("part.students.path", "lacks: --config.part.students.path"),
        ("part.steps[0]", "--config.part.steps[0] (entries of part.steps: 0)"),
        ("part.steps.x", "lacks: --config.part.steps.x"),
        (
            "part.pair[0]",
            "does not fit the config: --config.part.pair[0] (0 is not a valid",
        ),
        ("a b", "lacks: --config.a b (part, seed)"),
    ],
)
def test_overrides_that_do_not_fit(key: str, expected: str) -> None:
    students = tuple(ml_collections.ConfigDict({"path": name}) for name in "ab")
    part = {"students": students, "steps": 1, "pair": (1, 2)}
    config = ml_collections.ConfigDict({"seed": 0, "part": part}).lock()
    given, values = ["main", f"--config.{key}=1"], flags.FlagValues()
    with pytest.raises((AttributeError, LookupError, TypeError, ValueError)) as error:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=given
        )
        values(given)
    assert expected in stages.explain_override(config, given, error.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("", "the file has no function get_config()"),
        ("get_config = 3", "the file has no function get_config()"),
        ("def get_config(): pass", "get_config() returns None, no ConfigDict"),
        (
            "def get_config(): return {'a': 1}",
            "get_config() returns {'a': 1}, no Config",
        ),
        (
            "def get_config():\n  c = ConfigDict()\n  c.me = c\n  return c",
            "ValueError: Circular reference detected",
        ),
        (
            "def get_config(): return ConfigDict({'a': 1, 2: 3})",
            "TypeError: '<' not supported",
        ),
        (
            "def get_config():\n  return {}.nothing",
            "AttributeError: 'dict' object has no attribute 'nothing' ({file}:3)",
        ),
        (
            "import json\ndef get_config(): json.loads('{')",
            "JSONDecodeError: Expecting property name enclosed in double quotes",
        ),
        ("def get_config(): open('/nowhere/x')", "'/nowhere/x' ({file}:2)"),
        ("def get_config(): get_config()", "RecursionError: maximum recursion depth"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere' ({file}:2)"),
        ("def get_config(:", "SyntaxError: invalid syntax (config.py, line 2)"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines ({file}:2)"),
    ],
)
def test_a_config_file_with_a_fault_is_one_message(
    body: str, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.py"
    file.write_text(f"from ml_collections import ConfigDict\n{body}\n")
    with pytest.raises(UserError) as error:
        command_line._ConfigFile().parse(str(file))
    assert expected.replace("{file}", str(file)) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_of_a_config_file_from_the_command_line(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    config = tmp_path / "config.py"
    config.write_text("def get_config():\n    return {}.nothing\n", encoding="utf-8")
    result = command(f"--config={config}", f"--workdir={tmp_path / 'run'}")
    what = "AttributeError: 'dict' object has no attribute 'nothing'"
    assert_one_message(result, f"rlt_jax: --config={config}: {what} ({config}:2)")


@pytest.mark.parametrize("name", ["a" * 300, "a\0", "", ".hidden", "a/b"])
def test_the_name_of_a_stage_is_one_of_a_folder(name: str) -> None:
    config = ml_collections.ConfigDict({"seed": 0, "pipeline": (name,)})
    with pytest.raises(UserError, match="^a name in config.pipeline=.*: 1-60 letters"):
        stages.stage_sections(config)


@pytest.mark.parametrize("url", ["file:///tmp/x", "https://host/x", "hf://me/x"])
def test_a_url_where_no_run_can_work(url: str) -> None:
    with pytest.raises(
        UserError, match=f"^--workdir={url}: this run cannot work there"
    ):
        stages._check_workdir(url)


# A signal comes while JAX is imported, or to one that ignores it.
STARTS = """
import importlib.abc, os, signal, sys
class Signals(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "jax":
            os.kill(os.getpid(), int(number))
_, number, ignores, *arguments = sys.argv
if ignores:
    signal.signal(int(number), signal.SIG_IGN)
sys.meta_path.insert(0, Signals())
sys.argv = ["rlt_jax", *arguments]
from rlt_jax.main import cli
cli()
"""


def started(number: int, ignores: str, *arguments: str) -> tuple[int, str]:
    """Exit status and messages."""
    with heeding_ctrl_c():
        done = subprocess.run(
            [sys.executable, "-c", STARTS, str(number), ignores, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "arguments",
    [["chat", "--model=embedded"], [f"--config={QUICKSTART}", "--workdir=nowhere"]],
)
def test_a_signal_during_the_imports(number: int, arguments: list[str]) -> None:
    stopped = "rlt_jax: stopped before anything began.\n"
    assert started(number, "", *arguments) == (128 + number, stopped)


def test_a_signal_that_is_ignored_changes_nothing() -> None:
    assert started(signal.SIGHUP, "ignores", "chat", "--model=embedded") == (0, "")


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"]])
def test_help_for_a_reader_that_has_gone(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "rlt_jax.main", *arguments]
    with os.fdopen(write, "w") as stdout:
        streams = {"stdout": stdout, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, cwd=ROOT, check=False, **streams)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_help_of_the_console_script() -> None:
    script = (
        "import sys; from rlt_jax.main import cli; sys.argv = ['x', '--help']; cli()"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert "Trains reinforcement-learned teachers" in done.stdout
    assert "--workdir:" in done.stdout


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
