"""Where teaching beats solving: ways to train a student, on questions of any difficulty.

    launch/seeds.sh --config=experiments/frontier.py --workdir=runs/frontier --seeds=0,1,2
    python -m experiments.frontier_claims --workdir=runs/frontier

The first command runs the seeds side by side and resumes if it is given again; the second
writes runs/frontier/comparison/index.html, and needs `pip install '.[experiments]'`. All
settings but those of "short" were chosen on seed 100. Settings after `--` are those of the config:

    --config.parts="('frontier',)"   some of the parts
    --config.cells="('d3c5',)"       some of the cells: 3 digits, c = 5 in ten thousand
    --config.quick=True              two cells and five routes, a quarter of the compute

Parts:

    frontier  every route in every cell, with all its compute and with a quarter
    claims    the paper's comparisons, where correctness RL has no signal
    reward    what decides whether RL makes a better teacher

A base of 0.23 million parameters answers with careful steps at a share c. All routes of a
cell start from it and take about as many model operations; what it takes to make the base
is not counted, as all have it.
"""

import functools
from typing import Annotated, Any, NamedTuple

import ml_collections

from experiments.frontier_cells import (
    KIND,
    KIND_OF_PUZZLE,
    Cell,
    habit,
    with_lengths,
    worked,
)
from experiments.on_policy import ITSELF, teaching
from experiments.small_stages import (
    collect,
    evaluate,
    of_seeds,
    score,
    sft,
    student_rl,
    teacher_rl,
)
from experiments.study import seed_list
from rlt_jax.errors import UserError
from rlt_jax.ranges import OneOf, check_value
from rlt_jax.settings import link, section
from rlt_jax.training.checkpoint import ModelSource

SEEDS = (0, 1, 2)  # of the published results
BASE, BASE_LARGE = "embedded_chains", "embedded_chains_large"
CELLS = (
    Cell(3, 0.2),
    Cell(3, 0.0005),
    Cell(3, 0.0001),
    Cell(3, 0.0),
    Cell(1, 0.0),
)
BUDGETS = {"": 1.0, "_quarter": 0.25}
CLAIMS_IN = Cell(3, 0.0001)
REWARDS_IN, SHORT_IN = Cell(1, 0.0), Cell(3, 0.0005)  # all of them, and "short" alone
PARTS = ("frontier", "claims", "reward")
# The RLT reward with what surprises the student counted alone, at most 1 nat a token.
CLIPPED = {"kl_teacher_term": False, "kl_clip": 1.0}


class Route(NamedTuple):
    """A way to train a student.

    Attributes:
      label: in tables and pictures.
      stages: those that train it, in order; the last one makes the student.
    """

    label: str
    stages: tuple[str, ...]


ROUTES = {
    "solver": Route("correctness RL", ("solver",)),
    "solved": Route(
        "right answers of a solver", ("solved_rl", "solved_traces", "solved")
    ),
    "rejection": Route(
        "right answers of the base, best of 64", ("rejection_traces", "rejection")
    ),
    "worked": Route("the warm-up's worked explanations", ("worked",)),
    "worked_solver": Route(
        "worked explanations, then correctness RL", ("worked_some", "worked_solver")
    ),
    "warmup": Route(
        "explanations of the warmed-up teacher", ("warm", "warmup_traces", "warmup")
    ),
    "rlt": Route("explanations of the RLT", ("warm", "rlt_rl", "rlt_traces", "rlt")),
    "rlt_clip": Route(
        "explanations of an RLT, clipped surprise",
        ("warm", "rlt_clip_rl", "rlt_clip_traces", "rlt_clip"),
    ),
    "on_rlt": Route("own attempts, judged by the RLT", ("warm", "on_rlt_rl", "on_rlt")),
    "on_itself": Route("own attempts, judged by itself", ("on_itself",)),
}
# Where the base next to never takes careful steps, most other routes get nowhere with all of
# the compute; these alone are taken with a part of it.
WITH_LESS = ("solver", "worked", "worked_solver", "warmup", "rlt", "rlt_clip")
QUICK_ROUTES = ("solver", "worked_solver", "warmup", "rlt", "rlt_clip")
QUICK_CELLS = (Cell(3, 0.2), Cell(3, 0.0001))

# How teachers differ: settings of the reward, its students, the warm-up.
JUDGE = "habit"
REWARDS = {
    "kl_1": ({"explanation_kl_coef": 1.0}, (JUDGE,), "warm"),
    "kl_10": ({"explanation_kl_coef": 10.0}, (JUDGE,), "warm"),
    "k3": ({"kl_estimator": "k3"}, (JUDGE,), "warm"),
    "full": ({"kl_estimator": "full"}, (JUDGE,), "warm"),
    "surprise": ({"kl_teacher_term": False}, (JUDGE,), "warm"),
    "clip": ({"kl_clip": 1.0}, (JUDGE,), "warm"),
    "full_clip": ({"kl_estimator": "full", "kl_clip": 1.0}, (JUDGE,), "warm"),
    "strong": ({}, (BASE,), "warm"),
    "both": ({}, (JUDGE, BASE), "warm"),
    "short": ({}, (JUDGE,), "warm_quarter"),
    "careful_5": ({}, (JUDGE,), "careful_5_warm"),
    "careful_60": ({}, (JUDGE,), "careful_60_warm"),
}
CAREFUL = {"careful_5_warm": 0.05, "careful_60_warm": 0.6}  # others have a fifth
# The tasks of the zero-shot comparison; as many steps of RL on them as cost what the
# teacher's explanations and a student of them cost.
NEW_TASKS = {"letters": 12, "puzzles": 12}
COLD = ("habit", "worked_some", "warmup", "rlt", "rlt_clip", "solved")
COLD_STEPS = 16


class Place(NamedTuple):
    """A cell of a seed, in which stages have names and folders."""

    cell: Cell
    seed: int

    def name(self, stage: str) -> str:
        return f"{stage}_{self.cell.name}"

    def made_by(self, stage: str) -> str:
        return f"{{workdir}}/{self.name(stage)}_{self.seed}"

    def named(self, stages: dict[str, dict]) -> dict[str, dict]:
        return {self.name(stage): values for stage, values in stages.items()}

    def distil(self, student: str, traces: str) -> dict:
        """Two passes over one explanation of each question."""
        data = {"task": "file", "path": f"{self.made_by(traces)}/traces.jsonl"}
        stage = sft(self.made_by(student), "student", data, 1, 24, 1e-3)
        stage["sft"].update(
            steps=0, epochs=2.0, traces_per_question=1, allow_empty=True
        )
        return stage

    def solve(self, policy: str, steps: int, task: str = "signs") -> dict:
        """Correctness RL."""

        def data(split: str, size: int, stream: int) -> dict:
            return self.cell.of_task(task, split, size, stream)

        stage = student_rl(self.made_by(policy), steps, data)
        stage["data"]["size"] = 2048  # as many as the longest run asks
        return stage

    def teach(
        self, steps: int, reward: dict, judges: tuple = (JUDGE,), warm: str = "warm"
    ) -> dict:
        """RL of the warmed-up teacher."""
        stage = teacher_rl(self.made_by(warm), BASE, reward)
        stage["students"] = tuple(
            section(ModelSource, path=BASE if judge == BASE else self.made_by(judge))
            for judge in judges
        )
        stage["data"] = self.cell.data("train", 1024, 2)
        stage["held_out"] = self.cell.data("test", 128, 3)
        stage["loop"].steps = steps
        return stage

    def judge(self, steps: int, teacher: str | None, **settings: Any) -> dict:
        """The student attempts questions, and a teacher judges its attempts."""
        stage = self.solve("habit", steps)
        stage["teaching"] = teaching(teacher and self.made_by(teacher), **settings)
        return stage

    def collect(self, teacher: str, count: int, task: str = "signs") -> dict:
        data = self.cell.of_task(task, "train", count, 4)
        stage = collect(self.made_by(teacher), self.made_by("habit"), data)
        stage["collect"].classify = KIND_OF_PUZZLE if task == "puzzles" else KIND
        return stage

    def right_answers(
        self, model: str, count: int, samples: int, temperature: float = 0.7
    ) -> dict:
        data = self.cell.data("train", count, 4)
        stage = evaluate(self.made_by(model), data, samples, keep_right=True)
        stage["sampling"].temperature = temperature
        return stage

    def learn_worked(self, role: str, steps: int, careful: float = 0.2) -> dict:
        """A teacher or a student learns from worked explanations."""
        data = worked(self.cell, careful)
        return sft(self.made_by("habit"), role, data, steps, 8, 2e-3)

    def evaluate(self, model: str, task: str = "signs") -> dict:
        return evaluate(self.made_by(model), self.cell.of_task(task, "test", 256, 5))


def get_config(seeds: str = "") -> ml_collections.ConfigDict:
    """All stages of all seeds; `pipeline` has those that are chosen."""
    chosen = seed_list(seeds) if seeds else SEEDS
    config = of_seeds(_stages_of_a_seed, chosen)
    everything = config.pipeline
    names = tuple(cell.name for cell in CELLS)
    config.update(parts=PARTS, cells=names, quick=False)

    def pipeline() -> tuple[str, ...]:
        for key, allowed in (("parts", PARTS), ("cells", names)):
            for value in config[key]:
                check_value(f"config.{key}", Annotated[str, OneOf(allowed)], value)
        kept = {
            f"{name}_{seed}"
            for seed in chosen
            for cell in CELLS
            if cell.name in config.cells
            for part in config.parts
            for name in _parts(cell, seed)[part]
            if not config.quick or name in _quick(cell)
        }
        if not kept:
            raise UserError(
                "config.parts, config.cells and config.quick leave no stage."
            )
        return tuple(name for name in everything if name in kept)

    link(config, pipeline=pipeline)
    return config


def routes_of(cell: Cell, suffix: str) -> list[str]:
    """Names of the routes that are taken in a cell with a part of the compute."""
    return [x for x in ROUTES if not suffix or cell.share > 0.0001 or x in WITH_LESS]


def rewards_of(cell: Cell) -> list[str]:
    """Names of the rewards and warm-ups that are compared in a cell."""
    return [
        x for x in REWARDS if cell == REWARDS_IN or (cell, x) == (SHORT_IN, "short")
    ]


def _stages_of_a_seed(seed: int) -> dict[str, Any]:
    """Name -> section, in order."""
    of_cells = [_parts(cell, seed) for cell in CELLS]
    return {
        n: x for part in PARTS for of_cell in of_cells for n, x in of_cell[part].items()
    }


@functools.cache
def _parts(cell: Cell, seed: int) -> dict[str, dict[str, dict]]:
    """Part -> name -> section."""
    place = Place(cell, seed)
    routes = {"habit": habit(cell, BASE), "base_eval": place.evaluate("habit")}
    for suffix, budget in BUDGETS.items():
        routes |= _routes(place, suffix, budget)
    parts = {
        "frontier": routes,
        "claims": _claims(place) if cell == CLAIMS_IN else {},
        "reward": _rewards(place),
    }
    return {part: with_lengths(place.named(stages)) for part, stages in parts.items()}


@functools.cache
def _quick(cell: Cell) -> set[str]:
    """The stages of a cell that `quick` runs."""
    if cell not in QUICK_CELLS:
        return set()
    suffix = min(BUDGETS, key=BUDGETS.get)
    stages = {"habit", "base_eval"}
    for route in QUICK_ROUTES:
        of_route = (*ROUTES[route].stages, f"{route}_eval")
        stages.update(f"{stage}{suffix}" for stage in of_route)
    return {Place(cell, 0).name(stage) for stage in stages}


def _routes(place: Place, suffix: str, budget: float) -> dict[str, dict]:
    """All routes with a part of the compute, and their evaluations."""

    def part(whole: float) -> int:
        return max(1, round(budget * whole))

    def of(name: str) -> str:
        return f"{name}{suffix}"

    p = place
    stages = {
        "solver": p.solve("habit", part(64)),
        "solved_rl": p.solve("habit", part(52)),
        "solved_traces": p.right_answers(of("solved_rl"), part(1024), 1),
        "solved": p.distil("habit", of("solved_traces")),
        "rejection_traces": p.right_answers("habit", part(2048), 64, temperature=1.0),
        "rejection": p.distil("habit", of("rejection_traces")),
        "worked": p.learn_worked("student", part(1150)),
        "worked_some": p.learn_worked("student", part(250)),
        "worked_solver": p.solve(of("worked_some"), part(48)),
        "warm": p.learn_worked("teacher", part(250)),
        "warmup_traces": p.collect(of("warm"), part(5120)),
        "warmup": p.distil("habit", of("warmup_traces")),
        "rlt_rl": p.teach(part(40), {}, warm=of("warm")),
        "rlt_clip_rl": p.teach(part(40), CLIPPED, warm=of("warm")),
        "on_rlt_rl": p.teach(part(20), {}, warm=of("warm")),
        "on_rlt": p.judge(part(26), of("on_rlt_rl")),
        "on_itself": p.judge(part(62), None, **ITSELF),
    }
    for name in ("rlt", "rlt_clip"):
        stages[f"{name}_traces"] = p.collect(of(f"{name}_rl"), part(1024))
        stages[name] = p.distil("habit", of(f"{name}_traces"))
    taken = routes_of(place.cell, suffix)
    for route in taken:
        stages[f"{route}_eval"] = p.evaluate(of(route))
    kept = {f"{route}_eval" for route in taken}
    kept = kept.union(*(ROUTES[route].stages for route in taken))
    return {of(name): stage for name, stage in stages.items() if name in kept}


def _claims(place: Place) -> dict[str, dict]:
    """Larger solvers and students, RL from students, tasks that only the base has seen."""
    p = place
    stages = {
        "habit_large": habit(p.cell, BASE_LARGE),
        "base_large_eval": p.evaluate("habit_large"),
        "solver_large": p.solve("habit_large", 20),
        "solver_large_traces": p.right_answers("solver_large", 1024, 1),
        "solved_by_large": p.distil("habit", "solver_large_traces"),
        "solved_by_large_eval": p.evaluate("solved_by_large"),
        "solver_large_eval": p.evaluate("solver_large"),
    }
    for source in ("warmup", "rlt", "rlt_clip", "solved"):
        stages[f"{source}_to_large"] = p.distil("habit_large", f"{source}_traces")
        stages[f"{source}_to_large_eval"] = p.evaluate(f"{source}_to_large")
    for source in COLD:
        stages[f"{source}_cold"] = p.solve(source, COLD_STEPS)
        stages[f"{source}_cold_eval"] = p.evaluate(f"{source}_cold")
    for task, steps in NEW_TASKS.items():
        for source, teacher in (
            ("warmup", "warm"),
            ("rlt", "rlt_rl"),
            ("rlt_clip", "rlt_clip_rl"),
        ):
            name = f"{source}_{task}"
            stages[f"{name}_traces"] = p.collect(teacher, 1024, task)
            stages[name] = p.distil("habit", f"{name}_traces")
            stages[f"{name}_eval"] = p.evaluate(name, task)
        stages[f"solver_{task}"] = p.solve("habit", steps, task)
        stages[f"solver_{task}_eval"] = p.evaluate(f"solver_{task}", task)
        stages[f"base_{task}_eval"] = p.evaluate("habit", task)
    return stages


def _rewards(place: Place) -> dict[str, dict]:
    """Teachers of other rewards and warm-ups, and what judges say of each kind."""
    p, stages = place, {}
    for name in rewards_of(place.cell):
        reward, judges, warm = REWARDS[name]
        if warm in CAREFUL:
            stages[warm] = p.learn_worked("teacher", 250, CAREFUL[warm])
        stages[f"{name}_rl"] = p.teach(40, reward, judges, warm)
        stages[f"{name}_traces"] = p.collect(f"{name}_rl", 1024)
        stages[name] = p.distil("habit", f"{name}_traces")
        stages[f"{name}_eval"] = p.evaluate(name)
    if place.cell != REWARDS_IN:
        return stages
    fewest = min(BUDGETS, key=BUDGETS.get)
    path = f"{p.made_by(f'warmup_traces{fewest}')}/traces.jsonl"
    for name, judge in (("habit", p.made_by("habit")), ("strong", BASE)):
        stages[f"{name}_score"] = score(p.made_by("warm"), judge, path)
        stages[f"{name}_score"]["per_token"] = True
    return stages
