"""Students of their teacher's explanations, and students taught on their own attempts.

    python -m rlt_jax.main --config=experiments/on_policy.py --workdir=runs/on_policy
    python -m experiments.on_policy --workdir=runs/on_policy

The first command runs all routes on three seeds and resumes if it is given again; the
second writes runs/on_policy/comparison/index.html and prints how well the teachers judge,
and needs `pip install '.[experiments]'`. `launch/seeds.sh` runs the seeds side by side. The
recipe takes seeds, `on_policy.py:100`. All settings were chosen on seed 100.

Every route starts from the small base (0.23 million parameters), has 5,120 completions for
the same 640 questions, and trains on each of them once: explanations of a teacher, or the
student's own attempts. What it takes to train the teachers comes on top of that.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_collections
import scipy.stats

from experiments import pages
from experiments.compare import compare, seed_list
from experiments.small_stages import (
    SMALL,
    chains,
    collect,
    evaluate,
    sft,
    student_rl,
    teacher_rl,
)
from experiments.study import Claim, Measure, Route, Study
from rlt_jax.errors import UserError
from rlt_jax.report.files import read_json, read_lines
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
    stages: dict[str, Any] = {}
    for seed in seed_list(seeds) if seeds else SEEDS:
        for name, values in _stages_of_a_seed(seed).items():
            stages[f"{name}_{seed}"] = values | {"seed": seed}
    config = ml_collections.ConfigDict(stages)
    config.seed = 0
    config.pipeline = tuple(stages)
    return config


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


# Better, worse, what one would expect.
CLAIMS = (
    ("rlt_distil", "warmup_distil", "RL of the teacher makes better explanations."),
    ("on_rlt", "on_warmup", "RL of the teacher makes a better judge of attempts."),
    ("on_rlt", "on_rlt_10", "More RL of the teacher makes a better judge."),
    ("on_rlt", "rlt_distil", "Own attempts teach more than explanations."),
    ("on_warmup", "warmup_distil", "Own attempts teach more than explanations."),
    ("on_itself", "rlt_distil", "Own attempts teach more than explanations."),
    ("then_rlt", "rlt_distil", "Own attempts add to explanations."),
    ("then_rlt", "on_rlt", "Explanations first help."),
    ("on_rlt", "on_advantage", "Whole distributions teach more than sampled tokens."),
    ("on_rlt", "on_other", "It matters that the solution is that of the problem."),
    ("on_average", "on_average_other", "The same for a student that teaches itself."),
    ("on_average", "base", "A student that is shown the solution teaches itself."),
    ("on_average", "on_itself", "A moving average is the steadier teacher."),
    ("on_average", "on_fixed", "A teacher that improves is the better one."),
    ("on_rlt", "on_itself", "An RLT is a better judge than the student itself."),
    ("on_rlt", "solver", "Dense teaching beats sparse rewards."),
    ("on_reward", "solver", "Teaching adds to rewards."),
)


def _study() -> Study:
    """What is compared: label and stages of each route by section."""
    teacher = ("warmup", "rlt_40")
    sections: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
        "1 Without a teacher": {
            "base": ("no training", ()),
            "solver": ("correctness RL", ("solver",)),
        },
        "2 Trained on explanations": {
            "warmup_distil": (
                "explanations of the warmed-up teacher",
                ("warmup", "warmup_traces", "warmup_distil"),
            ),
            "rlt_distil": (
                "explanations of the RLT",
                (*teacher, "rlt_traces", "rlt_distil"),
            ),
        },
        "3 Taught on own attempts": {
            name: (f"taught by {taught.label}", (*_made_by(taught.teacher), name))
            for name, taught in TAUGHT.items()
        },
        "4 Both": {
            "then_rlt": (
                "explanations of the RLT, then taught by it",
                (*teacher, "half_traces", "half_distil", "then_rlt"),
            )
        },
    }
    routes = [
        Route(
            name,
            label,
            section,
            f"{name}_eval_{{seed}}",
            [f"{x}_{{seed}}" for x in made],
        )
        for section, part in sections.items()
        for name, (label, made) in part.items()
    ]
    rewards = [
        Measure(
            f"RL steps: {steps}",
            "Reward of the teacher on held-out questions",
            f"rlt_{steps or TEACHER_STEPS[0]}_{{seed}}",
            f"held_out_reward_{'last' if steps else 'first'}",
        )
        for steps in (0, *TEACHER_STEPS)
    ]
    return Study(routes, [Claim(*claim, "Expected") for claim in CLAIMS], rewards)


def _made_by(teacher: str | None) -> tuple[str, ...]:
    """The stages that make a teacher."""
    return tuple(dict.fromkeys(("warmup", teacher))) if teacher else ()


STUDY = _study()


def judgement(folder: Path) -> dict[str, float]:
    """How well a teacher's log-ratios tell right attempts from wrong ones.

    Args:
      folder: of a stage `..._judges_...`.

    Returns:
      `auc`, how likely a right attempt has a higher mean log-ratio than a wrong one (half
      of the ties count), the number of attempts, and the share that is right.
    """
    read_json(folder / "done.json")  # otherwise samples may be missing
    terms = [
        row["terms"]
        for row in read_lines(folder / "samples.jsonl")
        if row["split"] == "train"
    ]
    right = [one["teacher_log_ratio"] for one in terms if one["correctness"] > 0]
    wrong = [one["teacher_log_ratio"] for one in terms if one["correctness"] <= 0]
    wins = scipy.stats.mannwhitneyu(right, wrong).statistic
    return {
        "auc": float(wins / (len(right) * len(wrong))),
        "attempts": len(terms),
        "right": len(right) / len(terms),
    }


def main() -> None:
    """Compares the seeds of a workdir and prints how well the teachers judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of all seeds")
    parser.add_argument("--seeds", type=seed_list, default=SEEDS, help="such as 0,1,2")
    arguments = parser.parse_args()
    try:
        comparison = compare(arguments.workdir, STUDY, arguments.seeds)
        judgements = {
            judge: [
                judgement(arguments.workdir / f"{judge}_judges_{seed}")["auc"]
                for seed in arguments.seeds
            ]
            for judge in JUDGES
        }
    except UserError as error:
        sys.exit(f"experiments.on_policy: {error}")
    print(pages.write_comparison(arguments.workdir, comparison))
    print(
        "How likely a right attempt of the base has a higher log-ratio than a wrong one:"
    )
    for judge, values in judgements.items():
        print(f"  {judge:8}", *(f"{value:.3f}" for value in values))


if __name__ == "__main__":
    main()
