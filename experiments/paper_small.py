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

from experiments.small_stages import (
    LARGE,
    SMALL,
    chains,
    collect,
    evaluate,
    of_seeds,
    score,
    sft,
    student_rl,
    teacher_rl,
)
from experiments.study import seed_list

SEEDS = (0, 1, 2, 3)  # of the published results
KINDS = {"careful": 0.2, "skipping": 0.4, "restating": 0.37, "wrong": 0.03}

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


def _letters(split: str, size: int, stream: int) -> dict:
    return chains(split, size, stream, notation="letters")


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
    return of_seeds(_stages_of_a_seed, seed_list(seeds) if seeds else SEEDS)


def _stages_of_a_seed(seed: int) -> dict[str, Any]:
    """Name -> section, in order."""

    def made_by(name: str) -> str:
        return name if name in (SMALL, LARGE) else f"{{workdir}}/{name}_{seed}"

    stages: dict[str, Any] = {}

    def distil_and_evaluate(name: str, traces: str, base: str = SMALL) -> None:
        data = {"task": "file", "path": f"{made_by(traces)}/traces.jsonl"}
        stages[f"{name}_distil"] = sft(base, "student", data, 60, 24, 1e-3)
        stages[f"{name}_eval"] = evaluate(made_by(f"{name}_distil"))

    worked = chains("train", 8000, stream=1, known_answer=True)
    stages["warmup"] = sft(SMALL, "teacher", worked | {"kinds": KINDS}, 250, 8, 2e-3)
    # Long enough to learn the jump from wrong steps to the known answer.
    stages["doubtful"] = sft(
        SMALL, "teacher", worked | {"kinds": DOUBTFUL}, 750, 8, 4e-3
    )
    wrong = chains("train", 4000, stream=6, kinds=GULLIBLE, known_answer=True)
    stages["gullible_base"] = sft(SMALL, "student", wrong, 150, 24, 2e-3)

    # Learning to solve: correctness RL of either size, right answers become traces.
    for name, base in (("solver", SMALL), ("solver_large", LARGE)):
        stages[name] = student_rl(base, steps=20)
        stages[f"{name}_traces"] = evaluate(
            made_by(name), chains("train", 1024, stream=4), samples=1, keep_right=True
        )
        distil_and_evaluate(name, f"{name}_traces")
        stages[f"{name}_itself_eval"] = evaluate(made_by(name))
    for name, base in (("base", SMALL), ("base_large", LARGE)):
        stages[f"{name}_eval"] = evaluate(base)

    # Learning to teach: one teacher for each reward.
    stages["warmup_traces"] = collect(made_by("warmup"), SMALL)
    distil_and_evaluate("warmup", "warmup_traces")
    for name, (reward, student, before) in TEACHERS.items():
        judge = made_by(student) if student else None
        stages[f"{name}_rl"] = teacher_rl(made_by(before), judge, reward)
        stages[f"{name}_traces"] = collect(made_by(f"{name}_rl"), SMALL)
        distil_and_evaluate(name, f"{name}_traces")
    for source in ("warmup", "rlt", "solver"):
        distil_and_evaluate(f"{source}_to_large", f"{source}_traces", LARGE)

    # Cold start: the same few steps of correctness RL from each student.
    for source in ("base", "warmup", "rlt", "solver", "solver_large"):
        start = SMALL if source == "base" else made_by(f"{source}_distil")
        stages[f"{source}_cold"] = student_rl(start, steps=8)
        stages[f"{source}_cold_eval"] = evaluate(made_by(f"{source}_cold"))

    # Transfer: the teachers explain what they were not trained on, or RL solves it.
    for task, (make, steps) in NEW_TASKS.items():
        for source, teacher in (("warmup", "warmup"), ("rlt", "rlt_rl")):
            name = f"{source}_{task}"
            data = make("train", 1024, stream=4)
            stages[f"{name}_traces"] = collect(made_by(teacher), SMALL, data)
            distil_and_evaluate(name, f"{name}_traces")
        stages[f"rl_{task}"] = student_rl(SMALL, steps, make)
        stages[f"rl_{task}_eval"] = evaluate(made_by(f"rl_{task}"))
        stages[f"base_{task}_eval"] = evaluate(SMALL)
        for source in ("warmup", "rlt", "rl", "base"):
            stages[f"{source}_{task}_eval"]["data"] = make("test", 256, stream=5)

    # All trace sets before one judge; those of the gullible student before two, with
    # controls.
    for name in TRACE_SETS:
        path = f"{made_by(f'{name}_traces')}/traces.jsonl"
        stages[f"{name}_score"] = score(made_by("warmup"), SMALL, path)
    path = f"{made_by('gullible_traces')}/traces.jsonl"
    for name, judge in (("gullible", "gullible_base"), ("base", SMALL)):
        stages[f"{name}_controls"] = score(
            made_by("gullible_rl"), made_by(judge), path, controls=True
        )
    return stages
