"""Stage `collect`: the trained teacher explains every question with its solution.

Writes `traces.jsonl`, one row a completion, as they are finished: question, solution,
answer, reasoning_trace, closed, reward, its terms, prompt_tokens and tokens of the completion,
its kind where `classify` tells it, and what it came from. The file is read by `sft` and by `score`.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rlt_jax.data.scoring import RowShape
from rlt_jax.inference.engine import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.inference.stored import complete_stored, in_order
from rlt_jax.rl.rlt_reward import RLTRewardConfig
from rlt_jax.rl.scorer import StudentsConfig
from rlt_jax.settings import build, load_function
from rlt_jax.stages.roles import (
    check_fit,
    fixed_kl_coef,
    jit_scorer,
    load_policy_engine,
    load_problems,
    load_roles,
    provenance_of,
    requests_of,
    sample_rows,
    scoring_batches,
)
from rlt_jax.training import checkpoint, hosts, sharding
from rlt_jax.training.metrics import (
    append_jsonl,
    keep_whole_batches,
    progress,
    read_jsonl,
)


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """Settings of the stage.

    Attributes:
      batch_size: completions per device batch.
      samples_per_problem: completions of each problem.
      classify: "module:function" of question and explanation that names the kind of an
        explanation, such as `rlt_jax.data.tasks.arithmetic:kind_of`; "" for none.
    """

    batch_size: int
    samples_per_problem: int = 1
    classify: str = ""


SECTIONS = {
    "teacher": checkpoint.ModelSource,
    "student": None,  # a ModelSource, or several
    "students": StudentsConfig,
    "template": None,
    "data": None,
    "rows": RowShape,
    "sampling": SamplingConfig,
    "engine": EngineConfig,
    "reward": RLTRewardConfig,
    "collect": CollectConfig,
    "mesh": sharding.MeshConfig,
}


def run(config: ml_collections.ConfigDict, workdir: Path, seed: int) -> dict[str, Any]:
    """Writes and scores explanations; goes on where an earlier run stopped.

    Args:
      config: sections `teacher`, `student`, `students`, `template`, `data`, `rows`, `sampling`,
        `reward`, `collect`, `mesh`.
      workdir: folder of the stage.
      seed: of the sampling.

    Returns:
      Number of traces, mean reward, share of closed explanations and of each kind.
    """
    c = build(CollectConfig, config.collect, "collect")
    classify = load_function(c.classify) if c.classify else None
    mesh = sharding.make_mesh(build(sharding.MeshConfig, config.mesh, "mesh"))
    roles = load_roles(config, mesh, seed)
    sampling = build(SamplingConfig, config.sampling, "sampling")
    problems = load_problems(config.data, roles.template, seed)
    check_fit(roles, sampling, problems)
    todo = [problem for problem in problems for _ in range(c.samples_per_problem)]

    teacher = roles.teacher
    engine = load_policy_engine(roles, config, mesh)
    score, reward_config = jit_scorer(roles, config, sampling.temperature, mesh)
    kl_coef = jnp.float32(fixed_kl_coef(reward_config))
    origin = provenance_of(
        teacher,
        roles.students,
        roles.template,
        sampling.temperature,
        reward_config.student_temperature,
    ) | {"explanation_kl_coef": float(kl_coef), "seed": seed}
    file = workdir / "traces.jsonl"
    start = first = keep_whole_batches(file, c.batch_size)
    longest = sampling.max_new_tokens
    requests = requests_of(roles, todo[first:], longest, first)
    stored = workdir / "completions.jsonl"
    key = jax.random.key(seed)
    with progress(first, len(todo), workdir.name, unit="trace") as bar:
        stream = complete_stored(stored, engine, teacher.params, requests, key, bar=bar)
        for batch in in_order(stream, c.batch_size):
            short = c.batch_size - len(batch)
            padded = [one.tokens for one in batch + batch[-1:] * short]
            part = todo[first : first + len(batch)]
            part += part[-1:] * short
            batches, _ = scoring_batches(roles, part, padded)
            batches = sharding.put_rows(batches, mesh)
            reward = score(
                teacher.params, roles.student_params, batches, kl_coef
            ).reward
            rows = sample_rows(
                roles, "teacher", part, padded, reward, slice(0, len(batch))
            )
            for n, row in enumerate(rows):
                row["prompt_tokens"] = len(requests[first - start + n].prompt)
                row["tokens"] = len(batch[n].tokens)
                row["provenance"] = origin
                if classify:
                    row["kind"] = classify(row["question"], row["reasoning_trace"])
            append_jsonl(file, rows)
            first += len(batch)
            bar.update(len(batch))
            hosts.stop_if_asked()

    return hosts.from_first(lambda: _summary(read_jsonl(file)))


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = Counter(row["kind"] for row in rows if "kind" in row)
    return {
        "traces": len(rows),
        "reward": float(np.mean([row["reward"] for row in rows])),
        "closed": float(np.mean([row["closed"] for row in rows])),
        "kinds": {kind: count / len(rows) for kind, count in sorted(kinds.items())},
    }
