"""Students of their teacher's explanations, and students taught on their own attempts.

    python -m rlt_jax.main --config=experiments/on_policy.py --workdir=runs/on_policy
    python -m experiments.on_policy_claims --workdir=runs/on_policy

The first command runs all routes on three seeds and resumes if it is given again; the
second writes runs/on_policy/comparison/index.html and prints how well the teachers judge,
and needs `pip install '.[experiments]'`. `launch/seeds.sh` runs the seeds side by side. The
recipe takes seeds, `on_policy.py:100`. All settings were chosen on seed 100.

Every route starts from the small base (0.23 million parameters), has 5,120 completions for
the same 640 questions, and trains on each of them once: explanations of a teacher, or the
student's own attempts. What it takes to train the teachers comes on top of that.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_collections

from experiments.small_stages import (
    SMALL,
    chains,
    collect,
    evaluate,
    of_seeds,
    sft,
    student_rl,
    teacher_rl,
)
from experiments.study import seed_list
from rlt_jax.rl.teaching import TeachingConfig
from rlt_jax.settings import section
from rlt_jax.training.checkpoint import ModelSource

SEEDS = (0, 1, 2)  # of the published results
KINDS = {"careful": 0.2, "skipping": 0.4, "restating": 0.37, "wrong": 0.03}
QUESTIONS, SAMPLES = 640, 8
STEPS = 20  # of 32 questions and 8 completions
TEACHER_STEPS = (10, 20, 40)  # of RL


class Taught(NamedTuple):
    """A student that is taught on its own attempts.

    Attributes:
      teacher: the stage that makes the teacher, or None where the policy teaches itself.
      label: in tables.
      teaching: settings that differ.
    """

    teacher: str | None
    label: str
    teaching: Mapping[str, Any] = MappingProxyType({})


# A policy that teaches itself reads the solution in the question; that is what the base has
# learned in pretraining.
ITSELF = {"prompt": "privileged"}
FIXED, AVERAGE = ITSELF | {"sync_every": 0}, ITSELF | {"sync_alpha": 0.05}
TAUGHT = {
    "on_warmup": Taught("warmup", "the warmed-up teacher"),
    "on_rlt_10": Taught("rlt_10", "the RLT after 10 steps"),
    "on_rlt_20": Taught("rlt_20", "the RLT after 20 steps"),
    "on_rlt": Taught("rlt_40", "the RLT"),
    "on_advantage": Taught("rlt_40", "the RLT, advantages", {"kind": "advantage"}),
    "on_other": Taught("rlt_40", "the RLT, another solution", {"sees": "other"}),
    "on_reward": Taught("rlt_40", "the RLT and correctness", {"reward_weight": 1.0}),
    "on_fixed": Taught(None, "the base", FIXED),
    "on_itself": Taught(None, "the student itself", ITSELF),
    "on_average": Taught(None, "its moving average", AVERAGE),
    "on_average_other": Taught(
        None, "its moving average, another solution", AVERAGE | {"sees": "other"}
    ),
}
JUDGES = ("base", "warmup", *(f"rlt_{steps}" for steps in TEACHER_STEPS))


def get_config(seeds: str = "") -> ml_collections.ConfigDict:
    """All stages of all seeds."""
    return of_seeds(_stages_of_a_seed, seed_list(seeds) if seeds else SEEDS)


def _stages_of_a_seed(seed: int) -> dict[str, Any]:
    """Name -> section, in order."""

    def made_by(name: str) -> str:
        return SMALL if name in (SMALL, "base") else f"{{workdir}}/{name}_{seed}"

    worked = chains("train", 8000, stream=1, known_answer=True) | {"kinds": KINDS}
    stages: dict[str, Any] = {"warmup": sft(SMALL, "teacher", worked, 250, 8, 2e-3)}
    for steps in TEACHER_STEPS:
        stages[f"rlt_{steps}"] = teacher_rl(made_by("warmup"), SMALL, {})
        stages[f"rlt_{steps}"]["loop"].steps = steps

    sources = {"warmup": "warmup", "rlt": "rlt_40", "half": "rlt_40"}
    for name, teacher in sources.items():
        count = QUESTIONS // 2 if name == "half" else QUESTIONS
        data = chains("train", count, stream=2)
        stages[f"{name}_traces"] = collect(made_by(teacher), SMALL, data)
        stages[f"{name}_traces"]["collect"].samples_per_problem = SAMPLES
        traces = {"task": "file", "path": f"{made_by(f'{name}_traces')}/traces.jsonl"}
        stages[f"{name}_distil"] = sft(SMALL, "student", traces, 1, 24, 1e-3)
        stages[f"{name}_distil"]["sft"].update(steps=0, epochs=1.0)

    stages["solver"] = _student(SMALL, STEPS, None)
    for name, taught in TAUGHT.items():
        teacher = taught.teacher and made_by(taught.teacher)
        stages[name] = _student(SMALL, STEPS, teaching(teacher, **taught.teaching))
    stages["then_rlt"] = _student(
        made_by("half_distil"), STEPS // 2, teaching(made_by("rlt_40"))
    )
    for name in ("base", "warmup_distil", "rlt_distil", "solver", *TAUGHT, "then_rlt"):
        stages[f"{name}_eval"] = evaluate(made_by(name))

    # One step from the base: the same attempts, judged by every teacher.
    for judge in JUDGES:
        prompt = "privileged" if judge == "base" else "teacher"
        of_judge = teaching(made_by(judge), kind="advantage", prompt=prompt)
        stages[f"{judge}_judges"] = _student(SMALL, 1, of_judge)
        stages[f"{judge}_judges"]["loop"].update(batch_size=512, group_size=2)
    return stages


def teaching(teacher: str | None, **others: Any) -> ml_collections.ConfigDict:
    """Section of a teacher that sees the solution."""
    source = teacher and section(ModelSource, path=teacher)
    settings = {"kind": "reverse", "prompt": "teacher"} | others
    return section(TeachingConfig, teacher=source, **settings)


def _student(
    policy: str, steps: int, teaching: ml_collections.ConfigDict | None
) -> dict:
    """RL of a student: by correctness alone, or by a teacher alone."""
    stage = student_rl(policy, steps)
    stage["data"] = chains("train", QUESTIONS, stream=2)
    if teaching:
        stage["teaching"] = teaching
    return stage
