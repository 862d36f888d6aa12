"""Tokens and model operations of a stage, computed from the files in its folder.

A token costs two operations per parameter in a forward pass and three times as many in an
update; recomputation and the products of attention are not counted.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pandas as pd

from rlt_jax.costs.flops import forward_flops
from rlt_jax.files import read_json
from rlt_jax.ranges import OneOf, check_value
from rlt_jax.report.files import read_lines
from rlt_jax.settings import build
from rlt_jax.training.checkpoint import ModelSource, shape_of

COSTS = ("decoded_tokens", "scored_tokens", "trained_tokens", "flops")


def stage_cost(folder: Path) -> dict[str, float]:
    """The `COSTS` of a complete sft, rl, collect or evaluate stage.

    Held-out evaluations during training are not counted.

    Raises:
      UserError: the stage is not complete, or is another one.
    """
    read_json(folder / "done.json")
    settings = read_json(folder / "settings.json")
    known = Annotated[str, OneOf(_COSTS)]
    check_value(f"the stage of {folder}", known, settings["stage"])
    counts = _COSTS[settings["stage"]](folder, settings)
    return {name: float(counts.get(name, 0)) for name in COSTS}


def _sft_cost(folder: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    summary = read_json(folder / "done.json").get("summary") or {}
    if summary.get("steps") == 0:  # there were no traces
        return {}
    trained = _totals(folder)["time/step_tokens"]
    return {"trained_tokens": trained, "flops": 3 * trained * _token_flops(folder)}


def _rl_cost(folder: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    loop, policy = settings["loop"], _token_flops(folder)
    students = _student_flops(folder, settings)
    if loop["self_teaching"]:
        students = [policy]
    # The policy scores its completions, unless its only update does; so does a reference.
    passes = bool(students) or loop["updates_per_rollout"] > 1
    if teaching := settings.get("teaching"):
        passes |= teaching["kind"] == "advantage"
        # A teacher reads sequences of about the same length.
        teacher = teaching["teacher"]
        students.append(_token_flops(folder, teacher) if teacher else policy)
    passes += bool(settings["objective"]["beta"])
    scoring = passes * policy + sum(students)
    totals = _totals(folder)
    decoded, scored, trained = (
        totals[f"time/{phase}_tokens"] for phase in ("rollout", "score", "update")
    )
    # Completions of a group share a prompt, which is computed once.
    prompts = (scored - decoded) / loop["group_size"]
    return {
        "decoded_tokens": decoded,
        "scored_tokens": scored if scoring else 0,
        "trained_tokens": trained,
        "flops": (decoded + prompts + 3 * trained) * policy + scored * scoring,
    }


def _collect_cost(folder: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    traces = pd.DataFrame(read_lines(folder / "traces.jsonl"))
    teacher = _token_flops(folder, settings["teacher"])
    scored = (traces["prompt_tokens"] + traces["tokens"]).sum()
    scoring = teacher + sum(_student_flops(folder, settings))
    cost = _sampling_cost(traces, teacher)
    return cost | {"scored_tokens": scored, "flops": cost["flops"] + scored * scoring}


def _evaluate_cost(folder: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    samples = pd.DataFrame(read_lines(folder / "samples.jsonl"))
    return _sampling_cost(samples, _token_flops(folder, settings["model"]))


_COSTS = {
    "sft": _sft_cost,
    "rl": _rl_cost,
    "collect": _collect_cost,
    "evaluate": _evaluate_cost,
}


def _sampling_cost(samples: pd.DataFrame, token_flops: float) -> dict[str, float]:
    """Each question's prompt is computed once for all of its completions."""
    decoded = samples["tokens"].sum()
    prompts = samples.drop_duplicates("question")["prompt_tokens"].sum()
    return {"decoded_tokens": decoded, "flops": (decoded + prompts) * token_flops}


def _totals(folder: Path) -> pd.Series:
    """Every metric of the stage, summed over its steps."""
    return pd.DataFrame(read_lines(folder / "metrics.jsonl")).sum()


def _student_flops(folder: Path, settings: Mapping[str, Any]) -> list[float]:
    """Operations per token of each student."""
    return [_token_flops(folder, student) for student in settings["students"]]


def _token_flops(folder: Path, model: Mapping[str, Any] | None = None) -> float:
    """Operations of a token's forward pass, logits included.

    Args:
      folder: of the stage.
      model: section of the config that names a model; None for the one of the stage.
    """
    source = build(ModelSource, model or {"path": str(folder)}, "model")
    # Of a workdir that was moved, the paths in settings.json are the old ones.
    beside = folder.parent / Path(source.path).name
    if source.path and (beside / "model.json").is_file():
        source = dataclasses.replace(source, path=str(beside))
    return forward_flops(shape_of(source), tokens=1, context=0, head_tokens=1)
