"""What the paper claims, and which stages of paper_small.py show it."""

from experiments.paper_small import NEW_TASKS, TEACHERS, TRACE_SETS
from experiments.study import Claim, Measure, Route, Study

# Section -> route -> label. A student is distilled from traces unless the label says
# otherwise.
ROUTES = {
    "1 Traces for a student of the teacher's size": {
        "base": "no distillation",
        "warmup": "traces of the warmed-up teacher",
        "rlt": "traces of the RLT",
        "solver": "right answers of a solver, same size",
        "solver_large": "right answers of a 4x larger solver",
    },
    "2 A student 4x larger than the teacher": {
        "base_large": "large, no distillation",
        "warmup_to_large": "large, traces of the warmed-up teacher",
        "rlt_to_large": "large, traces of the RLT",
        "solver_to_large": "large, right answers of the small solver",
    },
    "3 Correctness RL from students": {
        "base_cold": "RL from no distillation",
        "warmup_cold": "RL from warmed-up teacher's traces",
        "rlt_cold": "RL from RLT traces",
        "solver_cold": "RL from the same-size solver's answers",
        "solver_large_cold": "RL from the larger solver's answers",
        "solver_itself": "the solver: more RL, no distillation",
        "solver_large_itself": "the larger solver",
    },
    "4 Tasks that only the base has seen": {
        "base_letters": "other notation, no distillation",
        "warmup_letters": "other notation, traces of the warmed-up teacher",
        "rlt_letters": "other notation, traces of the RLT",
        "rl_letters": "other notation, RL on it",
        "base_puzzles": "puzzles, no distillation",
        "warmup_puzzles": "puzzles, traces of the warmed-up teacher",
        "rlt_puzzles": "puzzles, traces of the RLT",
        "rl_puzzles": "puzzles, RL on them",
    },
    "5 Rewards without a term": {
        "no_kl": "reward without the explanation KL",
        "no_solution": "reward without the solution score",
        "no_extremes": "reward without min and max",
    },
    "8 One model in both roles": {"self": "traces of a self-teaching RLT"},
    "9 Other students in the reward": {
        "strong": "the reward's student is the solver",
        "sound": "a doubtful warm-up, the reward's student is the base",
        "gullible": "a doubtful warm-up, the reward's student takes * for +",
        "gullible_plain": "the same without min and max",
        "gullible_strict": "the same with min and max ten times as heavy",
    },
}

# Better, worse, what was published.
HIGHER = "Students of RLT traces score higher (7B: 49.5 against 46.6 in the mean)."
LARGER = "A 32B student of a 7B teacher scores higher (73.2 against 71.5)."
COLD = "RL reaches more from a student of RLT traces (50.5 against 48.3)."
ZERO_SHOT = "Zero-shot traces of the RLT beat RL on the new task itself."
_TERMS = "Each term of the reward is needed."
_STRONG = "A stronger student in the reward makes a better teacher."
CLAIMS = (
    ("rlt", "warmup", HIGHER),
    ("rlt", "solver", HIGHER),
    ("rlt", "solver_large", HIGHER),
    ("rlt", "base", HIGHER),
    ("rlt_to_large", "warmup_to_large", LARGER),
    ("rlt_to_large", "solver_to_large", LARGER),
    ("rlt_to_large", "base_large", LARGER),
    ("rlt_cold", "base_cold", COLD),
    ("rlt_cold", "warmup_cold", COLD),
    ("rlt_cold", "solver_cold", COLD),
    ("rlt_cold", "solver_large_cold", COLD),
    ("rlt_letters", "rl_letters", ZERO_SHOT),
    ("rlt_letters", "warmup_letters", "RL on one task helps teaching another."),
    ("rlt_letters", "base_letters", "Zero-shot traces teach."),
    ("rlt_puzzles", "rl_puzzles", ZERO_SHOT),
    ("rlt_puzzles", "warmup_puzzles", "RL on one task helps teaching another."),
    ("rlt_puzzles", "base_puzzles", "Zero-shot traces teach."),
    ("rlt", "no_kl", _TERMS),
    ("rlt", "no_solution", _TERMS),
    ("rlt", "no_extremes", _TERMS),
    ("self", "warmup", "Not in the paper: a copy of the policy serves as student."),
    ("strong", "rlt", _STRONG),
    ("sound", "gullible", "Expected: who believes wrong steps teaches wrong steps."),
    ("gullible_strict", "gullible_plain", "Expected: min and max punish single steps."),
)


def _paper() -> Study:
    routes, sections = [], {}
    for section, labels in ROUTES.items():
        for name, label in labels.items():
            sections[name] = section
            stages = [f"{stage}_{{seed}}" for stage in _stages_of(name)]
            traces = f"{name}_score_{{seed}}" if name in TRACE_SETS else ""
            evaluation = f"{name}_eval_{{seed}}"
            routes.append(Route(name, label, section, evaluation, stages, traces))
    claims = []
    for better, worse, published in CLAIMS:
        # Of ablations and other students, the route of the later section is the new one.
        section = max(sections[better], sections[worse])
        claims.append(Claim(better, worse, published, section))
    return Study(
        routes,
        sorted(claims, key=lambda claim: claim.section),
        _measures(),
        ranked=TRACE_SETS,
        # Wrong steps that the judge's teacher expects as little as its student have next
        # to no explanation KL.
        ranked_without=[name for name in TRACE_SETS if name.startswith("gullible")],
        ranked_published="The mean rank of a trace set by the RLT reward goes with the "
        "score of its students.",
    )


def _stages_of(name: str) -> list[str]:
    """The stages that train the model of a route, in order."""
    source = name.removesuffix("_cold").removesuffix("_itself")
    task = next((t for t in NEW_TASKS if source.endswith(f"_{t}")), "")
    source, to_large, _ = source.removesuffix(f"_{task}").partition("_to_large")
    cold = [name] * name.endswith("_cold")
    if source == "rl":
        return [name]
    if source.startswith("base"):
        return cold
    if source.startswith("solver"):
        stages = [source]
    else:
        stages = ["gullible_base"] * source.startswith("gullible")
        stages += ["solver"] * (source == "strong")
        _, _, before = TEACHERS.get(source, (None, None, source))
        stages += [before] + [f"{source}_rl"] * (source in TEACHERS)
    if name.endswith("_itself"):
        return stages
    traces = f"{source}_{task}" if task else source
    return [*stages, f"{traces}_traces", f"{traces}{to_large}_distil", *cold]


def _measures() -> list[Measure]:
    """Shares of wrong explanations, rewards of teachers, traces and controls."""
    measures = []

    def add(section: str, label: str, stage: str, key: str) -> None:
        # A summary has only the kinds that occur.
        default = 0.0 if key.startswith("kinds.") else None
        measures.append(Measure(label, section, f"{stage}_{{seed}}", key, default))

    labels = {name: label for part in ROUTES.values() for name, label in part.items()}
    teachers = ("warmup", *TEACHERS, "warmup_letters", "rlt_letters")
    for kind, what in (("wrong", "a wrong step"), ("careful", "all single steps")):
        for name in teachers:
            section = f"Share of explanations with {what}"
            add(section, labels[name], f"{name}_traces", f"kinds.{kind}")
    for when in ("first", "last"):
        for name in TEACHERS:
            section = f"Reward on held-out questions, {when}"
            add(section, labels[name], f"{name}_rl", f"held_out_reward_{when}")
    for name in TRACE_SETS:
        section = "Reward of the traces before one judge (small base)"
        add(section, labels[name], f"{name}_score", "reward")
    for name, judge in (("gullible", "its own student"), ("base", "the small base")):
        section = f"The gullible student's teacher before {judge}"
        add(section, "its explanations", f"{name}_controls", "reward")
        for control in ("empty", "shuffled", "other"):
            add(section, control, f"{name}_controls", f"controls.{control}")
    return measures


PAPER = _paper()
