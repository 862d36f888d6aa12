"""Compares the routes of on_policy.py over seeds, and how well the teachers judge.

pip install '.[experiments]'
python -m experiments.on_policy_claims --workdir=runs/on_policy
"""

import sys
from pathlib import Path

import scipy.stats

from experiments import pages
from experiments.compare import compare, read_arguments
from experiments.on_policy import JUDGES, SEEDS, TAUGHT, TEACHER_STEPS
from experiments.study import Claim, Measure, Route, Study
from rlt_jax.errors import UserError
from rlt_jax.files import read_json
from rlt_jax.report.files import read_lines

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
    arguments = read_arguments(__doc__, SEEDS)
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
        sys.exit(f"experiments.on_policy_claims: {error}")
    print(pages.write_comparison(arguments.workdir, comparison))
    print(
        "How likely a right attempt of the base has a higher log-ratio than a wrong one:"
    )
    for judge, values in judgements.items():
        print(f"  {judge:8}", *(f"{value:.3f}" for value in values))


if __name__ == "__main__":
    main()
