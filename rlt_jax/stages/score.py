"""Stage `score`: the RLT reward of explanations in a file.

Writes `scores.jsonl`, one record a completion in the order of the input, batch by batch; a
run that was cut off continues after the last whole batch. `selected.jsonl` holds those that
the section `select` keeps, ready for `sft`, and `report/index.html` shows the best and the
worst, token by token.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from rlt_jax import api
from rlt_jax.api import ScoringConfig, TextCompletion, text_completion
from rlt_jax.data import controls
from rlt_jax.data.examples import Renderer, student_examples
from rlt_jax.data.selection import Candidate, SelectionConfig, select
from rlt_jax.data.templates import Problem, Template, Trace, load_template
from rlt_jax.data.traces import read_completions
from rlt_jax.errors import UserError
from rlt_jax.report.explanations import write_explanations
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig, balanced_kl_coef
from rlt_jax.settings import build
from rlt_jax.stages import setup
from rlt_jax.training import checkpoint, hosts, sharding
from rlt_jax.training.metrics import (
    append_jsonl,
    keep_whole_batches,
    progress,
    stream_jsonl,
)

_LOG = logging.getLogger("rlt_jax")


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Settings of the stage, at the top level of its config.

    Attributes:
      teacher_temperature: divides the teacher's logits.
      batch_size: completions scored at once.
      assume_closed: completions without a closing tag are not penalised.
      per_token: also write tokens and per-token arrays.
      controls: also score empty, shuffled and foreign explanations.
      num_examples: number of the best and of the worst explanations shown on the page.
    """

    teacher_temperature: float = 0.7
    batch_size: int = 32
    assume_closed: bool = False
    per_token: bool = False
    controls: bool = False
    num_examples: int = 10


PARTS = {
    "teacher": checkpoint.ModelSource,
    "students": None,  # a tuple of ModelSource sections
    "ensemble": EnsembleConfig,
    "template": None,
    "data": {"path": None},
    "rlt_reward": RLTRewardConfig,
    "select": SelectionConfig,
    "mesh": sharding.MeshConfig,
}
SECTIONS = PARTS | {field.name: None for field in dataclasses.fields(ScoreConfig)}


class Judge(NamedTuple):
    """Everything that turns completions into output records.

    Attributes:
      score: see `api.make_scorer`.
      count_tokens: tokens of a trace's student sequence.
      template: system prompts, tags and delimiters.
      origin: provenance of the rewards.
      c: settings of the stage.
      seed: seed of the controls.
    """

    score: Callable[..., list[dict[str, Any]]]
    count_tokens: Callable[[Trace], int]
    template: Template
    origin: dict[str, Any]
    c: ScoreConfig
    seed: int


def run(config: ml_collections.ConfigDict, workdir: Path, seed: int) -> dict[str, Any]:
    """Scores completions; goes on where an earlier run stopped.

    Returns:
      Number of completions and of traces selected, mean rewards of completions and of
      controls, and the KL weight.

    Raises:
      UserError: there is no completion to score.
    """
    values = config.to_dict()
    sections = {name: values.pop(name) for name in PARTS}
    c = build(ScoreConfig, values, "config")
    reward = build(RLTRewardConfig, sections["rlt_reward"], "rlt_reward")
    selection = build(SelectionConfig, sections["select"], "select")
    judge = _load_judge(c, sections, reward, seed)
    file = workdir / "scores.jsonl"
    first = keep_whole_batches(file, c.batch_size)
    kl_coef = reward.explanation_kl_coef
    if first and kl_coef == "auto":
        kl_coef = hosts.from_first(
            lambda: next(stream_jsonl(file))["provenance"]["explanation_kl_coef"]
        )
    todo = _completions(sections["data"]["path"], judge.template, c.assume_closed)
    todo = itertools.islice(todo, first, None)
    if not write_scores(judge, todo, kl_coef, file, first):
        raise UserError(
            f"{sections['data']['path']}: there is nothing to score; write one or more "
            "texts into the `completions` of a row, or a `reasoning_trace` instead."
        )
    selected = workdir / "selected.jsonl"
    # From here on all processes read what process 0 has written.
    hosts.from_first(lambda: selected.unlink(missing_ok=True))

    candidates, kl_coef = [], 0.0
    rewards: dict[str, list[float]] = {name: [] for name in controls.CONTROLS}
    for row in stream_jsonl(file):
        for name, values in rewards.items():
            if row.get(f"reward_{name}") is not None:
                values.append(row[f"reward_{name}"])
        candidates.append(
            Candidate(row["question"], row["reward"], row["student_tokens"])
        )
        kl_coef = row["provenance"]["explanation_kl_coef"]
    kept = set(select(selection, candidates))
    for n, row in enumerate(stream_jsonl(file)):
        if n in kept:
            append_jsonl(selected, [row])
    _write_examples(judge, file, candidates, kl_coef, workdir / "report")
    return {
        "completions": len(candidates),
        "reward": float(np.mean([candidate.reward for candidate in candidates])),
        "selected": len(kept),
        "explanation_kl_coef": kl_coef,
        "controls": {name: float(np.mean(x)) for name, x in rewards.items() if x},
    }


def write_scores(
    judge: Judge,
    todo: Iterator[TextCompletion],
    kl_coef: float | str,
    file: Path,
    first: int,
) -> int:
    """Scores traces batch by batch and appends a row for each.

    Args:
      judge: models and settings.
      todo: what is left to score.
      kl_coef: weight of the explanation KL; "auto" is settled on the first batch.
      file: where rows are appended.
      first: how many it holds.

    Returns:
      How many it holds then.
    """
    size = judge.c.batch_size
    with progress(first, None, "score", unit="completion") as bar:
        while batch := _next_batch(todo, size):
            # A last, smaller batch is filled up: nothing is compiled for its size.
            padded = batch + batch[-1:] * (size - len(batch))
            if kl_coef == "auto":
                terms = [row["terms"] for row in judge.score(padded, 0.0)]
                kl_coef = balanced_kl_coef(
                    [t["solution_score"] for t in terms],
                    [t["explanation_kl"] for t in terms],
                )
            rows = _rows(judge, padded, kl_coef, first)[: len(batch)]
            if not first:
                _log_sizes(rows, kl_coef)
            append_jsonl(file, rows)
            first += len(rows)
            bar.update(len(rows))
            hosts.stop_if_asked()
    return first


def _next_batch(todo: Iterator[TextCompletion], size: int) -> list[TextCompletion]:
    """Up to `size` of them, the same on every host."""
    batch = list(itertools.islice(todo, size))
    hosts.agree_on_items("the completions of the data", batch)
    return batch


def _rows(
    judge: Judge, batch: Sequence[TextCompletion], kl_coef: float, first: int
) -> list[dict[str, Any]]:
    scored = judge.score(batch, kl_coef, per_token=judge.c.per_token)
    foreign = _controls(judge, batch, kl_coef, first) if judge.c.controls else {}
    rows = []
    for n, completion in enumerate(batch):
        problem, explanation = completion.trace
        rows.append(
            {
                "question": problem.question,
                "solution": problem.solution,
                "answer": problem.answer,
                "completion": completion.text,
                "reasoning_trace": explanation,
                "closed": completion.closed,
                **scored[n],
                **{f"reward_{name}": values[n] for name, values in foreign.items()},
                "copied_share": controls.copied_share(explanation, problem.solution),
                "student_tokens": judge.count_tokens(completion.trace),
                "provenance": judge.origin | {"explanation_kl_coef": kl_coef},
            }
        )
    return rows


def _controls(
    judge: Judge, batch: Sequence[TextCompletion], kl_coef: float, first: int
) -> dict[str, list[float | None]]:
    """Control -> reward of each completion's control, None where there is none."""
    problems = [completion.trace.problem for completion in batch]
    closing = judge.template.explanation_tags[1]
    replaced = controls.controlled(
        [completion.text for completion in batch],
        [problem.question for problem in problems],
        closing,
        [judge.seed, first],
    )
    result = {}
    for name, texts in replaced.items():
        traces = [
            text_completion(
                judge.template, problem, text or closing, assume_closed=True
            )
            for problem, text in zip(problems, texts, strict=True)
        ]
        rewards = [row["reward"] for row in judge.score(traces, kl_coef)]
        pairs = zip(rewards, texts, strict=True)
        result[name] = [None if text is None else reward for reward, text in pairs]
    return result


def _load_judge(
    c: ScoreConfig, sections: dict[str, Any], reward: RLTRewardConfig, seed: int
) -> Judge:
    mesh = sharding.make_mesh(build(sharding.MeshConfig, sections["mesh"], "mesh"))
    template = load_template(sections["template"])
    teacher, *students = setup.load_models(sections, "teacher", mesh, seed)
    if not students:
        raise UserError("students is (): the reward needs one or more.")
    ensemble = build(EnsembleConfig, sections["ensemble"], "ensemble")
    scoring = ScoringConfig(reward, ensemble, c.teacher_temperature)
    temperatures = c.teacher_temperature, reward.student_temperature
    renderer = Renderer(students[0].tokenizer, template, "student")
    return Judge(
        score=api.make_scorer(teacher, students, template, scoring, mesh),
        count_tokens=lambda trace: len(student_examples(renderer, [trace])[0].tokens),
        template=template,
        origin=setup.provenance_of(teacher, students, template, *temperatures),
        c=c,
        seed=seed,
    )


def _completions(
    path: str, template: Template, assume_closed: bool
) -> Iterator[TextCompletion]:
    for _, problem, completions in read_completions(path, template):
        for text in completions:
            yield text_completion(template, problem, text, assume_closed)


def _log_sizes(rows: list[dict[str, Any]], kl_coef: float) -> None:
    score = np.mean([row["terms"]["solution_score"] for row in rows])
    divergence = np.mean([row["terms"]["explanation_kl"] for row in rows])
    _LOG.info(
        f"first batch: solution score {score:.4g}, explanation KL {divergence:.4g} times "
        f"{kl_coef:.4g} = {divergence * kl_coef:.4g}"
    )


def _write_examples(
    judge: Judge, file: Path, candidates: list[Candidate], kl_coef: float, folder: Path
) -> None:
    """Scores the best and the worst once more, token by token, for the page."""
    order = sorted(range(len(candidates)), key=lambda n: -candidates[n].reward)
    count = judge.c.num_examples
    shown = list(dict.fromkeys(order[:count] + order[-count:]))
    wanted = set(shown)
    rows = {n: row for n, row in enumerate(stream_jsonl(file)) if n in wanted}
    size = judge.c.batch_size
    examples = []
    for start in range(0, len(shown), size):
        part = [rows[n] for n in shown[start : start + size]]
        traces = [
            text_completion(
                judge.template,
                Problem(row["question"], row["solution"]),
                row["completion"],
                row["closed"],
            )
            for row in part
        ]
        traces += traces[-1:] * (size - len(traces))
        scored = judge.score(traces, kl_coef, per_token=True)[: len(part)]
        examples += [row | tokens for row, tokens in zip(part, scored, strict=True)]
    if hosts.is_first():
        write_explanations(examples, folder)
