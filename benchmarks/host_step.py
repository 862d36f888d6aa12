"""Host time of an RL step: encoding prompts, decoding completions, packing.

    python benchmarks/host_step.py --tokenizer=DIR --data=train.jsonl

16 prompts of about 512 tokens with 64 completions each, 264 to 770 tokens long and made
of GSM8K's worked answers, one student with the tokenizer of the policy. Prints the median
seconds of each phase over five steps, the first of which is left out; every step starts
with new renderers, so that no prompt is cached. `--tokenizer` is a Hugging Face tokenizer
folder with a chat template, `--data` GSM8K as published.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlt_jax.data import rows
from rlt_jax.data.examples import Renderer
from rlt_jax.data.rows import RowShape
from rlt_jax.data.templates import Template, load_template
from rlt_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlt_jax.inference import sampler
from rlt_jax.records import Problem
from rlt_jax.stages.setup import requests_of
from rlt_jax.types import Rollout

PROMPTS, GROUP, PROMPT, LENGTH = 16, 64, 512, 512
STEPS = 6


class Run(NamedTuple):
    """What `rows.pack` reads of a run."""

    row_shape: RowShape
    renderer: Renderer
    student_renderers: Sequence[Renderer]

    @property
    def student_limit(self) -> int:
        """Longest sequence of a student."""
        return self.row_shape.row_length


def main() -> None:
    """Times the steps and prints a line a phase."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    tokenizer, template = load_tokenizer(options.tokenizer), load_template("rlt")
    problems, completions = workload(tokenizer, template, Path(options.data))
    times = [step(tokenizer, template, problems, completions) for _ in range(STEPS)]
    for phase in times[0]:
        median = statistics.median(one[phase] for one in times[1:])
        print(f"{phase:10} {median:.3f} s")


def workload(
    tokenizer: Tokenizer, template: Template, data: Path
) -> tuple[list[Problem], list[np.ndarray]]:
    """A problem for each completion, and the ids of the completions."""
    records = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    ids = tokenizer.encode(" ".join(one["answer"] for one in records[:1500])).ids
    closing = tokenizer.encode(template.explanation_tags[1]).ids
    renderer = Renderer(tokenizer, template, "teacher")
    rng, problems, completions = np.random.default_rng(0), [], []
    for n in range(PROMPTS):
        part = records[20 * n : 20 * n + 20]
        question, solution = (
            " ".join(one["question"] for one in part),
            part[0]["answer"],
        )
        without = len(renderer.prompt(Problem("", solution))[1].ids)
        end = int(tokenizer.encode(question).offsets[PROMPT - without, 1])
        problems += [Problem(question[:end], solution)] * GROUP
    for length in rng.integers(LENGTH // 2, LENGTH * 3 // 2, PROMPTS * GROUP):
        start = rng.integers(len(ids) - length)
        ending = np.append(closing, tokenizer.eos_id)
        completions.append(np.append(ids[start : start + length], ending))
    return problems, [tokens.astype(np.int32) for tokens in completions]


def step(
    tokenizer: Tokenizer,
    template: Template,
    problems: Sequence[Problem],
    completions: Sequence[np.ndarray],
) -> dict[str, float]:
    """Seconds of each phase of a step."""
    student = Renderer(tokenizer, template, "student")
    teacher = Renderer(tokenizer, template, "teacher")
    run = Run(RowShape(16, 2048), teacher, (student,))
    began = time.perf_counter()
    requests = requests_of(run.renderer, problems, 1024)
    encoded = time.perf_counter()
    log_probs = [np.zeros(len(tokens), np.float32) for tokens in completions]
    rollout = Rollout(requests, completions, log_probs, np.ones(len(requests), bool))
    rollout = sampler.decode(rollout, tokenizer)
    decoded = time.perf_counter()
    rows.pack(rollout, run)
    packed = time.perf_counter()
    return {
        "prompts": encoded - began,
        "decode": decoded - encoded,
        "pack": packed - decoded,
        "total": packed - began,
    }


if __name__ == "__main__":
    main()
