"""Stage `score`: the RLT reward of explanations in a file.

Writes `scores.jsonl`, one record a completion in the order of the input, batch by batch; a
run that was cut off continues after the last whole batch. `selected.jsonl` holds those that
the section `select` keeps, ready for `sft`, and `report/index.html` shows the best and the
worst, token by token.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rlt_jax import scoring, watchdog
from rlt_jax.data import controls
from rlt_jax.data.selection import Candidate, SelectionConfig, select
from rlt_jax.data.templates import load_template
from rlt_jax.data.traces import CompletionsConfig, read_completions
from rlt_jax.errors import LOG, UserError, as_user_error
from rlt_jax.ranges import Checked, Count, NonNegativeInt, Temperature
from rlt_jax.records import Problem, Record, history_of, problem_record
from rlt_jax.report.explanations import write_explanations
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig, balanced_kl_coef
from rlt_jax.scoring import TextCompletion, text_completion
from rlt_jax.settings import build
from rlt_jax.stages import setup
from rlt_jax.training import checkpoint, hosts, metrics, sharding


@dataclasses.dataclass(frozen=True)
class ScoreConfig(Checked):
    """Settings of the stage, at the top level of its config.

    Attributes:
      teacher_temperature: divides the teacher's logits.
      batch_size: completions scored at once.
      assume_closed: completions without a closing tag are not penalised.
      per_token: also write tokens and per-token arrays.
      controls: also score what should have a lower reward, see `controls.py`.
      num_examples: number of the best and of the worst explanations shown on the page.
    """

    teacher_temperature: Temperature = 0.7
    batch_size: Count = 32
    assume_closed: bool = False
    per_token: bool = False
    controls: bool = False
    num_examples: NonNegativeInt = 10


Completions = list[TextCompletion]  # of a batch
PARTS = {
    "teacher": checkpoint.ModelSource,
    "students": setup.check_students,
    "ensemble": EnsembleConfig,
    "template": str,
    "data": CompletionsConfig,
    "rlt_reward": RLTRewardConfig,
    "select": SelectionConfig,
    "mesh": sharding.MeshConfig,
}
SECTIONS = PARTS | {field.name: field.type for field in dataclasses.fields(ScoreConfig)}


class Scorer:
    """The models of the stage; turns completions into rows of `scores.jsonl`.

    Attributes:
      c: settings of the stage.
      template: system prompts, tags and delimiters.
      kl_coef: weight of the explanation KL; "auto" until the first batch is scored.
    """

    def __init__(self, c: ScoreConfig, sections: Record, seed: int) -> None:
        self.c, self._sections, self._seed = c, sections, seed
        self._reward = build(RLTRewardConfig, sections["rlt_reward"], "rlt_reward")
        self.kl_coef = self._reward.explanation_kl_coef
        self.template = load_template(sections["template"])
        self._models = setup.open_models(sections, "teacher")
        if len(self._models) == 1:
            raise UserError("students is (): the reward needs one or more.")
        self._renderers = scoring.make_renderers(self._models, self.template)

    def check(self, completions: Iterator[TextCompletion]) -> int:
        """The number of completions; raises UserError where one is too long."""
        first = 0
        while batch := list(itertools.islice(completions, self.c.batch_size)):
            scoring.make_sequences(self._models, self._renderers, batch)
            for name, given in self._controls(batch, first).items():
                with as_user_error(f"config.controls, {name}", UserError):
                    scoring.make_sequences(self._models, self._renderers, given)
            first += len(batch)
            watchdog.progress(f"{first} completions are checked")
        return first

    def load(self) -> None:
        """Loads the weights of the models."""
        sections, c, reward = self._sections, self.c, self._reward
        mesh = setup.load_mesh(sections)
        models = setup.load_weights(sections, "teacher", self._models, mesh, self._seed)
        ensemble = build(EnsembleConfig, sections["ensemble"], "ensemble")
        settings = scoring.ScoringConfig(reward, ensemble, c.teacher_temperature)
        self._score = scoring.make_scorer(models, self._renderers, settings, mesh)
        temperatures = c.teacher_temperature, reward.student_temperature
        self._origin = setup.provenance_of(models, self.template, temperatures)

    def score(self, batch: Completions, per_token: bool = False) -> list[Record]:
        """Scores of at most `batch_size` completions; see `make_scorer`."""
        kl_coef = 0.0 if self.kl_coef == "auto" else self.kl_coef
        return self._score(batch, kl_coef, per_token, self.c.batch_size)

    def rows(self, batch: Completions, first: int) -> list[Record]:
        """Rows for a batch whose first completion has the index `first`."""
        origin = self._origin | {"explanation_kl_coef": self.kl_coef}
        # Null where there is no control, as when all questions of a batch are the same.
        asked = controls.CONTROLS if self.c.controls else ()
        none = dict.fromkeys(f"reward_{name}" for name in asked)
        rows, scores = [], self.score(batch, self.c.per_token)
        for (text, trace, closed), scored in zip(batch, scores, strict=True):
            problem, explanation = trace
            row = {"completion": text, "reasoning_trace": explanation, "closed": closed}
            share = controls.copied_share(explanation, problem.solution)
            row |= scored | none | {"copied_share": share, "provenance": origin}
            rows.append(problem_record(problem) | row)
        for name, given in self._controls(batch, first).items():
            for row, scored in zip(rows, self.score(given), strict=True):
                row[f"reward_{name}"] = scored["reward"]
        return rows

    def _controls(self, batch: Completions, first: int) -> dict[str, Completions]:
        """Control -> a completion for each of the batch; {} where none are asked for."""
        if not self.c.controls:
            return {}
        texts = [completion.text for completion in batch]
        problems = [completion.trace.problem for completion in batch]
        closing, seed = self.template.explanation_tags[1], [self._seed, first]
        replaced = controls.controlled(texts, problems, closing, seed)
        return {
            name: [text_completion(self.template, *pair, True) for pair in pairs]
            for name, pairs in replaced.items()
        }


def run(config: ConfigDict, workdir: Path, seed: int) -> Record:
    """Scores completions; continues where an earlier run stopped.

    Returns:
      Number of completions and of traces selected, mean rewards of completions and of
      controls, and the KL weight.

    Raises:
      UserError: there is no completion to score.
    """
    scorer, source, total = prepare(config, seed)
    c, selection = scorer.c, build(SelectionConfig, config.select, "select")
    file = workdir / "scores.jsonl"
    asked = (one.trace.problem.question for one in _completions(source, scorer))
    first = metrics.keep_whole_batches(file, c.batch_size, asked)
    if first and scorer.kl_coef == "auto":
        begun = hosts.from_first(lambda: next(metrics.stream_jsonl(file)))
        scorer.kl_coef = begun["provenance"]["explanation_kl_coef"]
    scorer.load()
    left = itertools.islice(_completions(source, scorer), first, None)
    write_scores(scorer, left, file, first, total)
    selected = workdir / "selected.jsonl"
    # From here on all processes read what process 0 has written.
    hosts.from_first(lambda: selected.unlink(missing_ok=True))

    candidates: list[Candidate] = []
    rewards: dict[str, list[float]] = {name: [] for name in controls.CONTROLS}
    for row in metrics.stream_jsonl(file):
        for name, values in rewards.items():
            if row.get(f"reward_{name}") is not None:
                values.append(row[f"reward_{name}"])
        question = json.dumps(row.get("prompt", row["question"]))
        scored = row["reward"], row["student_tokens"], row["closed"]
        candidates.append(Candidate(question, *scored))
    kept = set(select(selection, candidates))
    chosen = (row for n, row in enumerate(metrics.stream_jsonl(file)) if n in kept)
    while rows := list(itertools.islice(chosen, c.batch_size)):
        metrics.append_jsonl(selected, rows)
    order = sorted(range(len(candidates)), key=lambda n: -candidates[n].reward)
    count = c.num_examples
    shown = [n for i, n in enumerate(order) if i < count or i >= len(order) - count]
    _write_examples(scorer, file, shown, workdir / "report")
    return {
        "completions": len(candidates),
        "reward": float(np.mean([candidate.reward for candidate in candidates])),
        "selected": len(kept),
        "explanation_kl_coef": scorer.kl_coef,
        "controls": {name: float(np.mean(x)) for name, x in rewards.items() if x},
    }


def prepare(config: ConfigDict, seed: int) -> tuple[Scorer, CompletionsConfig, int]:
    """The models without weights, what they score, and the number of completions.

    Raises:
      UserError: bad input, or there is no completion to score.
    """
    sections = config.to_dict()
    values = {name: sections[name] for name in SECTIONS.keys() - PARTS.keys()}
    scorer = Scorer(build(ScoreConfig, values, "config"), sections, seed)
    source = build(CompletionsConfig, sections["data"], "data")
    total = scorer.check(_completions(source, scorer))
    if not total:
        raise UserError(
            f"{source.path}: there is nothing to score; write one or more texts into the "
            "`completions` of a row, or a `reasoning_trace` instead."
        )
    return scorer, source, total


def write_scores(
    scorer: Scorer, todo: Iterator[TextCompletion], file: Path, first: int, total: int
) -> None:
    """Scores completions batch by batch and appends a row for each.

    Args:
      scorer: models and settings.
      todo: completions that are left to score.
      file: where rows are appended.
      first: number of rows in the file.
      total: number of completions, those in the file included, where it is known.
    """
    with metrics.progress(first, total, "score", unit="completion") as bar:
        while batch := list(itertools.islice(todo, scorer.c.batch_size)):
            hosts.agree_on_items("the completions of the data", batch)
            if scorer.kl_coef == "auto":
                scorer.kl_coef = balanced_kl_coef(*_sizes(scorer.score(batch)))
            rows = scorer.rows(batch, first)
            if not first:
                score, divergence = map(np.mean, _sizes(rows))
                kl_coef = scorer.kl_coef
                LOG.info(
                    f"first batch: solution score {score:.4g}, explanation KL "
                    f"{divergence:.4g} times {kl_coef:.4g} = {divergence * kl_coef:.4g}"
                )
            metrics.append_jsonl(file, rows)
            first += len(rows)
            bar.update(len(rows))
            hosts.stop_if_asked()
        # A process whose data ends earlier than that of others is an error.
        hosts.agree_on_items("the completions of the data", [])


def _sizes(rows: list[Record]) -> list[list[float]]:
    """Solution scores and explanation KLs of rows."""
    names = "solution_score", "explanation_kl"
    return [[row["terms"][name] for row in rows] for name in names]


def _completions(source: CompletionsConfig, scorer: Scorer) -> Iterator[TextCompletion]:
    template, closed = scorer.template, scorer.c.assume_closed
    for problem, texts in read_completions(source.path, template, source.on_bad_row):
        for text in texts:
            yield text_completion(template, problem, text, closed)


def _write_examples(scorer: Scorer, file: Path, shown: list[int], folder: Path) -> None:
    """Scores some rows of a file once more, token by token, for the page."""
    rows = dict.fromkeys(shown)
    rows |= {n: row for n, row in enumerate(metrics.stream_jsonl(file)) if n in rows}
    chosen, examples = list(rows.values()), []
    for start in range(0, len(chosen), scorer.c.batch_size):
        part, batch = chosen[start : start + scorer.c.batch_size], []
        for row in part:
            problem = Problem(row["question"], row["solution"], history=history_of(row))
            text, closed = row["completion"], row["closed"]
            batch.append(text_completion(scorer.template, problem, text, closed))
        scored = scorer.score(batch, per_token=True)
        examples += [row | tokens for row, tokens in zip(part, scored, strict=True)]
    if hosts.is_first():
        write_explanations(examples, folder)
