"""Stage `collect`: the trained teacher explains every question with its solution.

Writes `traces.jsonl`, one record a completion, as they end: question, solution, answer,
reasoning_trace, closed, reward, its terms, prompt_tokens and tokens of the completion,
its kind where `classify` gives one, and its provenance. `sft` and `score` read the file.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from rlt_jax.data import pipeline, rows
from rlt_jax.errors import UserError
from rlt_jax.inference import layout, log_probs, sampler
from rlt_jax.ranges import Checked, Count
from rlt_jax.records import Problem, Record
from rlt_jax.rl.rewards import RLT, Term
from rlt_jax.settings import build, load_function
from rlt_jax.stages import setup
from rlt_jax.training import checkpoint, hosts, metrics, sharding


@dataclasses.dataclass(frozen=True)
class CollectConfig(Checked):
    """Settings of the stage.

    Attributes:
      batch_size: completions scored at once.
      samples_per_problem: completions of each problem.
      classify: "module:function" of a function (question, explanation) -> kind; "" for
        none.
    """

    batch_size: Count
    samples_per_problem: Count = 1
    classify: str = ""


TRACE = {"reward": float | None, "closed": bool}  # types in a row of `traces.jsonl`
SECTIONS = setup.SECTIONS | {
    "teacher": checkpoint.ModelSource,
    "data": pipeline.check_problems,
    "collect": CollectConfig,
}


def run(config: ConfigDict, workdir: Path, seed: int) -> Record:
    """Samples and scores explanations; continues where an earlier run stopped.

    Args:
      config: sections as in `SECTIONS`.
      workdir: folder of the stage.
      seed: seed of the sampling.

    Returns:
      Number of traces, mean reward, fraction of closed explanations and of each kind.
    """
    c = build(CollectConfig, config.collect, "collect")
    classify, run, opened, problems = prepare(config, seed)
    mesh, kl_coef = run.mesh, run.rlt_reward.explanation_kl_coef
    teacher, *students = setup.load_weights(config, "teacher", opened, mesh, seed)
    layout.check_memory(teacher.model, run.sampler.layout, mesh)
    asked = [problem for problem in problems for _ in range(c.samples_per_problem)]
    temperatures = run.sampling.temperature, run.rlt_reward.student_temperature
    origin = setup.provenance_of([teacher, *students], run.template, temperatures)
    origin |= {"explanation_kl_coef": kl_coef, "seed": seed}

    file = workdir / "traces.jsonl"
    first = metrics.keep_whole_batches(file, c.batch_size, [p.question for p in asked])
    requests, key = run.requests(asked[first:], first), jax.random.key(seed)
    params = [student.params for student in students]
    with metrics.progress(first, len(asked), workdir.name, unit="trace") as bar:
        source = run.stored(workdir / "completions.jsonl", bar=bar)
        stream = source.stream(teacher.params, requests, key)
        for rollout in sampler.in_order(stream, c.batch_size):
            batch = sharding.put_rows(rows.pack(rollout, run, c.batch_size), mesh)
            batch = log_probs.fill(run.programs, batch, teacher.params, params)
            reward = run.reward.rlt(batch, np.float32(kl_coef))
            records = setup.sample_records(run, rollout, reward)
            columns = zip(records, rollout.requests, rollout.tokens, strict=True)
            for record, request, tokens in columns:
                record |= {"prompt_tokens": len(request.prompt), "tokens": len(tokens)}
                record["provenance"] = origin
                if classify:
                    explanation = record["reasoning_trace"]
                    record["kind"] = classify(record["question"], explanation)
            metrics.append_jsonl(file, records)
            bar.update(len(records))
            hosts.stop_if_asked()
    return hosts.from_first(lambda: _summary(metrics.read_jsonl(file, TRACE)))


def prepare(
    config: ConfigDict, seed: int
) -> tuple[Callable | None, setup.Run, list[checkpoint.LoadedModel], list[Problem]]:
    """The function of `classify`, models without weights and data of the stage.

    Raises:
      UserError: bad input.
    """
    path = config.collect.get("classify")
    classify = load_function(path, 2) if path else None
    opened = setup.open_models(config, "teacher")
    run = setup.load_run(config, "teacher", opened, [Term(RLT, 1.0, None)])
    if isinstance(kl_coef := run.rlt_reward.explanation_kl_coef, str):
        key = f"rlt_reward.explanation_kl_coef={kl_coef!r}"
        raise UserError(f"{key} is for rl and score; give the number that they logged.")
    problems = setup.load_problems(config.data, run.template, seed)
    setup.check_fit(run, problems)
    return classify, run, opened, problems


def _summary(records: list[Record]) -> Record:
    kinds = Counter(record["kind"] for record in records if "kind" in record)
    return {
        "traces": len(records),
        "reward": float(np.mean(np.array([x["reward"] for x in records], float))),
        "closed": float(np.mean([record["closed"] for record in records])),
        "kinds": {k: count / len(records) for k, count in sorted(kinds.items())},
    }
