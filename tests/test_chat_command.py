"""`rlt_jax chat`: what is typed, what is printed, and what bad input ends in."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import rlt_jax
from rlt_jax import chat
from rlt_jax.chat import Chat
from rlt_jax.data.templates import Template
from rlt_jax.data.token_bytes import TokenBytes
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.inference.engine import Engine
from rlt_jax.models.transformer import Transformer
from rlt_jax.records import Problem
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig
from rlt_jax.scoring import ScoringConfig
from rlt_jax.training import checkpoint
from rlt_jax.training.checkpoint import LoadedModel
from rlt_jax.types import Params, Rollout
from tests.conftest import heeding_ctrl_c

QUESTIONS = ["Start at 4: +3 *7. Last digit?", "Start at 2: *3 +9. Last digit?"]
PROBLEM = Problem(QUESTIONS[0], "9")
EXPLANATION = "4+3=7 7*7=9<|end_of_explanation|>"
STATISTICS = re.compile(r"\[(\d+) tokens, \d+\.\d tokens/s(, cut off)?\]")
REWARD = re.compile(
    r"reward (\S+): solution score (\S+), explanation KL (\S+) times (\S+), format (\S+)"
)


class Typed(io.StringIO):
    """Standard input."""

    def __init__(self, text: str, at_terminal: bool) -> None:
        super().__init__(text)
        self.isatty = lambda: at_terminal


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the command with flags and typed text; returns what it has printed."""

    def call(*arguments: str, typed: str = "", at_terminal: bool = False) -> str:
        monkeypatch.setattr(sys, "stdin", Typed(typed, at_terminal))
        chat.main(["chat", *arguments])
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(
    run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the command, which ends with status 1; returns its message."""

    def call(*arguments: str, **typed: str) -> str:
        with pytest.raises(SystemExit) as error:
            run(*arguments, **typed)
        assert error.value.code == 1
        message = capsys.readouterr().err
        assert message.startswith("rlt_jax: ")
        return message

    return call


@pytest.fixture(scope="module")
def teacher() -> Chat:
    return Chat(chat._parse(["chat", "--model=embedded", "--role=teacher"]))


def prompts(tokenizer: Tokenizer, template: Template) -> list[np.ndarray]:
    renderer = chat.Renderer(tokenizer, template, "student")
    return [renderer.prompt(Problem(text, ""))[1].ids for text in QUESTIONS]


def test_answers_are_those_of_generate(
    run: Callable[..., str], tokenizer: Tokenizer, tiny: Template
) -> None:
    printed = run(
        "--model=embedded",
        "--seed=5",
        "--max_new_tokens=12",
        "--temperature=2",
        typed="\n  \n".join(QUESTIONS),
    )
    rollout = rlt_jax.generate(
        *rlt_jax.load_model("embedded"),
        prompts(tokenizer, tiny),
        {"max_new_tokens": 12, "temperature": 2.0},
        seed=5,
        tokenizer=tokenizer,
    )
    answers = STATISTICS.split(printed)
    assert [text.strip("\n") for text in answers[0:-1:3]] == list(rollout.texts)
    assert answers[1::3] == [str(len(tokens)) for tokens in rollout.tokens]
    finished = [cut_off is None for cut_off in answers[2::3]]
    assert finished == rollout.finished.tolist()
    assert answers[-1] == "\n"


class Growing:
    """An engine whose completion grows by a token at a time."""

    def __init__(self, tokens: list[int], decode: Callable[[Any], str]) -> None:
        self.tokens, self.decode = tokens, decode

    def follow(self, *_: Any) -> Iterator[Rollout]:
        for n in range(1, len(self.tokens) + 1):
            tokens = self.tokens[:n]
            done = np.array([n == len(self.tokens)])
            yield Rollout([], [np.array(tokens)], [], done, [self.decode(tokens)])


# One byte a token, as in a tokenizer that spells rare characters so.
SPELLED = [b"a", b"\n", *(bytes([i]) for i in range(256))]


@pytest.mark.parametrize("whole_runs", [False, True])
@pytest.mark.parametrize(
    "data", ["aé€a\n😀".encode(), b"\xc3\xa9\xffa", b"\n\xe2\x82", b"a\xc3\xa9\xc3a"]
)
def test_characters_are_printed_once_they_are_complete(
    whole_runs: bool,
    data: bytes,
    teacher: Chat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spelled = TokenBytes(SPELLED, range(2, 258), whole_runs)
    tokens = [0 if byte == ord("a") else byte + 2 for byte in data]

    def decode(ids: Any) -> str:
        return spelled.decode(np.asarray(ids))[0]

    tokenizer = SimpleNamespace(pieces=SPELLED, decode=decode)
    loaded = teacher.loaded._replace(tokenizer=tokenizer)
    monkeypatch.setattr(teacher, "loaded", loaded)
    monkeypatch.setattr(teacher, "engine", lambda _: Growing(tokens, decode))
    parts = []
    monkeypatch.setattr("builtins.print", lambda text, **_: parts.append(text))
    assert teacher.answer(PROBLEM, 0) == decode(tokens)
    *parts, statistics = parts
    assert "".join(parts) == decode(tokens)
    assert not data.startswith(b"a") or parts[0] == "a"
    assert STATISTICS.fullmatch(statistics)


def test_a_teacher_is_scored_as_by_score_explanations(
    run: Callable[..., str],
    teacher: Chat,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat, "Chat", lambda options: teacher)
    printed = run("--model=embedded", typed=f"{PROBLEM.question}\n9\n")
    text, tokens, cut_off, rest = STATISTICS.split(printed)
    text = text.removesuffix("\n")
    model = (*teacher.loaded[:2], tokenizer)
    args = [PROBLEM._asdict()], [[text]], model, [model], "tiny"
    expected = rlt_jax.score_explanations(*args)[0][0]
    names = "solution_score", "explanation_kl", "format_penalty"
    numbers = [expected["reward"], *(expected["terms"][name] for name in names)]
    reward, solution_score, kl, weight, penalty = map(
        float, REWARD.fullmatch(rest.strip()).groups()
    )
    found = reward, solution_score, kl, penalty
    np.testing.assert_allclose(found, numbers, atol=6e-4)
    assert weight == 3
    assert len(text) > 0 and int(tokens) > 1 and cut_off in (None, ", cut off")


def test_tokens_have_colors_on_a_terminal(
    teacher: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def judged(at_terminal: bool, no_color: str) -> str:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: at_terminal)
        monkeypatch.setenv("NO_COLOR", no_color)
        teacher.judge(PROBLEM, EXPLANATION)
        return capsys.readouterr().out

    plain = judged(False, "")
    assert "\x1b" not in plain and plain.count("\n") == 1
    assert judged(True, "1") == plain
    result, scale, explanation, solution = judged(True, "").splitlines()
    assert f"{result}\n" == plain
    assert "-0.25" in scale and "\x1b[48;5;" in scale
    for line, text in ((explanation, "4+3=7 7*7=9"), (solution, "9")):
        assert re.sub(r"\x1b\[[\d;]*m", "", line) == text
        assert line.count("\x1b[0m") == line.count("\x1b[48;5;")
    assert "\x1b[48;5;" in explanation


def test_colors_follow_sign_and_size() -> None:
    assert chat.colored("x", 0.03) == "x"
    shades = [chat.colored("x", nats) for nats in (0.05, 1.0, 4.0, 40.0)]
    assert len(set(shades)) == 3 and shades[-1] == shades[-2]
    assert f";{chat.REDS[-1]};" in shades[-1]
    assert f";{chat.BLUES[-1]};" in chat.colored("x", -4.0)
    assert chat.colored("a\n\nb", 4.0).split("\n\n")[0].endswith("\x1b[0m")


@pytest.fixture
def workdir(
    tmp_path: Path,
    text_model: Transformer,
    teacher_params: Params,
    tokenizer: Tokenizer,
) -> Path:
    """A run with a teacher of RL, a student without checkpoint, and traces."""
    loaded = LoadedModel(text_model, teacher_params, tokenizer)
    checkpoint.save_model(tmp_path / "rl", 1, loaded, teacher_params)
    checkpoint.describe(tmp_path / "distil", text_model, tokenizer)
    (tmp_path / "collect").mkdir()
    settings = {
        "rl": {
            "policy": {"path": "gone", "dtype": "float32", "date": ""},
            "students": [{"path": "embedded"}],
            "ensemble": {"combine": "min", "weights": []},
            "template": "tiny",
            "loop": {"role": "teacher"},
            "sampling": {"max_new_tokens": 9, "temperature": 0.9, "top_k": 4},
            "rlt_reward": {"explanation_kl_coef": 0.5, "format_penalty": -2.0},
        },
        "distil": {
            "model": {"path": "gone", "dtype": "float32"},
            "template": "tiny",
            "sft": {"role": "student"},
        },
    }
    for name, values in settings.items():
        file = tmp_path / name / "settings.json"
        file.write_text(json.dumps(values), encoding="utf-8")
    return tmp_path


def test_a_stage_brings_its_settings(
    workdir: Path,
    run: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    text_model: Transformer,
    teacher_params: Params,
    tokenizer: Tokenizer,
    tiny: Template,
) -> None:
    terms = dict.fromkeys(("solution_score", "explanation_kl", "format_penalty"), 1.0)
    given: list[Any] = []

    def make_scorer(models: Any, renderers: Any, *settings: Any) -> Callable[..., Any]:
        given.extend([models, settings[0]])
        return lambda *_, per_token: [{"reward": 1.0, "terms": terms}]

    monkeypatch.setattr(chat.scoring, "make_scorer", make_scorer)
    printed = run(
        f"--workdir={workdir}",
        "--model=rl",
        "--max_new_tokens=7",
        typed=f"{PROBLEM.question}\n{PROBLEM.solution}\n",
    )
    renderer = chat.Renderer(tokenizer, tiny, "teacher")
    sampling = {"max_new_tokens": 7, "temperature": 0.9, "top_k": 4}
    (text,) = rlt_jax.generate(
        text_model,
        teacher_params,
        [renderer.prompt(PROBLEM)[1].ids],
        sampling | {"stop": tiny.explanation_tags[1:]},
        tokenizer=tokenizer,
    ).texts
    assert printed.startswith(f"{text}\n[7 tokens")
    assert "KL 1.000 times 0.5" in printed
    (_, student), config = given
    assert student.model.config.num_layers == 4
    assert config == ScoringConfig(
        RLTRewardConfig(explanation_kl_coef=0.5, format_penalty=-2.0),
        EnsembleConfig("min", []),
        teacher_temperature=0.9,
    )


def test_a_stage_of_a_run_in_an_object_store(
    workdir: Path,
    run: Callable[..., str],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url, typed = "memory://bucket/run", f"{PROBLEM.question}\n{PROBLEM.solution}\n"
    file = workdir / "rl" / "settings.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    # The paths of settings are so in a store.
    settings["students"] = [{"path": "{workdir}/rl"}]
    file.write_text(json.dumps(settings), encoding="utf-8")
    store = MemoryFileSystem()
    store.put(f"{workdir}/rl", "/bucket/run/rl", recursive=True)
    printed = run(f"--workdir={url}", "--model=rl", "--max_new_tokens=7", typed=typed)
    settings["students"] = [{"path": f"{workdir}/rl"}]
    file.write_text(json.dumps(settings), encoding="utf-8")
    flags = f"--workdir={workdir}", "--model=rl", "--max_new_tokens=7"
    speed = r"[\d.]+ tokens/s"
    assert re.sub(speed, "", run(*flags, typed=typed)) == re.sub(speed, "", printed)
    assert "not in the store" in refused(f"--workdir={url}", "--model=x", typed=typed)
    store.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rol=teacher"], "Unknown command line flag 'rol'. Did you mean: role"),
        (["--model=embedded", "question"], "chat: give flags"),
        ([], "--model=MODEL at least"),
        (["--model=embedded", "--dtype=int8"], "float32|bfloat16"),
        (["--model=embedded", "--role=judge"], "teacher|student"),
        (
            ["--model=embedded", "--temperature=-1"],
            "temperature=-1.0: 0, or 0.001 to 1000",
        ),
        (["--model=embedded", "--template=none"], "template 'none'"),
        (["--model={}/nowhere"], "nowhere': there is neither"),
        (
            ["--model=embedded", f"--seed={2**63}"],
            "--seed=9223372036854775808: at least 0",
        ),
        (["--workdir={}", "--model=warmup"], "no such stage; {} has distil, rl."),
        (["--workdir={}/none", "--model=rl"], "has no model."),
        (["--workdir={}", "--model=collect"], "neither a config.json"),
        (["--workdir={}", "--model=distil"], "has no checkpoint yet"),
        (["--workdir={}", "--model=rl", "--role=student"], "rl is a teacher's stage"),
        (["--model={}/distil", "--role=teacher"], "distil is a student's stage"),
        (["--model=embedded", "--students=nope"], "--students has no effect: embedded"),
        (
            ["--model=embedded", "--students=,"],
            "--students has no effect: embedded is a",
        ),
        (["--model={}/distil", "--students=embedded"], "distil is a student."),
        (
            ["--model=embedded", "--role=teacher", "--students=,"],
            "--students: name one or more models",
        ),
        (
            ["--model=embedded", "--role=teacher", "--students="],
            "--students: name one or more models",
        ),
    ],
)
def test_bad_flags_are_one_message(
    arguments: list[str], expected: str, workdir: Path, refused: Callable[..., str]
) -> None:
    arguments = [argument.format(workdir) for argument in arguments]
    assert expected.format(workdir) in refused(*arguments, typed="1+1?\n")


@pytest.mark.parametrize(
    ("stage", "key", "value", "expected"),
    [
        ("distil", "model", [1], "settings.json: model=[1]: keys and values."),
        ("distil", "sft", "x", "settings.json: sft='x': keys and values."),
        (
            "distil",
            "sft",
            {"role": 5},
            "distil: role=5: a text, one of teacher, student.",
        ),
        ("rl", "policy", "x", "settings.json: policy='x': keys and values."),
        ("rl", "loop", 3, "settings.json: loop=3: keys and values."),
        ("rl", "sampling", [1], "settings.json: sampling=[1]: keys and values."),
        (
            "rl",
            "sampling",
            {"temperature": "x", "max_new_tokens": 3},
            "settings.json: sampling: temperature='x': a number",
        ),
        ("rl", "rlt_reward", [1], "settings.json: rlt_reward=[1]: keys and values."),
        ("rl", "ensemble", "min", "settings.json: ensemble='min': keys and values."),
        (
            "rl",
            "students",
            [1],
            "settings.json: students=[1]: a list, each keys and val",
        ),
        (
            "rl",
            "students",
            "ab",
            "settings.json: students='ab': a list.",
        ),
        ("rl", "template", 5, "settings.json: template=5: a text."),
    ],
)
def test_damaged_settings_of_a_stage_are_one_message(
    stage: str,
    key: str,
    value: Any,
    expected: str,
    workdir: Path,
    refused: Callable[..., str],
) -> None:
    file = workdir / stage / "settings.json"
    values = json.loads(file.read_text(encoding="utf-8")) | {key: value}
    file.write_text(json.dumps(values), encoding="utf-8")
    message = refused(f"--workdir={workdir}", f"--model={stage}", typed="1+1?\n2\n")
    assert message.count("\n") == 1
    assert expected in message and str(workdir / stage) in message


def test_control_characters_are_escaped(
    teacher: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harmful = "a\x1b]0;title\x07\r\x9b2J\tb\nc\x7f é"
    shown = "a\\x1b]0;title\\x07\\r\\x9b2J\tb\nc\\x7f é"
    texts = [harmful[:n] for n in range(1, len(harmful) + 1)]

    def follow(*_: Any) -> Iterator[Rollout]:
        for text in texts:
            yield Rollout([], [np.arange(len(text))], [], np.array([True]), [text])

    def decode(tokens: Any) -> str:
        return harmful[: len(tokens)]

    tokenizer = SimpleNamespace(pieces=[], decode=decode)
    loaded = teacher.loaded._replace(tokenizer=tokenizer)
    monkeypatch.setattr(teacher, "loaded", loaded)
    engine = SimpleNamespace(follow=follow)
    monkeypatch.setattr(teacher, "engine", lambda _: engine)
    assert teacher.answer(PROBLEM, 0) == harmful
    assert capsys.readouterr().out.startswith(f"{shown}\n[")
    assert chat.colored("\x1b[2J", 0.0) == "\\x1b[2J"
    assert "38;5;16m\\x1b[2J\x1b[0m" in chat.colored("\x1b[2J", 4.0)


def test_a_teacher_needs_a_solution(refused: Callable[..., str]) -> None:
    message = refused("--model=embedded", "--role=teacher", typed="1+1?\n\n")
    assert "no solution follows '1+1?'" in message


def test_what_is_typed_has_to_be_utf8(refused: Callable[..., str]) -> None:
    message = refused("--model=embedded", typed="ab\udcff\n")
    assert "the question is not UTF-8: " in message


def test_help_lists_the_flags(run: Callable[..., str]) -> None:
    text = run("--help")
    assert "rlt_jax chat --workdir=runs/quickstart --model=rl" in text
    for name in ("model", "workdir", "role", "template", "students", "temperature"):
        assert f"--{name}:" in text


def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that reach the model from now on; the first is interrupted."""
    questions = []

    def follow(_: Engine, params: Params, request: Any, key: Any) -> Iterator[Rollout]:
        questions.append((request.request_id, request.problem.question))
        if len(questions) == 1:
            raise KeyboardInterrupt
        yield Rollout([], [np.array([5])], [], np.array([True]), ["fine"])

    monkeypatch.setattr(Engine, "follow", follow)
    return questions


def test_what_can_be_typed(
    run: Callable[..., str],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions = asked(monkeypatch)
    typed = "1+1?\n\n two \\\nlines\n"
    printed = run("--model=embedded", typed=typed, at_terminal=True)
    assert questions == [(0, "1+1?"), (1, "two \nlines")]
    assert printed.startswith("embedded as a student:")
    _, interrupted, empty, continued, end = printed.split("question> ")
    assert interrupted == "\n[stopped]\n"
    assert not empty
    assert continued.startswith("... fine\n[1 tokens")
    assert end == "\n"
    questions.clear()
    long = "1+" * 200
    printed = run("--model=embedded", typed=f"{long}\n1+1?\n", at_terminal=True)
    assert "question> rlt_jax: the prompt has" in printed
    assert questions == [(1, "1+1?")]
    message = refused("--model=embedded", typed=f"{long}\n1+1?\n")
    assert re.match("rlt_jax: the prompt has 4[0-9][0-9] tokens", message)
    questions.clear()
    run("--model=embedded", typed=":quit\n1+1?\n", at_terminal=True)
    assert not questions


def test_a_real_terminal() -> None:
    main, side = pty.openpty()
    command = [sys.executable, "-m", "rlt_jax.main", "chat", "--model=embedded"]
    files = {"stdin": side, "stdout": side, "stderr": side}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TERM": "dumb"}
    with heeding_ctrl_c():
        process = subprocess.Popen(
            command, **files, env=environment, cwd=Path(__file__).parents[1]
        )
    os.close(side)
    printed = ""

    def wait_for(text: str, seconds: float = 60) -> None:
        nonlocal printed
        end = time.monotonic() + seconds
        while text not in printed and time.monotonic() < end:
            if select.select([main], [], [], 0.2)[0]:
                printed += os.read(main, 4096).decode()
        assert text in printed, printed
        printed = printed.partition(text)[2]

    try:
        wait_for("question> ")
        os.write(main, f"{QUESTIONS[0]}\n".encode())
        wait_for("tokens/s]")
        wait_for("question> ")
        for _ in range(5):  # Python's readline can miss a signal after the prompt
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break
        assert process.wait(60) == 130
        while select.select([main], [], [], 0)[0]:
            try:
                printed += os.read(main, 4096).decode()
            except OSError:  # Linux: the other side is closed and all is read
                break
        assert "Traceback" not in printed
    finally:
        process.kill()
        process.wait()
        os.close(main)
