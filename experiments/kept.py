"""What a comparison needs of complete stages, in files small enough to be published.

    python -m experiments.kept --workdir=runs/frontier --into=docs/frontier

writes a file for every cell and seed. Stages that a workdir lacks are taken from such
files in its folder `kept`: so the cells of a study can be run on several machines, and its
pictures can be made again without running it.
"""

import argparse
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.costs import stage_cost
from experiments.kinds import form_and_errors, form_of
from experiments.statistics import Record
from rlt_jax.errors import as_user_error
from rlt_jax.files import read_json
from rlt_jax.report.files import read_evaluation, read_lines
from rlt_jax.report.statistics import by_question
from rlt_jax.training.metrics import stream_jsonl

FOLDER = "kept"


def accuracies(folder: Path) -> dict[str, float]:
    """Question -> accuracy of an `evaluate` stage."""
    found = _kept(folder)
    if "accuracies" in found:
        return found["accuracies"]
    return by_question(read_evaluation(folder), str(folder))


def cost(folder: Path) -> dict[str, float]:
    """`stage_cost` of a stage."""
    return _kept(folder).get("cost") or stage_cost(folder)


def summary(folder: Path) -> Record:
    """What a stage has returned."""
    return _kept(folder).get("summary") or read_json(folder / "done.json")["summary"]


def is_complete(folder: Path) -> bool:
    """Whether a stage is complete."""
    return bool(_kept(folder)) or (folder / "done.json").is_file()


def careful(folder: Path) -> dict[str, int]:
    """`careful_counts` of a stage that sampled the base."""
    return _kept(folder).get("careful") or careful_counts(folder)


def judged(folder: Path) -> list[Record]:
    """`judgements` of a `score` stage."""
    return _kept(folder).get("judged") or judgements(folder)


def _kept(folder: Path) -> Record:
    """What is kept of a stage; {} where it is there itself."""
    if (folder / "done.json").is_file():
        return {}
    return _read(folder.parent / FOLDER).get(folder.name, {})


@functools.cache
def _read(folder: Path) -> dict[str, Record]:
    stages: dict[str, Record] = {}
    for file in sorted(folder.glob("*.json")):
        content, what = read_json(file), f"{file}: not what experiments.kept writes"
        with as_user_error(what, LookupError, TypeError, ValueError, ZeroDivisionError):
            for name, stage in content["stages"].items():
                if "right" in stage:
                    questions = content["questions"][stage["asked"]]
                    shares = [right / stage["samples"] for right in stage["right"]]
                    stage["accuracies"] = dict(zip(questions, shares, strict=True))
                stages[name] = stage
    return stages


def careful_counts(folder: Path) -> dict[str, int]:
    """Numbers of careful explanations and right answers among the samples of a stage."""
    counts = {"samples": 0, "careful": 0, "right": 0, "careful and right": 0}
    for row in stream_jsonl(folder / "samples.jsonl"):
        thought = row["completion"].partition("<|end_of_thought|>")[0]
        careful, right = form_of(thought) == "careful", row["correct"]
        counts["samples"] += 1
        counts["careful"] += careful
        counts["right"] += right
        counts["careful and right"] += careful and right
    return counts


def judgements(folder: Path) -> list[Record]:
    """What a student of the reward says of the warmed-up teacher's explanations.

    Returns:
      A record per form of explanation: how many there are, and means of the number of
      tokens, the reward, and per token of the explanation the KL (k1), what surprises the
      student (-log p_S), the same with at most 1 nat a token, and the KL's largest value.
    """
    rows = [_judgement(row) for row in read_lines(folder / "scores.jsonl")]
    table = pd.DataFrame(rows).groupby("explanation")
    return table.mean().assign(count=table.size()).reset_index().to_dict("records")


def _judgement(row: Record) -> Record:
    kls = pd.Series(row["explanation_kl_tokens"])
    surprises = -pd.Series(row["student_log_probs_explanation"])
    return {
        "explanation": form_and_errors(row["question"], row["reasoning_trace"]),
        "tokens": len(kls),
        "reward": row["reward"],
        "KL": kls.mean(),
        "surprise": surprises.mean(),
        "surprise, at most 1": surprises.clip(upper=1).mean(),
        "largest KL": kls.max(),
    }


def content_of(workdir: Path, ending: str) -> Record:
    """The stages of a workdir whose names have an ending, as a file has them.

    Returns:
      `questions`, those of each set that an evaluation asks; and `stages` by name, with
      `cost` and, by kind of stage, the set of questions `asked` and of each how many of
      the `samples` are `right`; the `summary`; `careful`; `judged`.
    """
    questions: list[list[str]] = []
    stages = {}
    for folder in sorted(workdir.glob(f"*{ending}")):
        if not (folder / "done.json").is_file():
            continue
        settings, stage = read_json(folder / "settings.json"), {}
        kind = settings["stage"]
        if kind == "score":
            stage["judged"] = judgements(folder)
        else:
            stage["cost"] = stage_cost(folder)
        if kind == "collect":
            stage["summary"] = read_json(folder / "done.json")["summary"]
        if kind == "evaluate" and not settings["evaluate"]["keep_right"]:
            shares = by_question(read_evaluation(folder), str(folder))
            if [*shares] not in questions:
                questions.append([*shares])
            samples = settings["evaluate"]["samples_per_problem"]
            right = [round(samples * share) for share in shares.values()]
            stage |= {"asked": questions.index([*shares]), "right": right}
            stage["samples"] = samples
        elif folder.name.startswith("rejection_traces"):
            stage["careful"] = careful_counts(folder)
        stages[folder.name] = stage
    return {"questions": questions, "stages": stages}


def write(file: Path, content: Mapping[str, Any]) -> None:
    """A line for each stage and each set of questions."""
    dense = functools.partial(json.dumps, separators=(",", ":"))
    questions = ",\n".join(map(dense, content["questions"]))
    stages = ",\n".join(f'"{name}":{dense(x)}' for name, x in content["stages"].items())
    text = f'{{"questions": [\n{questions}\n],\n"stages": {{\n{stages}\n}}}}\n'
    file.write_text(text, encoding="utf-8")


def main() -> None:
    """Writes the files of a workdir; stages have names such as rlt_d3c0_SEED."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of all seeds")
    parser.add_argument("--into", type=Path, required=True, help="folder of the files")
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)
    endings = {
        "_".join(file.parent.name.rsplit("_", 2)[1:])
        for file in arguments.workdir.glob("*_*_*/done.json")
    }
    for ending in sorted(endings):
        file = arguments.into / f"{ending}.json"
        write(file, content_of(arguments.workdir, f"_{ending}"))
        print(file)


if __name__ == "__main__":
    main()
