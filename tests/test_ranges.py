"""Every setting says its range, and nonsense ends in one message before anything loads."""

import dataclasses
import functools
import importlib
import inspect
import json
import math
import os
import pkgutil
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import hypothesis
import ml_collections
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import strategies

import rlt_jax
from rlt_jax.data import pipeline
from rlt_jax.data.tasks.arithmetic import ProblemConfig, TraceConfig
from rlt_jax.data.tasks.reasoning_gym import PuzzleConfig
from rlt_jax.data.templates import Template, load_template
from rlt_jax.data.traces import CompletionsConfig
from rlt_jax.errors import UserError
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.config import ModelConfig, RopeScaling
from rlt_jax.ranges import (
    Checked,
    Condition,
    Fraction,
    OneOf,
    Range,
    check_ranges,
    check_value,
)
from rlt_jax.report.pages import ReportConfig
from rlt_jax.rl.rewards import TERMS, make_terms
from rlt_jax.rl.rlt_reward import EnsembleConfig
from rlt_jax.settings import build, owner_of_keys
from rlt_jax.stages import STAGES, stage_sections
from rlt_jax.stages.collect import CollectConfig
from rlt_jax.stages.evaluate import EvaluateConfig
from rlt_jax.stages.plan import PlanConfig
from rlt_jax.stages.rl_config import RLConfig
from rlt_jax.stages.sft import SFTConfig
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.training.optimizer import OptimizerConfig

ROOT = Path(__file__).parents[1]
MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(rlt_jax.__path__, "rlt_jax.")
]
DATACLASSES = sorted(
    {
        one
        for module in MODULES
        for one in vars(module).values()
        if isinstance(one, type)
        and dataclasses.is_dataclass(one)
        and one.__module__.startswith("rlt_jax.")
        and not issubclass(one, nn.Module)
    },
    key=lambda one: one.__name__,
)
CHECKED = [one for one in DATACLASSES if issubclass(one, Checked)]
# What programs make of the settings, and no setting themselves.
MADE = "Run Teacher Journal Engine GivenSampler StoredSampler _Prompt _Running"
MADE += " OneOf Condition"
FUNCTIONS = {
    **{f"problems of {task}": one for task, one in pipeline.PROBLEMS.items()},
    **{f"traces of {task}": one for task, one in pipeline.TRACES.items()},
    **{f"term {name}": one for name, one in TERMS.items()},
}
# Values of the fields that have no default.
REQUIRED: dict[type, dict[str, Any]] = {
    CollectConfig: {"batch_size": 2},
    CompletionsConfig: {"path": "rows.jsonl"},
    EvaluateConfig: {"batch_size": 2},
    ModelConfig: {
        "vocab_size": 8,
        "embed_dim": 8,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_dim": 8,
        "max_length": 32,
    },
    ModelSource: {"path": "embedded"},
    OptimizerConfig: {"learning_rate": 1e-3},
    PlanConfig: {"recipe": "configs/rlt.py", "topology": "v5e:2x2"},
    ProblemConfig: {"split": "train", "size": 2, "seed": 0},
    PuzzleConfig: {"dataset": "gcd", "split": "train", "size": 2, "seed": 0},
    ReportConfig: {"rl": "rl", "traces": (), "evaluations": ()},
    RLConfig: {"steps": 1, "batch_size": 2, "group_size": 2},
    RopeScaling: {"kind": "linear", "factor": 2.0},
    SFTConfig: {"role": "student", "batch_size": 2, "row_length": 32, "steps": 1},
    SamplingConfig: {"max_new_tokens": 8},
    Template: dataclasses.asdict(load_template("tiny")),
}
REQUIRED[next(x for x in CHECKED if x.__name__ == "RowShape")] = {
    "micro_batch_size": 2,
    "row_length": 32,
}
REQUIRED[TraceConfig] = REQUIRED[ProblemConfig] | {
    "kinds": {"careful": 1.0},
    "known_answer": True,
}
NONSENSE = (
    *(-1, 0, 1, 2, 10**7, 10**30, -(10**30)),
    *(-1.0, -0.5, 0.0, 0.5, 1.5, 1e9, 1e300, -1e300, 1e-300),
    *(math.nan, math.inf, -math.inf, True, False, None, 1 + 2j, b"1", np.int64(-3)),
    *(
        "",
        "1",
        "-1",
        "nan",
        "True",
        "none",
        "no such choice\nin two lines",
        "x" * 300,
    ),
    *((), [], {}, (1,), (-1, -1), (math.nan, 2), ("a",), ["a", 1], [[1]], (None,)),
    *(
        {"a": 1},
        {1: "a"},
        {"mean": math.nan},
        {"mean": "1"},
        {(): ()},
        {1, 2},
        object(),
    ),
    *(int, np.zeros(300), np.float32("nan"), ml_collections.ConfigDict({"a": 1})),
)


def fits(hint: Any, value: Any) -> bool:
    """Whether a value lies in its declared range: the rules, written a second time."""
    kind, args = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return fits(args[0], value) and all(obeys(rule, value) for rule in args[1:])
    if kind in (Union, UnionType):
        return any(fits(one, value) for one in args)
    if kind in (tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if kind is tuple and args[-1] is not ...:
            return len(value) == len(args) and all(map(fits, args, value))
        return all(fits(args[0], one) for one in value)
    if kind is Mapping:
        return isinstance(value, Mapping | ml_collections.ConfigDict) and all(
            fits(args[0], k) and fits(args[1], v) for k, v in value.items()
        )
    if hint is Any:
        return True
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    kinds = {int: Integral, float: Real}
    return isinstance(value, kinds.get(hint, hint))


def obeys(rule: Range | OneOf | Condition, value: Any) -> bool:
    if isinstance(rule, OneOf):
        return any(value == one and type(value) is type(one) for one in rule.known)
    if isinstance(rule, Condition):
        return bool(rule.holds(value))  # each has a test of its own
    ends = (rule.above and value == rule.least) or (rule.below and value == rule.most)
    return bool(min(max(value, rule.least), rule.most) == value) and not ends


def parts(hint: Any) -> Iterator[Any]:
    """The types that a type is made of; an annotated one is one of them."""
    is_annotated = get_origin(hint) is Annotated
    if is_annotated or not get_args(hint):
        yield hint
    within = get_args(get_args(hint)[0]) if is_annotated else get_args(hint)
    for one in within:
        yield from parts(one)


def hints_of(owner: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(owner).parameters
    return {name: one.annotation for name, one in parameters.items()}


def assert_one_message(error: pytest.ExceptionInfo | UserError, *names: str) -> None:
    message = str(getattr(error, "value", error))
    assert "\n" not in message
    assert len(message) < 1000, message
    assert any(name in message for name in names), (names, message)


def test_all_settings_are_checked() -> None:
    made = {one.__name__ for one in DATACLASSES} - {one.__name__ for one in CHECKED}
    assert made == {*MADE.split()}
    assert len(CHECKED) >= 26


@pytest.mark.parametrize(
    "owner",
    [*CHECKED, *(owner_of_keys(one) for one in FUNCTIONS.values())],
    ids=[*(one.__name__ for one in CHECKED), *FUNCTIONS],
)
def test_every_field_says_its_range(owner: Callable[..., Any]) -> None:
    given = {"rollout", "template", "seed"} - set(hints_of(Template))
    for name, hint in hints_of(owner).items():
        if name in given and not isinstance(owner, type):
            continue
        for part in parts(hint):
            if get_origin(part) is Annotated:
                rules = get_args(part)[1:]
                assert rules, name
                assert all(
                    isinstance(rule, Range | OneOf | Condition) for rule in rules
                ), name
            elif part is Any:
                assert Mapping in map(get_origin, [hint, *get_args(hint)]), name
            else:
                known = part in (str, bool, NoneType, ...)
                assert known or issubclass(part, Checked), f"{name}: {part}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_stage_has_an_owner(stage: str) -> None:
    sections = importlib.import_module(f"rlt_jax.stages.{stage}").SECTIONS
    assert dataclasses.is_dataclass(sections) or None not in sections.values()


@pytest.mark.parametrize("owner", CHECKED, ids=lambda owner: owner.__name__)
def test_defaults_lie_in_their_ranges(owner: type) -> None:
    values = vars(owner(**REQUIRED.get(owner, {})))
    for name, hint in hints_of(owner).items():
        if not (owner is Template or name == "rope_scaling"):
            assert fits(hint, values[name]), name


@pytest.mark.parametrize("owner", CHECKED, ids=lambda owner: owner.__name__)
def test_nonsense_is_refused_or_in_range(owner: type) -> None:
    """52 values for each of the 200 settings; what is refused has one line."""
    valid, refused = REQUIRED.get(owner, {}), 0
    for name, hint in hints_of(owner).items():
        for value in NONSENSE:
            changed = valid | {name: value}
            try:
                build(owner, changed, "config.part")
            except UserError as error:
                refused += 1
                assert_one_message(error, name)
                if not fits(hint, value):
                    assert str(error).startswith(f"config.part.{name}="), error
            else:
                assert fits(hint, value), (name, value)
            refuses = raises(functools.partial(owner, **changed))
            assert refuses == raises(lambda x=changed: build(owner, x, "config.part"))
    assert refused >= 8 * len(hints_of(owner))


def raises(function: Callable[[], Any]) -> bool:
    try:
        function()
    except UserError:
        return True
    return False


VALUES = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.integers(-3, 3)
    | strategies.floats()
    | strategies.floats(-2, 2)
    | strategies.text(max_size=5),
    lambda one: (
        strategies.lists(one, max_size=3)
        | strategies.lists(one, max_size=3).map(tuple)
        | strategies.dictionaries(strategies.text(max_size=3), one, max_size=2)
    ),
    max_leaves=4,
)


def check_any_values(data: strategies.DataObject) -> None:
    """Several settings of a section at once."""
    owner = data.draw(strategies.sampled_from(CHECKED))
    hints = hints_of(owner)
    names = strategies.lists(strategies.sampled_from([*hints]), min_size=1, max_size=3)
    changed = {name: data.draw(VALUES) for name in data.draw(names)}
    outside = [name for name, value in changed.items() if not fits(hints[name], value)]
    try:
        build(owner, REQUIRED.get(owner, {}) | changed, "config.part")
    except UserError as error:
        assert_one_message(error, *(outside or changed))
    else:
        assert not outside


@hypothesis.settings(derandomize=True, max_examples=300, deadline=None, database=None)
@hypothesis.given(strategies.data())
def test_any_values(data: strategies.DataObject) -> None:
    check_any_values(data)


@pytest.mark.slow
@hypothesis.settings(max_examples=10_000, deadline=None, database=None)
@hypothesis.given(strategies.data())
def test_any_values_thousands(data: strategies.DataObject) -> None:
    check_any_values(data)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nonsense_for_functions(name: str) -> None:
    """Arguments of data tasks and reward terms, without a call of them."""
    owner = owner_of_keys(FUNCTIONS[name])
    for key, hint in hints_of(owner).items():
        for value in () if hint in (Template, rlt_jax.types.Rollout) else NONSENSE:
            try:
                check_ranges("data of task 'file'", owner, {key: value})
            except UserError as error:
                assert not fits(hint, value)
                assert_one_message(error, f"data of task 'file': {key}=")
            else:
                assert fits(hint, value) or isinstance(hint, str), (key, value)


@pytest.mark.parametrize(
    ("task", "key"),
    [
        *(("arithmetic", key) for key in ("size", "chains", "operations", "stream")),
        *(("arithmetic", key) for key in ("part", "kinds", "hinted", "drills", "task")),
        *(("file", key) for key in ("limit", "missing_trace", "keep_cut_off", "part")),
        *(("gsm8k", key) for key in ("limit", "max_calculations", "path")),
    ],
)
def test_nonsense_for_data(task: str, key: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    row = {
        "question": "1?",
        "solution": "1",
        "reasoning_trace": "1",
        "answer": "1#### 1",
    }
    file.write_text(json.dumps(row), encoding="utf-8")
    section: dict[str, Any] = {"task": task, "path": str(file)}
    if task == "arithmetic":
        section = {"task": task, "split": "train", "size": 2}
        section |= {"kinds": {"careful": 1.0}, "known_answer": True}
    refused = 0
    for value in NONSENSE:
        if key in ("size", "drills") and isinstance(value, int) and value == 10**7:
            continue  # allowed, and takes an hour
        try:
            pipeline.load_traces(section | {key: value}, load_template("tiny"), 0)
        except UserError as error:
            refused += 1
            others = "no such file", "distinct questions", "has no problems"
            assert_one_message(error, key, *others)
    assert refused > 20


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"rlt": {"weight": math.nan}}, "reward term 'rlt': weight=nan: at least"),
        ({"length": {"budget": -1}}, "reward term 'length': budget=-1: at least 0"),
        ({"length": {"budget": 1.5}}, "budget=1.5: a whole number, at least 0"),
        ({"correctness": {"wrong": "0"}}, "wrong='0': a number, at least"),
        ({"copy": {"weight": True}}, "weight=True: a number"),
    ],
)
def test_nonsense_for_reward_terms(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_terms(terms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "config.seed=-1: at least 0."),
        ({"seed": True}, "config.seed=True: a whole number, at least 0."),
        ({"seed": 2**40}, f"config.seed={2**40}: at least 0, at most 2147483647."),
        ({"seed": "zero"}, "config.seed='zero': a whole number, at least 0."),
        ({"seed": None}, "config.seed=None: a whole number, at least 0."),
        ({"pipeline": "rl"}, "config.pipeline='rl': a list, one or more"),
        ({"pipeline": 3}, "config.pipeline=3: a list, one or more"),
        (
            {"pipeline": ("part", 3)},
            "config.pipeline=('part', 3): a list, each a text, one or more",
        ),
        ({"pipeline": ()}, "config.pipeline=(): one or more different names."),
        ({"pipeline": ("part", "part")}, "('part', 'part'): one or more different"),
        ({"part": {"stage": "report", "seed": 0.5}}, "config.part.seed=0.5: a whole"),
    ],
)
def test_nonsense_at_the_top(changes: dict[str, Any], message: str) -> None:
    part = {"stage": "report", "rl": "rl", "traces": (), "evaluations": ()}
    values = {"seed": 0, "pipeline": ("part",), "part": part} | changes
    with pytest.raises(UserError) as error:
        stage_sections(ml_collections.ConfigDict(values))
    assert_one_message(error, message)


@pytest.mark.parametrize(
    ("stage", "key", "value", "message"),
    [
        (
            "distil_rlt",
            "data",
            {"limit": -1},
            "data of task 'file': limit=-1: at least 1",
        ),
        (
            "distil_rlt",
            "data",
            {"part": "most"},
            "distil_rlt.data.part='most': one of all",
        ),
        ("distil_rlt", "data", {"limti": 1}, "'limti' (did you mean 'limit'?)"),
        ("distil_rlt", "data", {"task": []}, "distil_rlt.data.task=[]: a text"),
        ("distil_rlt", "data", 3, "config.distil_rlt.data=3: keys and values"),
        ("distil_rlt", "held_out", 3, "config.distil_rlt.held_out=3: keys and values"),
        (
            "distil_rlt",
            "data",
            {"task": "mix", "path": None, "sources": {"x": {"share": math.nan}}},
            "config.distil_rlt.data.sources.x.share=nan: at least 0",
        ),
        (
            "rl",
            "students",
            [{"path": "x", "dtype": "f"}],
            "students[0].dtype='f': one of",
        ),
        ("rl", "students", 3, "config.rl.students=3: a list"),
        ("rl", "reward_terms", {"rlt": {"weight": "1"}}, "weight='1': a number"),
        ("rl", "reward_terms", 3, "reward_terms=3: keys and values"),
        (
            "rl",
            "teaching",
            {"teacher": {"path": "x", "remat": "some"}},
            "teaching.teacher.remat='some': one of none",
        ),
        ("eval_base", "predictions", None, "config.eval_base.predictions=None: a text"),
    ],
)
def test_every_stage_is_checked_at_the_start(
    stage: str, key: str, value: Any, message: str
) -> None:
    """Also what reads files that the run has yet to make."""
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
    values = config.to_dict()
    if isinstance(value, dict) and key == "data":
        value = values[stage][key] | value
        value = {name: one for name, one in value.items() if one is not None}
    values[stage][key] = value
    with pytest.raises(UserError) as error:
        stage_sections(ml_collections.ConfigDict(values))
    assert_one_message(error, message)


def test_messages_name_key_value_and_range() -> None:
    for hint, value, message in [
        (Fraction, 2, "2: at least 0, at most 1."),
        (Annotated[float, Range(0, 1, above=True)], 0, "0: above 0, at most 1."),
        (Annotated[float, Range(0, 1, below=True)], 1, "1: at least 0, below 1."),
        (Annotated[int, Range(1)] | None, 0, "0: at least 1, or None."),
        (Annotated[float, Range(0)], math.inf, "inf: at least 0, at most 3.4e+38."),
        (Annotated[str, OneOf("ab")], "c", "'c': one of a, b."),
        (Sequence[Fraction], (0, 7), "(0, 7): a list, each at least 0, at most 1."),
        (tuple[str, str], ("a",), "('a',): a list of 2."),
        (
            Mapping[str, Fraction],
            {"a": -1},
            "{'a': -1}: keys and values, each at least",
        ),
        (bool, 1, "1: True or False."),
    ]:
        with pytest.raises(UserError) as error:
            check_value("config.key", hint, value)
        assert str(error.value).startswith(f"config.key={message}")


@pytest.mark.parametrize(
    ("owner", "name", "good", "bad"),
    [
        (SamplingConfig, "temperature", (0, 0.0, 0.001, 1000), (-0.1, 1e-30, 1001)),
        (SamplingConfig, "stop", ((), ["a"], ("a", "b")), (("a", ""), "a")),
        (SFTConfig, "profile_steps", ((), [0, 1], (5, 9)), ((5, 5), (5, 3), (1,))),
        (RLConfig, "profile_steps", ((), (0, 1)), ((5, 5), (9, 5), (1, 2, 3))),
        (ProblemConfig, "operations", ((2, 2), [1, 3]), ((3, 2), (3,), (0, 1))),
        (TraceConfig, "kinds", ({"careful": 0.7, "wrong": 0.3},), ({},)),
        (TraceConfig, "kinds", (), ({"careful": 0.9999999}, {"careful": 0.5})),
        (LoRAConfig, "modules", (("query",), ["key", "down"]), ((), ("other",))),
        (EnsembleConfig, "weights", ((), (0, 1)), ((0,), (0.0, 0), (-1, 2))),
        (ModelConfig, "head_dim", (2, 4096), (3, 0, 4098)),
        (ModelConfig, "norm_eps", (1e-5,), (0, 1e-300, 2)),
        (ModelConfig, "attention_softcap", (None, 30), (0, 1e-300)),
        (RopeScaling, "low_freq_factor", (3.9,), (4, 4.0, 5)),
        (RopeScaling, "beta_fast", (1.1,), (1, 0.5)),
        (Template, "pad", ("", "\n"), (1, None)),
        (Template, "thought_tags", (["<a>", "<b>"],), (("<a>", " "), ("<a>",))),
    ],
)
def test_conditions_by_hand(
    owner: type, name: str, good: Sequence[Any], bad: Sequence[Any]
) -> None:
    valid = REQUIRED.get(owner, {})
    for value in good:
        made = getattr(build(owner, valid | {name: value}, "part"), name)
        assert made == (tuple(value) if isinstance(value, list) else value)
    for value in bad:
        with pytest.raises(UserError, match=name) as error:
            build(owner, valid | {name: value}, "part")
        assert_one_message(error, name)


def test_an_architecture_of_a_million_layers() -> None:
    values = {"architecture": {"num_layers": 10**6}, "tokenizer": "embedded"}
    with pytest.raises(UserError) as error:
        build(ModelSource, values, "config.rl.policy")
    where, _, message = str(error.value).partition(": ")
    assert where == "config.rl.policy"
    assert (
        message == "model.architecture.num_layers=1000000: at least 1, at most 10000."
    )


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"'step' \(did you mean 'steps'\?\); known keys"
    ):
        build(RLConfig, {"step": 1}, "loop")
    with pytest.raises(UserError, match=r"unknown key 'colour'; known keys"):
        build(RLConfig, {"colour": 1}, "loop")


def test_a_function_of_the_user_is_checked_by_its_types() -> None:
    def problems(size: int, ratio: float = 0.5, path: "Path" = Path()) -> tuple:
        return size, ratio, path

    assert build(problems, {"size": 3, "ratio": 1, "path": "p"}, "data") == (3, 1, "p")
    with pytest.raises(UserError, match="data.size='3': a whole number"):
        build(problems, {"size": "3"}, "data")


# The imports take seconds; each command line then has a process of its own.
COMMANDS = """
import gc, os, sys
from rlt_jax import main
from rlt_jax.stages import STAGES, preflight
for stage in STAGES:
    preflight.module_of(stage)
gc.freeze()  # or the processes copy all memory
for number, flags in enumerate(eval(sys.argv[1])):
    sys.stderr.flush()
    child = os.fork()
    if not child:
        sys.argv = ["rlt_jax", *flags]
        main.cli()
    print("STATUS", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr)
    sys.stderr.flush()
"""
FAULTS = {
    "rl.optimizer.learning_rate=-1": "config.rl.optimizer.learning_rate=-1.0: at least 0",
    "rl.optimizer.learning_rate=nan": "config.rl.optimizer.learning_rate=nan: at least 0",
    "rl.loop.checkpoint_every=0": "config.rl.loop.checkpoint_every=0: at least 1",
    "warmup.sft.keep_checkpoints=0": "config.warmup.sft.keep_checkpoints=0: at least 1",
    "rl.sampling.stop=ab": "config.rl.sampling.stop='ab': a list",
    "rl.students[0].dtype=float16": "students[0].dtype='float16': one of float32, bfloat",
    "seed=-1": "config.seed=-1: at least 0",
    "rl.optimiser.learning_rate=1": "did you mean --config.rl.optimizer.learning_rate?",
    "rl.students.combine=min": "did you mean --config.rl.ensemble.combine?",
}


def test_the_command_line(tmp_path: Path) -> None:
    common = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    commands = [[*common, f"--config.{fault}"] for fault in FAULTS]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMANDS, repr(commands)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in result.stderr, result.stderr
    lines = result.stderr.splitlines()
    ends = [n for n, line in enumerate(lines) if line.startswith("STATUS")]
    assert [lines[n] for n in ends] == ["STATUS 1"] * len(FAULTS)
    for n, message in zip(ends, FAULTS.values(), strict=True):
        assert lines[n - 1].startswith("rlt_jax: ")
        assert message in lines[n - 1]
    assert not (tmp_path / "run").exists()
