"""Teacher, student and template of a run, and what stages do with them on the host."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rlt_jax.api import jit_score
from rlt_jax.data import examples, pipeline, scoring
from rlt_jax.data.stop_texts import stop_finder
from rlt_jax.data.templates import Problem, Template, load_template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import Engine, EngineConfig, make_engine
from rlt_jax.inference.layout import check_memory
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.scheduler import Request
from rlt_jax.inference.scoring import score_rows
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl.rlt_reward import RLTRewardConfig
from rlt_jax.rl.scorer import Scored, StudentsConfig
from rlt_jax.settings import build
from rlt_jax.training import checkpoint, hosts, provenance, sharding
from rlt_jax.types import Params, Reward, ScoringBatch

# What a policy is asked: to explain a solution, or to find it.
PROMPTS: dict[str, Callable[[Tokenizer, Template, Problem], str]] = {
    "teacher": examples.teacher_prompt,
    "student": lambda tokenizer, template, problem: examples.student_prompt(
        tokenizer, template, problem.question
    ),
}


class Roles(NamedTuple):
    """The frozen things that rows are made with."""

    teacher: checkpoint.LoadedModel
    students: tuple[checkpoint.LoadedModel, ...]
    template: Template
    rows: scoring.RowShape

    @property
    def student_params(self) -> tuple[Params, ...]:
        """Parameters of each student."""
        return tuple(student.params for student in self.students)


def load_roles(config: Mapping[str, Any], mesh: Mesh, seed: int) -> Roles:
    """Loads sections `teacher`, `student` (one or several), `template` and `rows`."""
    rows = load_rows(config, mesh)
    teacher, *students = load_models(config["teacher"], config["student"], mesh, seed)
    return Roles(teacher, tuple(students), load_template(config["template"]), rows)


def load_rows(config: Mapping[str, Any], mesh: Mesh) -> scoring.RowShape:
    """The section `rows`; refuses what the mesh cannot split."""
    rows = build(scoring.RowShape, config["rows"], "rows")
    names = "rows.micro_batch_size, rows.row_length"
    sharding.check_rows(mesh, rows.micro_batch_size, rows.row_length, names)
    return rows


def students_of(section: Any) -> list[Any]:
    """Sections of the students: `student` is None, one or several."""
    if isinstance(section, list | tuple):
        return list(section)
    return [] if section is None else [section]


def load_models(
    first: Any, others: Any, mesh: Mesh, seed: int
) -> list[checkpoint.LoadedModel]:
    """Models of one section, and of None, one or several more."""
    return [
        checkpoint.load(
            build(checkpoint.ModelSource, section, "student" if n else "teacher"),
            mesh,
            jax.random.fold_in(jax.random.key(seed), n),
        )
        for n, section in enumerate([first, *students_of(others)])
    ]


def load_problems(config: Any, template: Template, seed: int) -> list[Problem]:
    """Problems of a `data` section, the same on every host."""
    problems = pipeline.load_problems(config, template, seed)
    hosts.agree_on_items("the problems of the data", problems)
    return problems


def jit_scorer(
    roles: Roles, config: Mapping[str, Any], temperature: float, mesh: Mesh
) -> tuple[Callable[..., Scored], RLTRewardConfig]:
    """Compiles the reward of sections `reward` and `students`; and its settings."""
    reward = build(RLTRewardConfig, config["reward"], "reward")
    students = build(StudentsConfig, config["students"], "students")
    models = [student.model for student in roles.students]
    args = (reward, students, roles.teacher.model, models, temperature, mesh)
    return jit_score(*args), reward


def jit_log_probs(model: Transformer, temperature: float, mesh: Mesh) -> Any:
    """Compiles params, packed rows, spans -> log-probs [M, B, T] for the mesh."""
    return sharding.jit(
        functools.partial(score_rows, model, temperature),
        mesh,
        out_shardings=sharding.batch_sharding(mesh, 1),
    )


def provenance_of(
    teacher: checkpoint.LoadedModel,
    students: Sequence[checkpoint.LoadedModel],
    template: Template,
    teacher_temperature: float,
    student_temperature: float,
) -> dict[str, Any]:
    """What a reward came from: fingerprints of weights, tokenizers and template."""
    return {
        "teacher": provenance.weights_hash(teacher.params),
        "teacher_tokenizer": provenance.tokenizer_hash(teacher.tokenizer),
        "students": [provenance.weights_hash(s.params) for s in students],
        "student_tokenizers": [
            provenance.tokenizer_hash(s.tokenizer) for s in students
        ],
        "template": provenance.template_hash(template),
        "teacher_temperature": teacher_temperature,
        "student_temperature": student_temperature,
    }


def fixed_kl_coef(config: RLTRewardConfig) -> float:
    """The weight of the explanation KL where there is no run to balance it in."""
    if isinstance(config.explanation_kl_coef, str):
        raise UserError(
            f"reward.explanation_kl_coef={config.explanation_kl_coef!r} is for rl and "
            "score; give the number that they logged."
        )
    return config.explanation_kl_coef


def load_engine(
    model: checkpoint.LoadedModel,
    config: Mapping[str, Any],
    mesh: Mesh,
    longest_row: int,
    stop: Sequence[str] = (),
) -> Engine:
    """The engine of sections `sampling` and `engine`, and texts that always stop."""
    sampling = build(SamplingConfig, config["sampling"], "sampling")
    engine = make_engine(
        model.model,
        sampling,
        model.tokenizer.stop_ids,
        build(EngineConfig, config["engine"], "engine"),
        mesh,
        longest_row,
        stop_finder(model.tokenizer, (*stop, *sampling.stop)),
    )
    check_memory(model.model, engine.layout, mesh)
    return engine


def load_policy_engine(
    roles: Roles, config: Mapping[str, Any], mesh: Mesh, form: str = "teacher"
) -> Engine:
    """The engine of the policy; an explanation's closing tag stops a teacher."""
    stop = (roles.template.explanation_tags[1],) if form == "teacher" else ()
    return load_engine(roles.teacher, config, mesh, roles.rows.row_length, stop)


def prompt_ids(
    tokenizer: Tokenizer, template: Template, problem: Problem, form: str = "teacher"
) -> np.ndarray:
    """Ids of the prompt of a policy, one of `PROMPTS`: [T] int32."""
    return tokenizer.encode(PROMPTS[form](tokenizer, template, problem)).ids


def requests_of(
    roles: Roles,
    problems: Sequence[Problem],
    longest: int,
    first: int = 0,
    form: str = "teacher",
) -> list[Request]:
    """A completion of every problem's prompt; request ids count from `first`."""
    tokenizer, template = roles.teacher.tokenizer, roles.template
    prompts = {  # a group has one prompt
        problem: prompt_ids(tokenizer, template, problem, form)
        for problem in dict.fromkeys(problems)
    }
    return [
        Request(prompts[problem], first + n, longest)
        for n, problem in enumerate(problems)
    ]


def scoring_batches(
    roles: Roles, problems: Sequence[Problem], completions: Sequence[np.ndarray]
) -> tuple[tuple[ScoringBatch, ...], int]:
    """A batch for each student, and how many completions were too long for any."""
    pairs = [
        scoring.scoring_batch(
            roles.teacher.tokenizer,
            student.tokenizer,
            roles.template,
            roles.rows,
            problems,
            completions,
        )
        for student in roles.students
    ]
    return tuple(batch for batch, _ in pairs), max(overlong for _, overlong in pairs)


def check_fit(
    roles: Roles,
    sampling: SamplingConfig,
    problems: Sequence[Problem],
    form: str = "teacher",
) -> None:
    """Refuses problems whose prompt and longest completion do not fit in a row."""
    room = roles.rows.row_length - sampling.max_new_tokens
    tokenizer = roles.teacher.tokenizer
    prompts = [prompt_ids(tokenizer, roles.template, p, form) for p in problems]
    what = f"{form} prompt (rows.row_length - sampling.max_new_tokens)"
    examples.check_lengths(prompts, room, what)


def sample_rows(
    roles: Roles,
    form: str,
    problems: Sequence[Problem],
    completions: Sequence[np.ndarray],
    reward: Reward,
    chosen: slice = slice(None),
) -> list[dict[str, Any]]:
    """What a policy wrote and how it was rewarded, as JSON rows."""
    values = jax.device_get(reward)
    tokenizer, result = roles.teacher.tokenizer, []
    for n in range(len(problems))[chosen]:
        problem = problems[n]
        row = {
            "question": problem.question,
            "solution": problem.solution,
            "answer": problem.answer,
        }
        if form == "teacher":
            trace, closed = examples.trace_of(
                tokenizer, roles.template, problem, completions[n]
            )
            row |= {"reasoning_trace": trace.explanation, "closed": closed}
        else:
            row["completion"] = examples.completion_text(tokenizer, completions[n])[0]
        row |= {
            "reward": float(values.value[n]),
            "terms": {name: float(t[n]) for name, t in values.terms.items()},
        }
        result.append(row)
    return result
