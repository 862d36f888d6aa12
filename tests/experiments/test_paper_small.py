"""The experiments: what is held out is not trained on, and all of it runs."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import ml_collections
import pytest

from experiments import paper_small
from experiments.compare import compare
from experiments.pages import write_comparison
from experiments.paper_claims import PAPER
from rlt_jax.data.pipeline import load_problems, load_sources
from rlt_jax.data.templates import load_template
from rlt_jax.stages import run_pipeline, stage_sections

CONFIGS = Path(__file__).parents[2] / "configs"
TEMPLATE = load_template("tiny")


def load(file: Path, argument: str = "") -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def data_of(config: ml_collections.ConfigDict, name: str) -> Iterator[tuple[dict, int]]:
    """Generated data sections of that name with the seed of each, no two alike."""
    seen = set()
    for section in stage_sections(config).values():
        data = section.get(name)
        if data is None or data.get("task") in (None, "file"):
            continue
        seed = section.get("seed", config.seed)
        key = json.dumps([data.to_dict(), seed], sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield data.to_dict(), seed


def keys_of(questions: Iterator[str]) -> set:
    """What makes a question: its words, the numbers of a puzzle in any order."""
    keys = set()
    for question in questions:
        asked, _, _ = question.partition(" It is ")
        if asked.startswith("Make "):
            target, _, given = asked.partition(" from ")
            asked = (target, *sorted(given.strip(".").split(", ")))
        keys.add(asked)
    return keys


def sources_of(data: dict, seed: int) -> Iterator[str]:
    if "kinds" not in str(data):
        yield from (p.question for p in load_problems(data, TEMPLATE, seed))
        return
    for source in load_sources(data, TEMPLATE, seed):
        yield from (trace.problem.question for trace in source.traces)


@pytest.mark.slow
def test_what_is_held_out_is_disjoint_from_what_is_trained_on() -> None:
    experiments = paper_small.get_config("0,1")
    held_out, trained = set(), set()
    stages = stage_sections(experiments)
    for data, seed in [
        *data_of(experiments, "data"),
        *data_of(experiments, "held_out"),
    ]:
        split = held_out if data["split"] == "test" else trained
        split |= keys_of(sources_of(data, seed))
    for section in stages.values():
        if section.stage == "evaluate" and not section.evaluate.keep_right:
            assert section.data.split == "test"
        if section.stage == "rl":
            assert (section.data.split, section.held_out.split) == ("train", "test")
        if section.stage in ("sft", "collect") and section.data.task != "file":
            assert section.data.split == "train"
    for base in ("", "small"):
        for data, seed in data_of(load(CONFIGS / "embedded_base.py", base), "data"):
            for source in data.get("sources", {"": data}).values():
                part = {**source, "size": min(source["size"], 3000), "drills": 0}
                part.pop("share", None)
                if part["task"] == "experiments.countdown:traces":
                    del part["drills"]
                trained |= keys_of(sources_of(part, seed))
    assert len(held_out) > 600 and len(trained) > 20_000
    assert not held_out & trained


def test_the_study_names_stages_of_every_seed() -> None:
    stages = stage_sections(paper_small.get_config("7,8"))
    for seed in (7, 8):
        of_seed = {name: x.stage for name, x in stages.items() if x.seed == seed}
        for route in PAPER.routes:
            assert of_seed[route.evaluation.format(seed=seed)] == "evaluate"
            assert {stage.format(seed=seed) for stage in route.stages} <= set(of_seed)
            if route.name in PAPER.ranked:
                assert of_seed[route.traces.format(seed=seed)] == "score"
        for measure in PAPER.measures:
            assert measure.folder.format(seed=seed) in of_seed
    names = {route.name for route in PAPER.routes}
    assert len(names) == len({route.label for route in PAPER.routes}) == 33
    assert {x for claim in PAPER.claims for x in claim[:2]} <= names
    assert set(PAPER.ranked_without) < set(PAPER.ranked) <= names


@pytest.mark.slow
def test_all_stages_run_at_the_smallest_size(tmp_path: Path) -> None:
    config = paper_small.get_config("7")
    for name in config.pipeline:
        section = config[name]
        for data in ("data", "held_out"):
            if section.get(data) is not None and "size" in section[data]:
                section[data].size = 8
        for part, smaller in (
            ("sft", {"steps": 2, "batch_size": 2}),
            ("loop", {"steps": 1, "batch_size": 2, "group_size": 2}),
            ("collect", {"batch_size": 8}),
            ("evaluate", {"batch_size": 8, "keep_right": False}),
        ):
            if part in section:
                section[part].update(smaller)
        if section.stage == "sft" and section.data.task == "file":
            section.data.keep_cut_off = True
        if section.stage == "score":
            section.batch_size = 8
        # A solver of one step has no right answers: its traces are those of a teacher.
        if "/solver" in str(section.data.get("path")):
            section.data.path = "{workdir}/warmup_traces_7/traces.jsonl"
    first = ("warmup_7", "warmup_traces_7")
    rest = [name for name in config.pipeline if name not in first]
    config.pipeline = (*first, *rest)
    run_pipeline(config, tmp_path)
    comparison = compare(tmp_path, PAPER, [7])
    assert write_comparison(tmp_path, comparison).is_file()
    assert len(comparison["claims"]) == len(PAPER.claims)
    assert all(x["verdict"] == "one run only" for x in comparison["claims"])
    for route, stages in ((x.name, x.stages) for x in PAPER.routes):
        cost = comparison["routes"][route]["cost"]
        assert (cost is None) == (not stages)
        assert not stages or cost["trained_tokens"] > 0 < cost["flops"]
