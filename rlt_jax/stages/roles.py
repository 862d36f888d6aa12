"""Teacher, student and template of a run, and what stages do with them on the host."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rlt_jax.data import examples, scoring
from rlt_jax.data.stop_texts import stop_finder
from rlt_jax.data.templates import Problem, Template, load_template
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import Engine, EngineConfig, make_engine
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.scheduler import Request
from rlt_jax.rl.rlt_reward import RLTRewardConfig
from rlt_jax.rl.scorer import Scored, StudentsConfig, jit_score
from rlt_jax.settings import build
from rlt_jax.training import checkpoint, provenance
from rlt_jax.types import Params, Reward, ScoringBatch


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
    rows = build(scoring.RowShape, config["rows"], "rows")
    teacher, *students = load_models(config, mesh, seed)
    return Roles(teacher, tuple(students), load_template(config["template"]), rows)


def load_models(
    config: Mapping[str, Any], mesh: Mesh, seed: int
) -> list[checkpoint.LoadedModel]:
    """The teacher, then every student of a config."""
    students = config["student"]
    several = students if isinstance(students, list | tuple) else [students]
    return [
        checkpoint.load(
            build(checkpoint.ModelSource, section, "teacher" if not n else "student"),
            mesh,
            jax.random.fold_in(jax.random.key(seed), n),
        )
        for n, section in enumerate([config["teacher"], *several])
    ]


def jit_scorer(
    roles: Roles, config: Mapping[str, Any], temperature: float
) -> tuple[Callable[..., Scored], RLTRewardConfig]:
    """Compiles the reward of sections `reward` and `students`; and its settings."""
    reward = build(RLTRewardConfig, config["reward"], "reward")
    students = build(StudentsConfig, config["students"], "students")
    models = [student.model for student in roles.students]
    return jit_score(reward, students, roles.teacher.model, models, temperature), reward


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
    return make_engine(
        model.model,
        sampling,
        model.tokenizer.stop_ids,
        build(EngineConfig, config["engine"], "engine"),
        mesh,
        longest_row,
        stop_finder(model.tokenizer, (*stop, *sampling.stop)),
    )


def load_explainer(roles: Roles, config: Mapping[str, Any], mesh: Mesh) -> Engine:
    """The engine of the teacher; the explanation's closing tag stops it."""
    closing = roles.template.explanation_tags[1]
    length = roles.rows.row_length
    return load_engine(roles.teacher, config, mesh, length, (closing,))


def explanation_requests(
    roles: Roles, problems: Sequence[Problem], longest: int, first: int = 0
) -> list[Request]:
    """An explanation of every problem; request ids count from `first`."""
    return [
        Request(teacher_prompt_ids(roles, problem), first + n, longest)
        for n, problem in enumerate(problems)
    ]


def teacher_prompt_ids(roles: Roles, problem: Problem) -> np.ndarray:
    """Ids of the teacher's prompt, [T] int32."""
    tokenizer = roles.teacher.tokenizer
    text = examples.teacher_prompt(tokenizer, roles.template, problem)
    return tokenizer.encode(text).ids


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
    roles: Roles, sampling: SamplingConfig, problems: Sequence[Problem]
) -> None:
    """Refuses problems whose prompt and longest completion do not fit in a row."""
    room = roles.rows.row_length - sampling.max_new_tokens
    prompts = [teacher_prompt_ids(roles, problem) for problem in problems]
    what = "teacher prompt (rows.row_length - sampling.max_new_tokens)"
    examples.check_lengths(prompts, room, what)


def sample_rows(
    roles: Roles,
    problems: Sequence[Problem],
    completions: Sequence[np.ndarray],
    reward: Reward,
    chosen: slice = slice(None),
) -> list[dict[str, Any]]:
    """What the teacher wrote and how it was rewarded, as JSON rows."""
    values = jax.device_get(reward)
    result = []
    for n in range(len(problems))[chosen]:
        problem = problems[n]
        trace, closed = examples.trace_of(
            roles.teacher.tokenizer, roles.template, problem, completions[n]
        )
        result.append(
            {
                "question": problem.question,
                "solution": problem.solution,
                "answer": problem.answer,
                "reasoning_trace": trace.explanation,
                "closed": closed,
                "reward": float(values.value[n]),
                "terms": {name: float(t[n]) for name, t in values.terms.items()},
            }
        )
    return result
