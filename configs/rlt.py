"""Your questions, your model: a teacher, its explanations, a student, and what it gained.

    python -m rlt_jax.main --config=configs/rlt.py --workdir=runs/mine \\
        --config.model=Qwen/Qwen2.5-0.5B-Instruct --config.data=mine.jsonl

`model` is a folder in Hugging Face layout or an id on the Hub. A row of `data` has
`question` and `solution`; `answer`, which is graded, and `reasoning_trace`, a worked
explanation, are optional. Other layouts: "Data" in docs/guide.md. Without `test_data` a
tenth of the questions is held out.

    eval_base -> warmup -> rl -> collect -> distil -> eval_student -> report (-> export)

The model is evaluated; warmed up as a teacher, where there are traces or solutions that
show their working; trained by RL; it explains all questions; a student is trained on the
explanations and evaluated: its accuracy, where there are answers or solutions that end
with a number or a box, and the log-probability that it gives to the solutions.
--config.compare=True adds what RLT is compared with: students of the worked solutions,
of the warmed-up teacher, and of a solver that was trained by correctness RL.
--config.on_policy=True, or `configs/rlt.py:on_policy`, has the teacher judge the trained
student's own attempts, token by token, and the student learns from that, too
(docs/on_policy.md).

`configs/rlt.py:gsm8k` runs on GSM8K, `configs/rlt.py:smollm2_cpu` compares everything with
SmolLM2-135M on two CPU cores, sized for about four hours; docs/real_model.md has its results.

Hardware: `device` picks settings for it, such as "t4", "h100-8" or "v5e-8"; "auto" goes
by what JAX finds. The guide has a table of models that fit. With `lora_rank=0` all
parameters are trained.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
from ml_collections import ConfigDict, config_dict

from rlt_jax.costs.chips import chip_of, num_chips
from rlt_jax.data.rows import RowShape
from rlt_jax.data.templates import Template, load_template
from rlt_jax.data.traces import read_traces
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.ranges import OneOf, check_value
from rlt_jax.report.pages import ReportConfig
from rlt_jax.rl.losses import ObjectiveConfig
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig
from rlt_jax.rl.teaching import TeachingConfig
from rlt_jax.settings import link, section
from rlt_jax.stages.collect import CollectConfig
from rlt_jax.stages.evaluate import EvaluateConfig
from rlt_jax.stages.rl_config import RLConfig
from rlt_jax.stages.sft import SFTConfig
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.training.optimizer import OptimizerConfig
from rlt_jax.training.sharding import MeshConfig

_LOG = logging.getLogger("rlt_jax")


class Device(NamedTuple):
    """How to use a kind of device.

    Attributes:
      kind: part of its name in JAX, in lower case.
      memory: of one, as its vendor counts it, in GB; 0 for that of the host.
      tokens: in the rows of a micro-batch on each device.
      slots: completions decoded at once on each device.
      dtype: of activations, and of parameters that are not trained.
      remat: what the backward pass recomputes, see `ModelConfig`.
      offload: whether reference and students stay in the host's memory between uses.
    """

    kind: str
    memory: float
    tokens: int
    slots: int
    dtype: str = "bfloat16"
    remat: str = "full"
    offload: bool = False


# The first whose kind is found counts. On CPU "dots" saves memory for activations.
DEVICES = {
    "cpu": Device("cpu", 0, 512, 16, "float32", "dots"),
    "t4": Device("t4", 16, 2048, 16, offload=True),
    "l4": Device("l4", 24, 2048, 32, offload=True),
    "a100-40": Device("-40gb", 40, 4096, 64),
    "a100": Device("a100", 80, 8192, 128),
    "h100": Device("h100", 80, 8192, 128),
    "h200": Device("h200", 141, 16384, 256),
    "v4": Device("v4", 32, 4096, 64),
    "v5e": Device("v5 lite", 16, 2048, 32, offload=True),
    "v5p": Device("v5", 95, 8192, 128),
    "v6e": Device("v6 lite", 32, 4096, 64),
}


TOP = {
    "seed": 0,
    "model": "",
    "students": (),  # they judge, the first one is trained; () is the model itself
    "data": "",
    "test_data": "",  # "" holds out a tenth of the questions
    "template": "rlt",
    "steps": 100,  # of RL
    "batch_size": 8,  # questions in a step of RL
    "group_size": 8,  # explanations of each
    "max_new_tokens": 512,  # of an explanation
    "row_length": 2048,  # of the longest sequence, in tokens
    "lora_rank": 0,
    "device": "auto",
    "compare": False,
    "on_policy": False,  # the student goes on to learn on its own attempts
    "export": False,
}
GSM8K = "hf://datasets/openai/gsm8k/main/{}-00000-of-00001.parquet"
ON_GSM8K = {"data": GSM8K.format("train"), "test_data": GSM8K.format("test")}
VARIANTS: dict[str, dict[str, Any]] = {
    "own": {},
    "on_policy": {"on_policy": True},
    "gsm8k": {"model": "Qwen/Qwen2.5-0.5B-Instruct", **ON_GSM8K},
    "smollm2_cpu": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        **ON_GSM8K,
        "template": "short",
        "steps": 40,
        "batch_size": 4,
        "max_new_tokens": 96,
        "row_length": 512,
        "device": "cpu",
        "compare": True,
    },
}
SFT_TOKENS = 8192  # in a step, or a row on each device if that is more
WORKING = 80  # characters of a solution that shows its working
SOLVE = {"keep_right": True, "samples_per_problem": 4, "solution_log_probs": False}
# Evaluation -> stage of its model; "" is the student before it is trained. The last one
# is compared with the others.
EVALUATED = {
    "eval_base": "",
    "eval_worked": "distil_worked",
    "eval_warmup": "distil_warmup",
    "eval_solver": "solver",
    "eval_solved": "distil_solved",
    "eval_taught": "taught",
    "eval_student": "distil",
}


def get_config(variant: str = "own") -> ConfigDict:
    """The pipeline; its settings are at the top, and all others follow from them.

    Args:
      variant: one of `VARIANTS`. The stage `plan` adds a slice, as in "gsm8k:v5e:2x4";
        a slice alone is one for "own".
    """
    variant, _, topology = variant.partition(":")
    if topology and variant not in VARIANTS:
        variant, topology = "own", f"{variant}:{topology}"
    check_value("configs/rlt.py", Annotated[str, OneOf(VARIANTS)], variant)
    c = ConfigDict(TOP | VARIANTS[variant])
    if topology:
        c.device = f"{chip_of(topology).name}-{num_chips(topology)}"
    c.task = "gsm8k" if "data" in VARIANTS[variant] else "file"
    c.pipeline = ()
    link(c, pipeline=lambda: _pipeline(c))
    _add_sft(c, "warmup", "teacher")
    _add_rl(c, "rl", "teacher")
    _add_collect(c, "collect", "rl")
    _add_sft(c, "distil", "student", "collect")
    # Without a warm-up a teacher may never close an explanation.
    link(c.distil.data, keep_cut_off=lambda: not _has_working(c))
    _add_taught(c)
    # What RLT is compared with.
    _add_sft(c, "distil_worked", "student")
    _add_collect(c, "collect_warmup", "warmup")
    _add_sft(c, "distil_warmup", "student", "collect_warmup")
    _add_rl(c, "solver", "student")
    _add_evaluate(c, "solve", "solver", "train")
    c.solve.evaluate.update(SOLVE)
    _add_sft(c, "distil_solved", "student", "solve")
    c.distil_solved.sft.allow_empty = True  # no answer may be right
    for name, model in EVALUATED.items():
        _add_evaluate(c, name, model, "held_out")
    c.report = section(ReportConfig, rl="rl", traces=(), evaluations=())
    c.report.stage = "report"
    link(
        c.report,
        traces=lambda: _reported(c, "collect"),
        evaluations=lambda: _reported(c, "eval"),
    )
    for name, model in (("export_student", "distil"), ("export_teacher", "rl")):
        c[name] = {"stage": "export", "model_type": "", "dtype": "bfloat16"}
        c[name].update(adapter_base="", model=_model(_in(model)), mesh=_mesh())
    if variant == "smollm2_cpu":
        _make_small(c)
    return c


def _make_small(c: ConfigDict) -> None:
    """What SmolLM2 learns from within four hours: fewer questions, larger steps."""
    for name in c:
        stage = c[name]
        if not isinstance(stage, ConfigDict):
            continue
        if "data" in stage and stage.data.task == "gsm8k":
            held_out = name in EVALUATED
            stage.data.update(max_calculations=2, limit=200 if held_out else 384)
        if "held_out" in stage and stage.held_out:
            stage.held_out.update(max_calculations=2, limit=32)
        if stage.stage == "sft":
            stage.sft.update(epochs=2.0, batch_size=4)
            stage.optimizer.learning_rate = 5e-5
        if stage.stage == "rl":
            stage.optimizer.learning_rate = 1e-5
    c.solve.evaluate.samples_per_problem = 2


def find_device(name: str) -> tuple[Device, int]:
    """The preset for a name such as "h100" or "v5e-8", and the number of devices.

    "auto" stands for the devices that JAX has found; this starts its backend.

    Raises:
      UserError: there is no such preset.
    """
    if name == "auto":
        kind = jax.devices()[0].device_kind.lower()
        found = (name for name, device in DEVICES.items() if device.kind in kind)
        name = f"{next(found, kind)}-{jax.device_count()}"
    kind, _, count = name.rpartition("-")
    if name in DEVICES or not count.isdecimal() or int(count) < 1:
        kind, count = name, "1"
    if kind not in DEVICES:
        raise UserError(
            f"device={name!r}: no such preset; choose one of {', '.join(DEVICES)}, with "
            'the number of devices where there are several, as in "v5e-8".'
        )
    return DEVICES[kind], int(count)


def _pipeline(c: ConfigDict) -> tuple[str, ...]:
    for name, what in (("model", "a model"), ("data", "a file of questions")):
        if not c[name]:
            raise UserError(f"config.{name} is empty: name {what}, --config.{name}=...")
    names = ["eval_base"]
    if _has_working(c):
        names += ["warmup"]
    if _has_working(c) and c.compare:
        names += ["distil_worked", "eval_worked"]
        names += ["collect_warmup", "distil_warmup", "eval_warmup"]
    names += ["rl", "collect", "distil", "eval_student"]
    if c.on_policy:
        names += ["taught", "eval_taught"]
    if c.compare:
        names += ["solver", "eval_solver", "solve", "distil_solved", "eval_solved"]
    return (
        *names,
        "report",
        *(("export_student", "export_teacher") if c.export else ()),
    )


def _has_working(c: ConfigDict) -> bool:
    """Whether there is something to warm up a teacher on."""
    if c.task != "file":
        return True
    return _shows_working(c.data, load_template(c.template))


@functools.cache
def _shows_working(path: str, template: Template) -> bool:
    """Whether most of the first rows have a trace, or a solution with its working."""
    traces = read_traces(path, template, 100, missing_trace="solution")
    worked = [
        one.explanation != one.problem.solution or len(one.explanation) >= WORKING
        for one in traces
    ]
    found = 2 * sum(worked) > len(worked)
    if not found:
        _LOG.warning(
            f"{path}: most rows have neither a reasoning_trace nor a solution of {WORKING} "
            "characters, so no teacher is warmed up on them."
        )
    return found


def _reported(c: ConfigDict, kind: str) -> tuple[tuple[str, str], ...]:
    """The stages of a kind that run, each after its name in the report."""
    labels = {"collect": "rlt", "collect_warmup": "warmup"}
    known = ("collect_warmup", "collect", *EVALUATED)
    return tuple(
        (labels.get(name, name.removeprefix("eval_")), name)
        for name in known
        if name in c.pipeline and name.startswith(kind)
    )


def _device(c: ConfigDict) -> Device:
    return find_device(c.device)[0]


def _rows(c: ConfigDict) -> int:
    """Rows that are computed at once."""
    device, count = find_device(c.device)
    return count * max(1, device.tokens // c.row_length)


def _student(c: ConfigDict) -> str:
    """The student that is trained."""
    return (*c.students, c.model)[0]


def _students(c: ConfigDict) -> tuple[ConfigDict, ...]:
    """The students that judge."""
    students = []
    for path in c.students or (c.model,):
        students.append(_model(path))
        students[-1].update(dtype=_device(c).dtype, param_dtype=_device(c).dtype)
    return tuple(students)


def _in(stage: str) -> str:
    return f"{{workdir}}/{stage}"


def _mesh() -> ConfigDict:
    return section(MeshConfig, data=1, fsdp=-1)


def _model(path: str) -> ConfigDict:
    return section(ModelSource, path=path or "-")


def _link_model(
    c: ConfigDict, model: ConfigDict, path: Callable[[], str], trained: bool = False
) -> None:
    """Where all parameters are trained they are float32."""

    def param_dtype() -> str:
        whole = trained and not c.lora_rank
        return "float32" if whole else _device(c).dtype

    link(
        model,
        path=path,
        dtype=lambda: _device(c).dtype,
        param_dtype=param_dtype,
        remat=lambda: _device(c).remat if trained else "none",
    )


def _data(c: ConfigDict, traces: bool = False) -> ConfigDict:
    """Problems or traces."""
    data = ConfigDict({"task": c.task, "path": "", "part": ""})
    data.limit = config_dict.placeholder(int)
    if c.task == "gsm8k":
        data.max_calculations = config_dict.placeholder(int)
    elif traces:
        data.missing_trace = "solution"
    return data


def _link_data(c: ConfigDict, data: ConfigDict, part: str) -> None:
    """The part that is for training, or held out."""
    path = (lambda: c.data) if part == "train" else (lambda: c.test_data or c.data)
    link(data, path=path, part=lambda: "all" if c.test_data else part)


def _training(rate: float, **others: Any) -> dict[str, Any]:
    optimizer = section(OptimizerConfig, learning_rate=rate, **others)
    return {"lora": section(LoRAConfig), "optimizer": optimizer, "mesh": _mesh()}


def _link_training(c: ConfigDict, stage: ConfigDict) -> None:
    """Adapters have ten times the learning rate."""
    rate = stage.optimizer.learning_rate
    link(
        stage.lora,
        rank=lambda: c.lora_rank,
        alpha=lambda: 2.0 * c.lora_rank or 16.0,
    )
    link(stage.optimizer, learning_rate=lambda: rate * (10 if c.lora_rank else 1))


def _add_sft(c: ConfigDict, name: str, role: str, source: str = "") -> None:
    """A warm-up of the teacher, or a distillation; of the traces of another stage."""
    traces = ConfigDict({"task": "file", "path": f"{_in(source)}/traces.jsonl"})
    traces.update(limit=config_dict.placeholder(int), keep_cut_off=False)
    sft = SFTConfig(role, 1, 1, epochs=3.0, overlong="drop", checkpoint_every=50)
    c[name] = {
        "stage": "sft",
        "model": _model(""),
        "template": c.get_ref("template"),
        "data": traces if source else _data(c, traces=True),
        "held_out": config_dict.placeholder(object),
        "sft": section(SFTConfig, **dataclasses.asdict(sft)),
        **_training(1e-5, schedule="cosine", warmup_fraction=0.05),
    }

    def model() -> str:
        return c.model if role == "teacher" else _student(c)

    def batch_size() -> int:
        return _rows(c) * max(1, round(SFT_TOKENS / (_rows(c) * c.row_length)))

    _link_model(c, c[name].model, model, trained=True)
    if not source:
        _link_data(c, c[name].data, "train")
    link(
        c[name].sft,
        batch_size=batch_size,
        micro_batch_size=lambda: _rows(c),
        row_length=lambda: c.row_length,
    )
    _link_training(c, c[name])


def _sampler() -> dict[str, Any]:
    sampling = section(SamplingConfig, max_new_tokens=1, temperature=0.7)
    return {"sampling": sampling, "engine": section(EngineConfig)}


def _link_sampler(c: ConfigDict, stage: ConfigDict, role: str) -> None:
    """A student's answer has room for a thought like an explanation and the solution."""

    def slots() -> int:
        device, count = find_device(c.device)
        return device.slots * count

    def max_new_tokens() -> int:
        more = c.max_new_tokens // 2 if role == "student" else 0
        return c.max_new_tokens + more

    link(stage.sampling, max_new_tokens=max_new_tokens)
    weights = ("model", "bfloat16")
    link(stage.engine, slots=slots, weights=lambda: weights[_device(c).memory > 0])


def _rewarded(c: ConfigDict) -> dict[str, Any]:
    """What RL and collection share."""
    return {
        "students": (),
        "ensemble": section(EnsembleConfig),
        "template": c.get_ref("template"),
        "rows": section(RowShape, micro_batch_size=1, row_length=1),
        "rlt_reward": section(RLTRewardConfig),
        "data": _data(c),
        **_sampler(),
    }


def _link_rewarded(c: ConfigDict, stage: ConfigDict, role: str) -> None:
    link(stage.rows, micro_batch_size=lambda: _rows(c), row_length=lambda: c.row_length)
    if role == "teacher":
        link(stage, students=lambda: _students(c))
    _link_data(c, stage.data, "train")
    _link_sampler(c, stage, role)


def _add_rl(
    c: ConfigDict, name: str, role: str, teaching: ConfigDict | None = None
) -> None:
    """RL of the teacher, or of a student that is rewarded for right answers."""
    loop = RLConfig(1, 1, 2, role=role, checkpoint_every=10)
    term = "rlt" if role == "teacher" else "correctness"
    c[name] = {
        "stage": "rl",
        "policy": _model(""),
        **_rewarded(c),
        "reward_terms": {term: {"weight": 1.0}},
        "objective": section(ObjectiveConfig),
        "teaching": teaching or config_dict.placeholder(object),
        "held_out": _data(c),
        "loop": section(RLConfig, **dataclasses.asdict(loop)),
        **_training(1e-6, b2=0.999, weight_decay=0.0),
    }

    def policy() -> str:
        if role == "student":  # a base seldom answers in the template's tags
            return _in("distil_worked") if _has_working(c) else _student(c)
        return _in("warmup") if _has_working(c) else c.model

    _link_model(c, c[name].policy, policy, trained=True)
    _link_rewarded(c, c[name], role)
    _link_data(c, c[name].held_out, "held_out")
    link(
        c[name].loop,
        steps=lambda: c.steps,
        batch_size=lambda: c.batch_size,
        group_size=lambda: c.group_size,
        offload=lambda: _device(c).offload,
    )
    _link_training(c, c[name])


def _add_taught(c: ConfigDict) -> None:
    """The RLT judges attempts of the student of its explanations; that needs no answers."""
    teaching = section(TeachingConfig, prompt="teacher", teacher=_model(_in("rl")))
    _add_rl(c, "taught", "student", teaching)
    c.taught.objective.beta = 0.0
    c.taught.reward_terms = {}
    _link_model(c, c.taught.policy, lambda: _in("distil"), trained=True)
    _link_model(c, c.taught.teaching.teacher, lambda: _in("rl"))

    def kind() -> str:
        """Other families have other vocabularies."""
        return "reverse" if _student(c) == c.model else "advantage"

    link(c.taught.teaching, kind=kind)


def _add_collect(c: ConfigDict, name: str, teacher: str) -> None:
    c[name] = {
        "stage": "collect",
        "teacher": _model(_in(teacher)),
        **_rewarded(c),
        "collect": section(CollectConfig, batch_size=32),
        "mesh": _mesh(),
    }
    _link_model(c, c[name].teacher, lambda: _in(teacher))
    _link_rewarded(c, c[name], "teacher")


def _add_evaluate(c: ConfigDict, name: str, model: str, part: str) -> None:
    evaluate = EvaluateConfig(32, untagged="whole", solution_log_probs=True)
    c[name] = {
        "stage": "evaluate",
        "model": _model(""),
        "template": c.get_ref("template"),
        "data": _data(c),
        "predictions": "",
        "evaluate": section(EvaluateConfig, **dataclasses.asdict(evaluate)),
        "mesh": _mesh(),
        **_sampler(),
    }
    _link_model(c, c[name].model, lambda: _in(model) if model else _student(c))
    _link_data(c, c[name].data, part)
    _link_sampler(c, c[name], "student")
