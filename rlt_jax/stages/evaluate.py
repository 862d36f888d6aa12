"""Stage `evaluate`: a student answers held-out questions, the answers are graded.

Writes `samples.jsonl`, every completion with its verdict, and `results.json`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from rlt_jax.data import examples
from rlt_jax.data.templates import load_template
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.scheduler import Request
from rlt_jax.inference.stored import complete_stored, in_order
from rlt_jax.rl.grading import is_correct
from rlt_jax.settings import build
from rlt_jax.stages.roles import load_engine, load_problems
from rlt_jax.training import checkpoint, hosts, sharding
from rlt_jax.training.metrics import (
    append_jsonl,
    keep_whole_batches,
    progress,
    read_jsonl,
)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the stage.

    Attributes:
      batch_size: rows of samples.jsonl written at once.
      samples_per_problem: k, completions of each question.
    """

    batch_size: int
    samples_per_problem: int = 1


SECTIONS = {
    "model": checkpoint.ModelSource,
    "template": None,
    "data": None,
    "sampling": SamplingConfig,
    "engine": EngineConfig,
    "evaluate": EvaluateConfig,
    "mesh": sharding.MeshConfig,
}


def run(config: ml_collections.ConfigDict, workdir: Path, seed: int) -> dict[str, Any]:
    """Samples and grades answers; goes on where an earlier run stopped.

    Args:
      config: sections `model`, `template`, `data`, `sampling`, `engine`, `evaluate`,
        `mesh`.
      workdir: folder of the stage.
      seed: of the sampling.

    Returns:
      Accuracy (pass@1, the mean over samples and questions), its standard error over
      questions, and the counts.
    """
    c = build(EvaluateConfig, config.evaluate, "evaluate")
    mesh = sharding.make_mesh(build(sharding.MeshConfig, config.mesh, "mesh"))
    source = build(checkpoint.ModelSource, config.model, "model")
    loaded = checkpoint.load(source, mesh, jax.random.key(seed))
    tokenizer = loaded.tokenizer
    template = load_template(config.template)
    problems = load_problems(config.data, template, seed)
    if any(problem.answer is None for problem in problems):
        raise UserError("evaluate: the data needs an 'answer' for every question.")
    prompts = [
        tokenizer.encode(examples.student_prompt(tokenizer, template, p.question)).ids
        for p in problems
    ]
    longest = config.sampling.max_new_tokens
    room = loaded.model.config.max_length - longest
    what = "question (model max_length - sampling.max_new_tokens)"
    examples.check_lengths(prompts, room, what)
    todo = [i for i in range(len(problems)) for _ in range(c.samples_per_problem)]
    requests = [Request(prompts[i], n, longest) for n, i in enumerate(todo)]

    longest_row = max(map(len, prompts)) + longest
    engine = load_engine(loaded, config, mesh, longest_row)
    file = workdir / "samples.jsonl"
    first = keep_whole_batches(file, c.batch_size)
    stored = workdir / "completions.jsonl"
    key = jax.random.key(seed)
    with progress(first, len(todo), workdir.name, unit="sample") as bar:
        stream = complete_stored(
            stored, engine, loaded.params, requests[first:], key, bar=bar
        )
        for batch in in_order(stream, c.batch_size):
            part = todo[first : first + len(batch)]
            texts = [examples.completion_text(tokenizer, c.tokens)[0] for c in batch]
            append_jsonl(
                file, [_verdict(template, problems[i], t) for i, t in zip(part, texts)]
            )
            first += len(batch)
            bar.update(len(batch))
            hosts.stop_if_asked()

    def write_results() -> dict[str, float]:
        correct = np.array([row["correct"] for row in read_jsonl(file)], float)
        results = summarise(correct.reshape(len(problems), c.samples_per_problem))
        text = json.dumps(results, indent=1) + "\n"
        (workdir / "results.json").write_text(text, encoding="utf-8")
        return results

    return hosts.from_first(write_results)


def summarise(correct: np.ndarray) -> dict[str, float]:
    """Accuracy and its standard error over questions, from verdicts [questions, k]."""
    per_question = correct.mean(axis=1)
    questions, samples = correct.shape
    spread = per_question.std(ddof=1) if questions > 1 else 0.0
    return {
        "accuracy": float(per_question.mean()),
        "standard_error": float(spread / np.sqrt(questions)),
        "num_questions": questions,
        "samples_per_question": samples,
    }


def _verdict(template: Any, problem: Any, completion: str) -> dict[str, Any]:
    extracted = template.solution_of(completion)
    return {
        "question": problem.question,
        "answer": problem.answer,
        "completion": completion,
        "extracted": extracted,
        "correct": is_correct(extracted, problem.answer),
    }
