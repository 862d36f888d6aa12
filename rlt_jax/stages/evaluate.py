"""Stage `evaluate`: answers to held-out questions are sampled, or read, and graded.

Writes `samples.jsonl`, every completion with its verdict, and `results.json`; where asked
for also `traces.jsonl`, the right completions for `sft` to learn from.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from ml_collections import ConfigDict

from rlt_jax import files, stores
from rlt_jax.data import pipeline
from rlt_jax.data.boxes import final_answer
from rlt_jax.data.examples import Renderer
from rlt_jax.data.predictions import read_predictions
from rlt_jax.data.templates import Template, load_template
from rlt_jax.errors import UserError, as_user_error
from rlt_jax.inference import layout, sampler, sampling, stored
from rlt_jax.inference.engine import Engine, EngineConfig
from rlt_jax.ranges import Checked, Count, OneOf
from rlt_jax.records import Problem, Record, problem_record
from rlt_jax.report import statistics
from rlt_jax.report.files import ANSWER, read_evaluation
from rlt_jax.rl.grading import check_gradable, grade
from rlt_jax.rl.math_answers import Verdict
from rlt_jax.scoring import make_solution_scorer
from rlt_jax.settings import Section, build
from rlt_jax.stages import setup
from rlt_jax.training import checkpoint, hosts, metrics, sharding
from rlt_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Checked):
    """Settings of the stage.

    Attributes:
      batch_size: rows of samples.jsonl written at once.
      samples_per_problem: k, completions of each question; of predictions, as many as
        there are.
      untagged: what happens to a completion without the template's solution tags:
        "wrong", or "whole", all of its text is graded.
      compare_with: folder of another evaluation of the same questions, or its
        samples.jsonl; "" for none.
      keep_right: whether right completions with a thought are written as traces.
      solution_log_probs: whether also to compute the log-probability of each problem's own
        solution, after the thought that was sampled and after none: it tells smaller
        effects than the accuracy. Problems without an answer are then not graded.
    """

    batch_size: Count
    samples_per_problem: Count = 1
    untagged: Annotated[str, OneOf(("wrong", "whole"))] = "wrong"
    compare_with: str = ""
    keep_right: bool = False
    solution_log_probs: bool = False


# A model without its weights, the renderer of its prompts, and its sampler.
Opened = tuple[checkpoint.LoadedModel, Renderer, Engine]
SECTIONS = {
    "model": checkpoint.ModelSource,
    "template": str,
    "data": pipeline.check_problems,
    "predictions": str,  # a path, "" for none
    "sampling": sampling.SamplingConfig,
    "engine": EngineConfig,
    "evaluate": EvaluateConfig,
    "mesh": sharding.MeshConfig,
}


def run(config: ConfigDict, workdir: Path, seed: int) -> Record:
    """Samples and grades answers; continues where an earlier run stopped.

    Args:
      config: sections `model`, `template`, `data`, `sampling`, `engine`, `evaluate`,
        `mesh`; and `predictions`, a file of completions, with which no model is loaded.
      workdir: folder of the stage.
      seed: seed of the sampling.

    Returns:
      What `results.json` holds, see `summarise`.
    """
    c = build(EvaluateConfig, config.evaluate, "evaluate")
    template = load_template(config.template)
    problems, predictions, other, opened_model = prepare(config, seed)
    k = len(predictions[0]) if predictions else c.samples_per_problem
    texts = [text for of_question in predictions for text in of_question]
    opened, scorer = "", None
    asked = [problem for problem in problems for _ in range(k)]
    file = workdir / "samples.jsonl"
    questions, size = [problem.question for problem in asked], c.batch_size
    first = metrics.keep_whole_batches(file, size, questions)
    with metrics.progress(first, len(asked), workdir.name, unit="sample") as bar:
        if texts:
            # Of predictions only the texts are known.
            unknown = Rollout([], [], [], np.zeros(0, bool))
            starts = range(first, len(texts), size)
            batches = (unknown._replace(texts=texts[n : n + size]) for n in starts)
        else:
            model, renderer, engine = opened_model
            mesh, opened = setup.load_mesh(config), renderer.opened
            key = jax.random.key(seed)
            source = build(checkpoint.ModelSource, config.model, "model")
            params = checkpoint.load_params(source, model.model, mesh, key)
            layout.check_memory(model.model, engine.layout, mesh)
            loaded = model._replace(params=params)
            if c.solution_log_probs:
                scorer = make_solution_scorer(loaded, renderer, size, mesh)
            limit = config.sampling.max_new_tokens
            requests = setup.requests_of(renderer, asked, limit)[first:]
            sampled = workdir / "completions.jsonl"
            vocab = model.model.config.vocab_size
            kept = stored.StoredSampler(engine, sampled, model.tokenizer, bar, vocab)
            batches = sampler.in_order(kept.stream(params, requests, key), size)
        for rollout in batches:
            part = asked[first : first + len(rollout.texts)]
            found = scorer(part, rollout.texts) if scorer else [{}] * len(part)
            args = template, c.untagged, part, rollout, found
            hosts.from_first(lambda x=args: metrics.append_jsonl(file, _graded(*x)))
            first += len(part)
            bar.update(len(part))
            hosts.stop_if_asked()

    def write_results() -> Record:
        rows = metrics.read_jsonl(file, ANSWER)
        results = summarise(rows, len(problems))
        if c.keep_right:
            traces = workdir / "traces.jsonl"
            results["traces"] = _write_right(traces, template, opened, rows)
        if other:
            ours = statistics.by_question(rows, str(file))
            names = ("this one", c.compare_with)
            difference = statistics.compare(ours, other, names)._asdict()
            results["difference"] = {"compared_with": c.compare_with, **difference}
        files.write_json(workdir / "results.json", results)
        return results

    return hosts.from_first(write_results)


def summarise(rows: Sequence[Section], questions: int) -> Record:
    """What the rows of `samples.jsonl` say, those of a question side by side.

    Returns:
      accuracy (pass@1, the mean over samples and questions) with its standard error
      over questions, pass_at_<k> for powers of two and majority_at_<k>, each with a
      `_standard_error`, of the questions with an answer; `SOLUTION_LOG_PROBS` likewise,
      where they were computed; and counts.
    """
    k = len(rows) // questions
    results = _accuracies([row for row in rows if row["correct"] is not None], k)
    for name in statistics.SOLUTION_LOG_PROBS:
        if name in rows[0]:
            values = np.array([row[name] for row in rows], float).reshape(-1, k)
            means = values.mean(axis=1)
            results |= statistics.means_with_errors({name: means[np.isfinite(means)]})
    errors = Counter(row["error"] for row in rows)
    lengths = [row["tokens"] for row in rows]
    has_lengths = None not in lengths  # predictions have none
    unread = [row for row in rows if row["read"] is None and row["error"] is None]
    return results | {
        "num_questions": questions,
        "samples_per_question": k,
        "unreadable": sum(row["correct"] is not None for row in unread),
        "timed_out": errors["timeout"],
        "crashed": errors["crash"],
        "truncated": sum(row["truncated"] for row in rows) if has_lengths else None,
        "mean_tokens": float(np.mean(lengths)) if has_lengths else None,
    }


def _accuracies(rows: Sequence[Section], k: int) -> Record:
    """What `summarise` says of graded rows, k of every question."""
    if not rows:
        return {"accuracy": None, "standard_error": None, "num_graded": 0}
    correct = np.array([row["correct"] for row in rows]).reshape(-1, k)
    votes = np.array([row["read"] for row in rows], object).reshape(-1, k)
    powers = [2**i for i in range(k.bit_length())]
    scores = {f"pass_at_{n}": statistics.pass_at_k(correct, n) for n in powers}
    scores[f"majority_at_{k}"] = statistics.majority_at_k(correct, votes)
    accuracy, error = statistics.mean_and_error(correct.mean(axis=1))
    results = {"accuracy": accuracy, "standard_error": error}
    return results | statistics.means_with_errors(scores) | {"num_graded": len(correct)}


def prepare(
    config: ConfigDict, seed: int
) -> tuple[list[Problem], list[list[str]], dict[str, float], Opened | None]:
    """The problems, predictions of each, the evaluation to compare with, and the model.

    The model is None where there are predictions.

    Raises:
      UserError: bad input.
    """
    c = build(EvaluateConfig, config.evaluate, "evaluate")
    template = load_template(config.template)
    problems = [
        problem._replace(answer=problem.answer or final_answer(problem.solution))
        for problem in setup.load_problems(config.data, template, seed)
    ]
    check_gradable([p for p in problems if p.answer or not c.solution_log_probs])
    if config.predictions and c.solution_log_probs:
        raise UserError("evaluate.solution_log_probs needs a model, no predictions.")
    other = _read_other(c.compare_with, problems)
    if config.predictions:
        predictions = read_predictions(config.predictions, problems)
        hosts.agree_on_items("the predictions", predictions)
        return problems, predictions, other, None
    mesh = setup.load_mesh(config)
    opened = checkpoint.open_model(build(checkpoint.ModelSource, config.model, "model"))
    renderer = Renderer(opened.tokenizer, template, "student")
    limit = config.sampling.max_new_tokens
    prompts = [len(renderer.prompt(problem)[1].ids) for problem in problems]
    context = opened.model.config.max_length
    setup.check_room(prompts, limit, context, "question", "the model's context")
    engine = setup.load_sampler(opened, config, mesh, max(prompts) + limit)
    return problems, [], other, (opened, renderer, engine)


def _graded(
    template: Template,
    untagged: str,
    problems: Sequence[Problem],
    rollout: Rollout,
    found: Sequence[Record],
) -> list[Record]:
    """Rows of `samples.jsonl`: completions with verdicts, and what else was found."""
    extracted = [template.solution_of(text) for text in rollout.texts]
    if untagged == "whole":
        pairs = zip(extracted, rollout.texts, strict=True)
        extracted = [whole if text is None else text for text, whole in pairs]
    gradable = [n for n, problem in enumerate(problems) if problem.answer]
    graded = grade([problems[n] for n in gradable], [extracted[n] for n in gradable])
    verdicts, sampled = dict(zip(gradable, graded, strict=True)), bool(rollout.tokens)
    records = []
    for n, problem in enumerate(problems):
        verdict = verdicts.get(n, Verdict(None))
        row = {"completion": rollout.texts[n], "extracted": extracted[n]}
        row |= {"read": verdict.answer, "correct": verdict.correct}
        row["error"] = verdict.error
        row["prompt_tokens"] = len(rollout.requests[n].prompt) if sampled else None
        row["tokens"] = len(rollout.tokens[n]) if sampled else None
        row["truncated"] = not rollout.finished[n] if sampled else None
        records.append(problem_record(problem) | row | found[n])
    return records


def _write_right(file: Path, template: Template, begun: str, rows: list[Record]) -> int:
    """Writes right completions that have a thought as traces; returns their number.

    The thought may begin in the prompt, with the text `begun`.
    """
    file.unlink(missing_ok=True)
    traces, names = [], ("question", "answer", "prompt")
    for row in (row for row in rows if row["correct"]):
        thought = template.thought_of(begun + row["completion"])
        solution = template.solution_of(row["completion"])
        if thought is not None and solution is not None:
            kept = {key: row[key] for key in names if key in row}
            traces.append(kept | {"solution": solution, "reasoning_trace": thought})
    metrics.append_jsonl(file, traces)
    return len(traces)


def _read_other(path: str, problems: Sequence[Problem]) -> dict[str, float]:
    """Question -> accuracy of another evaluation; {} without a path."""
    if not path:
        return {}
    questions = {problem.question for problem in problems}
    if len(questions) < len(problems):
        raise UserError(
            "evaluate.compare_with: evaluations are compared by the text of the question,"
            f" but {len(problems)} problems of the data have only {len(questions)} "
            "different ones."
        )
    place = Path(stores.local(path, depth=1))
    with as_user_error("evaluate.compare_with", OSError):
        if not place.is_file() and not (place / "done.json").is_file():
            raise UserError(
                f"evaluate.compare_with={path!r}: there is no {place / 'done.json'}; name "
                "the folder of a complete evaluate stage, or its samples.jsonl."
            )
    rows = metrics.read_jsonl(place) if place.is_file() else read_evaluation(place)
    other = statistics.by_question(rows, path)
    statistics.check_same_questions(questions, other, ("this one", path))
    return other
