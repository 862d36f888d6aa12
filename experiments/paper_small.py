"""The paper's comparisons at the scale of the embedded tasks, on several seeds.

    launch/seeds.sh --config=experiments/paper_small.py --workdir=runs/paper_small \\
        --seeds=0,1,2,3
    python -m experiments.compare --workdir=runs/paper_small --seeds=0,1,2,3

The first command runs the seeds side by side and resumes if it is given again; the second
writes runs/paper_small/comparison/index.html, and needs `pip install '.[experiments]'`.
`python -m rlt_jax.main --config=experiments/paper_small.py --workdir=...` runs the seeds
one after the other, which leaves cores idle and takes longer. The recipe takes seeds,
`paper_small.py:100,101`. All settings were chosen on seeds 100 and 101.

A small teacher (0.23 million parameters) and students of its size, a four times larger
solver and student (0.85 million).

Hardware: 2 CPU cores, 62 minutes.
Expected result, right answers in percent, mean of the seeds: no distillation 20.5, traces
of the warmed-up teacher 28.0, of the RLT 86.0, of solvers 99.8 and 100.0; the large student
15.6, 23.8, 84.1 and, of the small solver, 100.0. The README says which claims are seen.
"""

from typing import Any

import ml_collections
from ml_collections import config_dict

from rlt_jax.data.rows import RowShape
from rlt_jax.data.selection import SelectionConfig
from rlt_jax.inference.engine import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.rl.losses import ObjectiveConfig
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig
from rlt_jax.settings import section
from rlt_jax.stages.collect import CollectConfig
from rlt_jax.stages.evaluate import EvaluateConfig
from rlt_jax.stages.rl_config import RLConfig
from rlt_jax.stages.sft import SFTConfig
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.lora import LoRAConfig
from rlt_jax.training.optimizer import OptimizerConfig
from rlt_jax.training.sharding import MeshConfig

SEEDS = (0, 1, 2, 3)  # of the published results
KIND = "experiments.kinds:kind_of"
SMALL, LARGE = "embedded_small", "embedded"
TEMPLATE = "tiny"
KINDS = {"careful": 0.2, "skipping": 0.4, "restating": 0.37, "wrong": 0.03}
ROW = 160  # tokens

# Of a teacher that at times explains like someone who takes * for +, and then jumps to the
# answer; a gullible student has learned nothing else.
DOUBTFUL = {"careful": 0.2, "mistaken": 0.2, "skipping": 0.3, "restating": 0.3}
GULLIBLE = {"mistaken": 1.0}

# How the teachers of reward ablations and of other students differ: settings of the
# reward; the reward's student, a model or the name of a stage; the warm-up before.
PLAIN = {"solution_reductions": {"mean": 1.0}, "kl_reductions": {"mean": 1.0}}
STRICT = {
    "solution_reductions": {"mean": 1.0, "min": 0.1},
    "kl_reductions": {"mean": 1.0, "max": 0.1},
}
TEACHERS = {
    "rlt": ({}, SMALL, "warmup"),
    "no_kl": ({"explanation_kl_coef": 0.0}, SMALL, "warmup"),
    "no_solution": ({"solution_coef": 0.0}, SMALL, "warmup"),
    "no_extremes": (PLAIN, SMALL, "warmup"),
    "strong": ({}, "solver", "warmup"),
    "self": ({}, None, "warmup"),
    "sound": ({}, SMALL, "doubtful"),
    "gullible": ({}, "gullible_base", "doubtful"),
    "gullible_plain": (PLAIN, "gullible_base", "doubtful"),
    "gullible_strict": (STRICT, "gullible_base", "doubtful"),
}


def _chains(split: str, size: int, stream: int, **more: Any) -> dict:
    task = {"task": "arithmetic", "split": split, "size": size, "stream": stream}
    return task | more


def _letters(split: str, size: int, stream: int) -> dict:
    return _chains(split, size, stream, notation="letters")


def _puzzles(split: str, size: int, stream: int) -> dict:
    limits = {"numbers": 3, "max_number": 12, "max_target": 50, "signs": "+-*"}
    task = {
        "task": "experiments.countdown:problems",
        "split": split,
        "size": size,
        "stream": stream,
    }
    return task | limits


# Tasks that the base has seen, but that no warm-up and no RL trained on; and as many
# steps of RL on them as cost what the teacher's explanations and a student of them cost.
NEW_TASKS = {"letters": (_letters, 14), "puzzles": (_puzzles, 20)}
TRACE_SETS = ("warmup", *TEACHERS, "solver", "solver_large")


def get_config(seeds: str = "") -> ml_collections.ConfigDict:
    """All stages of all seeds."""
    chosen = tuple(int(seed) for seed in seeds.split(",")) if seeds else SEEDS
    stages: dict[str, Any] = {}
    for seed in chosen:
        for name, values in _stages_of_a_seed(seed).items():
            stages[f"{name}_{seed}"] = values | {"seed": seed}
    config = ml_collections.ConfigDict(stages)
    config.seed = 0
    config.pipeline = tuple(stages)
    return config


def _stages_of_a_seed(seed: int) -> dict[str, Any]:
    """Name -> section, in order."""

    def made_by(name: str) -> str:
        return name if name in (SMALL, LARGE) else f"{{workdir}}/{name}_{seed}"

    stages: dict[str, Any] = {}

    def distil_and_evaluate(name: str, traces: str, base: str = SMALL) -> None:
        data = {"task": "file", "path": f"{made_by(traces)}/traces.jsonl"}
        stages[f"{name}_distil"] = _sft(base, "student", data, 60, 24, 1e-3)
        stages[f"{name}_eval"] = _evaluate(made_by(f"{name}_distil"))

    worked = _chains("train", 8000, stream=1, known_answer=True)
    stages["warmup"] = _sft(SMALL, "teacher", worked | {"kinds": KINDS}, 250, 8, 2e-3)
    # Long enough to learn the jump from wrong steps to the known answer.
    stages["doubtful"] = _sft(
        SMALL, "teacher", worked | {"kinds": DOUBTFUL}, 750, 8, 4e-3
    )
    wrong = _chains("train", 4000, stream=6, kinds=GULLIBLE, known_answer=True)
    stages["gullible_base"] = _sft(SMALL, "student", wrong, 150, 24, 2e-3)

    # Learning to solve: correctness RL of either size, right answers become traces.
    for name, base in (("solver", SMALL), ("solver_large", LARGE)):
        stages[name] = _student_rl(base, steps=20)
        stages[f"{name}_traces"] = _evaluate(
            made_by(name), _chains("train", 1024, stream=4), samples=1, keep_right=True
        )
        distil_and_evaluate(name, f"{name}_traces")
        stages[f"{name}_itself_eval"] = _evaluate(made_by(name))
    for name, base in (("base", SMALL), ("base_large", LARGE)):
        stages[f"{name}_eval"] = _evaluate(base)

    # Learning to teach: one teacher for each reward.
    stages["warmup_traces"] = _collect(made_by("warmup"), SMALL)
    distil_and_evaluate("warmup", "warmup_traces")
    for name, (reward, student, before) in TEACHERS.items():
        judge = made_by(student) if student else None
        stages[f"{name}_rl"] = _teacher_rl(made_by(before), judge, reward)
        stages[f"{name}_traces"] = _collect(made_by(f"{name}_rl"), SMALL)
        distil_and_evaluate(name, f"{name}_traces")
    for source in ("warmup", "rlt", "solver"):
        distil_and_evaluate(f"{source}_to_large", f"{source}_traces", LARGE)

    # Cold start: the same few steps of correctness RL from each student.
    for source in ("base", "warmup", "rlt", "solver", "solver_large"):
        start = SMALL if source == "base" else made_by(f"{source}_distil")
        stages[f"{source}_cold"] = _student_rl(start, steps=8)
        stages[f"{source}_cold_eval"] = _evaluate(made_by(f"{source}_cold"))

    # Transfer: the teachers explain what they were not trained on, or RL solves it.
    for task, (make, steps) in NEW_TASKS.items():
        for source, teacher in (("warmup", "warmup"), ("rlt", "rlt_rl")):
            name = f"{source}_{task}"
            data = make("train", 1024, stream=4)
            stages[f"{name}_traces"] = _collect(made_by(teacher), SMALL, data)
            distil_and_evaluate(name, f"{name}_traces")
        stages[f"rl_{task}"] = _student_rl(SMALL, steps, make)
        stages[f"rl_{task}_eval"] = _evaluate(made_by(f"rl_{task}"))
        stages[f"base_{task}_eval"] = _evaluate(SMALL)
        for source in ("warmup", "rlt", "rl", "base"):
            stages[f"{source}_{task}_eval"]["data"] = make("test", 256, stream=5)

    # All trace sets before one judge; those of the gullible student before two, with
    # controls.
    for name in TRACE_SETS:
        path = f"{made_by(f'{name}_traces')}/traces.jsonl"
        stages[f"{name}_score"] = _score(made_by("warmup"), SMALL, path)
    path = f"{made_by('gullible_traces')}/traces.jsonl"
    for name, judge in (("gullible", "gullible_base"), ("base", SMALL)):
        stages[f"{name}_controls"] = _score(
            made_by("gullible_rl"), made_by(judge), path, controls=True
        )
    return stages


def _engine() -> ml_collections.ConfigDict:
    return section(EngineConfig, slots=64, page_size=32, prefill_chunk=64, steps=16)


def _sampling(temperature: float = 0.7) -> ml_collections.ConfigDict:
    return section(SamplingConfig, max_new_tokens=56, temperature=temperature)


def _sft(
    model: str, role: str, data: dict, steps: int, batch_size: int, rate: float
) -> dict:
    return {
        "stage": "sft",
        "model": section(ModelSource, path=model),
        "template": TEMPLATE,
        "data": data,
        "held_out": config_dict.placeholder(object),
        "sft": section(
            SFTConfig,
            role=role,
            steps=steps,
            batch_size=batch_size,
            row_length=ROW,
            checkpoint_every=1000,
        ),
        "lora": section(LoRAConfig),
        "optimizer": section(
            OptimizerConfig,
            learning_rate=rate,
            schedule="cosine",
            warmup_fraction=0.05,
        ),
        "mesh": section(MeshConfig),
    }


def _run(student: str | None, temperature: float = 0.7) -> dict:
    """What all stages with a teacher or a policy share."""
    return {
        "students": (section(ModelSource, path=student),) if student else (),
        "ensemble": section(EnsembleConfig),
        "template": TEMPLATE,
        "rows": section(RowShape, micro_batch_size=16, row_length=ROW),
        "sampling": _sampling(temperature),
        "engine": _engine(),
        "mesh": section(MeshConfig),
    }


def _rl(policy: str, held_out: dict, rate: float, **loop: Any) -> dict:
    return {
        "stage": "rl",
        "policy": section(ModelSource, path=policy),
        "held_out": held_out,
        "loop": section(RLConfig, checkpoint_every=1000, **loop),
        "lora": section(LoRAConfig),
        "optimizer": section(OptimizerConfig, learning_rate=rate),
    }


def _teacher_rl(policy: str, student: str | None, reward: dict) -> dict:
    """Without a student, the policy's copy is the student."""
    loop = {"steps": 40, "batch_size": 16, "group_size": 8}
    return (
        _run(student)
        | _rl(
            policy,
            _chains("test", 128, stream=3),
            5e-4,
            self_teaching=student is None,
            **loop,
        )
        | {
            "data": _chains("train", 4000, stream=2),
            "rlt_reward": section(RLTRewardConfig, **reward),
            "reward_terms": {"rlt": {"weight": 1.0}},
            "objective": section(ObjectiveConfig),
        }
    )


def _student_rl(policy: str, steps: int, task: Any = _chains) -> dict:
    loop = {"steps": steps, "batch_size": 32, "group_size": 8, "role": "student"}
    return (
        _run(None, temperature=1.0)
        | _rl(policy, task("test", 128, stream=3), 5e-4, **loop)
        | {
            "data": task("train", 4000, stream=2),
            "rlt_reward": section(RLTRewardConfig),
            "reward_terms": {"correctness": {"weight": 1.0}},
            "objective": section(ObjectiveConfig, beta=0.0),
        }
    )


def _collect(teacher: str, student: str, data: dict | None = None) -> dict:
    data = data or _chains("train", 1024, stream=4)
    kind = KIND if data["task"] == "arithmetic" else ""
    return _run(student) | {
        "stage": "collect",
        "teacher": section(ModelSource, path=teacher),
        "data": data,
        "rlt_reward": section(RLTRewardConfig),
        "collect": section(CollectConfig, batch_size=128, classify=kind),
    }


def _evaluate(
    model: str, data: dict | None = None, samples: int = 4, keep_right: bool = False
) -> dict:
    return {
        "stage": "evaluate",
        "model": section(ModelSource, path=model),
        "template": TEMPLATE,
        "data": data or _chains("test", 256, stream=5),
        "predictions": "",
        "sampling": _sampling(),
        "engine": _engine(),
        "evaluate": section(
            EvaluateConfig,
            batch_size=128,
            samples_per_problem=samples,
            keep_right=keep_right,
        ),
        "mesh": section(MeshConfig),
    }


def _score(teacher: str, student: str, path: str, controls: bool = False) -> dict:
    return {
        "stage": "score",
        "teacher": section(ModelSource, path=teacher),
        "students": (section(ModelSource, path=student),),
        "ensemble": section(EnsembleConfig),
        "template": TEMPLATE,
        "data": {"path": path},
        "rlt_reward": section(RLTRewardConfig),
        "select": section(SelectionConfig),
        "teacher_temperature": 0.7,
        "batch_size": 128,
        "assume_closed": True,
        "per_token": False,
        "controls": controls,
        "num_examples": 4,
        "mesh": section(MeshConfig),
    }
