"""The runner: which stages it runs, skips, keeps and refuses; most stages are stubs."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pytest

from rlt_jax.errors import UserError
from rlt_jax.stages import preflight, report, run_pipeline, sft, stage_sections
from rlt_jax.training import private_jax

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.py"))


class Stage:
    """Stands in for `sft.run`: counts, writes a file, and fails where told to."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: dict[str, BaseException] = {}

    def __call__(
        self, config: ml_collections.ConfigDict, folder: Path, seed: int
    ) -> dict[str, Any]:
        self.ran.append(folder.name)
        if isinstance(self.fails.get(folder.name), UserError):
            raise self.fails[folder.name]
        with (folder / "work").open("a", encoding="utf-8") as work:
            work.write("x")
        if folder.name in self.fails:
            raise self.fails[folder.name]
        return {"path": config.options.path, "seed": seed}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stand_in = Stage()
    monkeypatch.setattr(sft, "run", stand_in)
    monkeypatch.setattr(sft, "SECTIONS", {"options": None})
    monkeypatch.delattr(sft, "prepare")
    return stand_in


def config_of(**sections: Any) -> ml_collections.ConfigDict:
    """A config whose pipeline is all of the sections."""
    return ml_collections.ConfigDict(
        {"seed": 7, "pipeline": tuple(sections), **sections}
    )


def section_of(path: str = "data") -> dict[str, Any]:
    return {"stage": "sft", "options": {"path": path, "sizes": (1, 2.5)}}


@pytest.fixture
def config() -> ml_collections.ConfigDict:
    return config_of(a=section_of(), b=section_of("{workdir}/a"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def done(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "done.json").read_text(encoding="utf-8"))


def test_stages_run_in_order_and_leave_what_they_did(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    run_pipeline(config, tmp_path)
    assert stage.ran == ["a", "b"]
    assert done(tmp_path / "a")["summary"] == {"path": "data", "seed": 7}
    assert done(tmp_path / "b")["summary"] == {"path": f"{tmp_path}/a", "seed": 7}
    assert done(tmp_path / "b")["stage"] == "sft"
    assert done(tmp_path / "b")["seconds"] >= 0
    assert done(tmp_path / "b")["peak_gib"] > 0
    written = json.loads((tmp_path / "b" / "settings.json").read_text("utf-8"))
    assert written["options"] == {"path": f"{tmp_path}/a", "sizes": [1, 2.5]}


def test_complete_stages_are_skipped(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    run_pipeline(config, tmp_path)
    before = contents(tmp_path)
    run_pipeline(config, tmp_path)
    assert stage.ran == ["a", "b"]
    assert contents(tmp_path) == before


def test_a_stage_that_was_cut_off_goes_on_in_its_folder(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    stage.fails["b"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, tmp_path)
    assert not (tmp_path / "b" / "done.json").exists()
    stage.fails.clear()
    run_pipeline(config, tmp_path)
    assert stage.ran == ["a", "b", "b"]
    assert (tmp_path / "b" / "work").read_text(encoding="utf-8") == "xx"


def test_sessions_of_a_stage_are_counted(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    stage.fails["b"] = KeyboardInterrupt()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(config, tmp_path)
    stage.fails.clear()
    run_pipeline(config, tmp_path)
    assert [done(tmp_path / name)["sessions"] for name in "ab"] == [1, 3]
    assert not list(tmp_path.rglob("sessions.json"))
    # Of a folder without a count only that it was begun is known.
    (tmp_path / "b" / "done.json").unlink()
    run_pipeline(config, tmp_path)
    assert done(tmp_path / "b")["sessions"] == 2
    run_pipeline(config, tmp_path, only="b")
    assert done(tmp_path / "b")["sessions"] == 1


def test_stages_that_read_from_one_that_ran_afresh_run_afresh(
    stage: Stage, tmp_path: Path
) -> None:
    config = config_of(
        a=section_of(),
        b=section_of("{workdir}/a/traces.jsonl"),
        c=section_of("a"),  # a name is no path
        d=section_of(f"{tmp_path}/b"),
    )
    run_pipeline(config, tmp_path)
    run_pipeline(config, tmp_path, only="a")
    stage.ran.clear()
    run_pipeline(config, tmp_path)
    assert stage.ran == ["b", "d"]
    assert {"b.1", "d.1"} < {path.name for path in tmp_path.iterdir()}
    assert done(tmp_path / "b")["sessions"] == done(tmp_path / "b.1")["sessions"] == 1
    run_pipeline(config, tmp_path)
    assert stage.ran == ["b", "d"]
    # Half of the work on an earlier input is of no use.
    run_pipeline(config, tmp_path, only="a")
    stage.fails["b"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, tmp_path)
    run_pipeline(config, tmp_path, only="a")
    stage.fails.clear()
    run_pipeline(config, tmp_path)
    assert (tmp_path / "b" / "work").read_text(encoding="utf-8") == "x"


@pytest.mark.parametrize("spelling", ["{workdir}//a", "{workdir}/./a/", "run/a"])
def test_the_folder_of_a_stage_can_be_spelled_in_other_ways(
    spelling: str, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(a=section_of(), b=section_of(spelling))
    run_pipeline(config, tmp_path / "run")
    run_pipeline(config, tmp_path / "run", only="a")
    run_pipeline(config, tmp_path / "run")
    assert stage.ran == ["a", "b", "a", "b"]


def test_stages_of_earlier_versions_did_not_keep_what_they_read(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    run_pipeline(config, tmp_path)
    file = tmp_path / "b" / "done.json"
    file.write_text(json.dumps({**done(file.parent), "inputs": {"a": "earlier"}}))
    run_pipeline(config, tmp_path)
    assert stage.ran == ["a", "b", "b"]
    old = done(file.parent)
    del old["inputs"]
    file.write_text(json.dumps(old))
    run_pipeline(config, tmp_path)
    assert stage.ran == ["a", "b", "b"]


def test_the_report_names_the_stages_that_it_reads(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "run", stage)
    monkeypatch.setattr(report, "SECTIONS", {"options": None})
    monkeypatch.setattr(preflight, "check_stages", lambda *_: None)
    config = config_of(a=section_of(), b=section_of(), report=section_of("a"))
    config.report.stage = "report"
    run_pipeline(config, tmp_path)
    for name in ("b", "a"):
        run_pipeline(config, tmp_path, only=name)
        stage.ran.clear()
        run_pipeline(config, tmp_path)
        assert stage.ran == ["report"] * (name == "a")


def test_only_runs_one_stage_afresh_and_keeps_the_old_folders(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    run_pipeline(config, tmp_path)
    first, other = contents(tmp_path / "a"), contents(tmp_path / "b")
    run_pipeline(config, tmp_path, only="a")
    second = contents(tmp_path / "a")
    run_pipeline(config, tmp_path, only="a")
    assert stage.ran == ["a", "b", "a", "a"]
    assert contents(tmp_path / "a.1") == first
    assert contents(tmp_path / "a.2") == second
    assert (tmp_path / "a" / "work").read_text(encoding="utf-8") == "x"
    assert contents(tmp_path / "b") == other


def test_only_goes_on_with_a_stage_that_was_cut_off(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    stage.fails["a"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, tmp_path)
    stage.fails.clear()
    run_pipeline(config, tmp_path, only="a")
    assert stage.ran == ["a", "a"]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "run.json"}
    assert (tmp_path / "a" / "work").read_text(encoding="utf-8") == "xx"


def test_changed_settings_are_refused_with_the_first_difference(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    run_pipeline(config, tmp_path)
    before = contents(tmp_path)
    config.b.options.path, config.b.options.sizes = "elsewhere", (1, 3.5)
    with pytest.raises(UserError) as error:
        run_pipeline(config, tmp_path)
    assert "options.path was '{workdir}/a', is 'elsewhere'" in str(error.value)
    assert "--only=b" in str(error.value)
    assert contents(tmp_path) == before
    run_pipeline(config, tmp_path, only="b")
    assert done(tmp_path / "b")["summary"]["path"] == "elsewhere"
    assert contents(tmp_path / "b.1") == {
        name.removeprefix("b/"): value
        for name, value in before.items()
        if name.startswith("b/")
    }


@pytest.mark.parametrize("terms", [{"copy": {}}, {"rlt": {}, "copy": {}}, {}])
def test_keys_without_settings_of_their_own_are_compared(
    terms: dict[str, Any],
    stage: Stage,
    config: ml_collections.ConfigDict,
    tmp_path: Path,
) -> None:
    config.b.options.terms = {"rlt": {}}
    run_pipeline(config, tmp_path)
    changed = config.to_dict()
    changed["b"]["options"]["terms"] = terms
    with pytest.raises(UserError, match=r"settings \(options.terms"):
        run_pipeline(ml_collections.ConfigDict(changed), tmp_path)
    assert stage.ran == ["a", "b"]


def test_a_section_may_have_its_own_seed(stage: Stage, tmp_path: Path) -> None:
    config = config_of(a=section_of() | {"seed": 3}, b=section_of())
    run_pipeline(config, tmp_path)
    assert done(tmp_path / "a")["summary"]["seed"] == 3
    assert done(tmp_path / "b")["summary"]["seed"] == 7


def test_another_seed_is_another_setting(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    run_pipeline(config, tmp_path)
    config.seed = 8
    with pytest.raises(UserError, match="seed was 7, is 8"):
        run_pipeline(config, tmp_path)


def test_bad_input_found_before_any_work_leaves_no_folder(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    stage.fails["b"] = UserError("no such data")
    with pytest.raises(UserError, match="no such data"):
        run_pipeline(config, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "run.json"}
    stage.fails.clear()
    config.b.options.path = "mended"
    run_pipeline(config, tmp_path)
    assert stage.ran == ["a", "b", "b"]


def test_bad_input_found_later_keeps_the_work(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    stage.fails["b"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, tmp_path)
    before = contents(tmp_path)
    stage.fails["b"] = UserError("the disk is full")
    with pytest.raises(UserError, match="disk"):
        run_pipeline(config, tmp_path)
    begun = [json.loads(before.pop("b/sessions.json"))]
    after = contents(tmp_path)
    begun.append(json.loads(after.pop("b/sessions.json")))
    inputs = {"a": done(tmp_path / "a")["finished"]}
    kept = {"inputs": inputs, "workdir": str(tmp_path)}
    assert begun == [{"sessions": n, **kept} for n in (1, 2)]
    assert after == before


def test_a_config_may_be_one_stage(stage: Stage, tmp_path: Path) -> None:
    run_pipeline(ml_collections.ConfigDict({"seed": 7, **section_of()}), tmp_path)
    assert stage.ran == ["sft"]
    assert done(tmp_path / "sft")["summary"] == {"path": "data", "seed": 7}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("seed"), "config.seed=None: a whole number, at least 0."),
        (lambda c: c.pop("pipeline"), "needs a 'stage', or a 'pipeline'"),
        (lambda c: c.pop("b"), "config.pipeline names 'b', config.b is missing"),
        (lambda c: c.update(b=3), "config.b is 3, not the section of a stage"),
        (lambda c: c["b"].update(stage="sfx"), "config.b.stage='sfx': one of sft, rl"),
        (lambda c: c["b"].pop("stage"), "config.b.stage=None"),
        (lambda c: c["b"].update(optoins={}), "config.b: unknown key 'optoins'"),
        (lambda c: c["b"].pop("options"), "config.b: the key 'options' is missing"),
    ],
)
def test_a_wrong_config_is_refused_before_the_first_stage(
    change: Callable[[dict[str, Any]], Any],
    message: str,
    stage: Stage,
    config: ml_collections.ConfigDict,
    tmp_path: Path,
) -> None:
    values = config.to_dict()
    change(values)
    with pytest.raises(UserError) as error:
        run_pipeline(ml_collections.ConfigDict(values), tmp_path / "run")
    assert message in str(error.value)
    assert stage.ran == []
    assert not (tmp_path / "run").exists()


def test_only_of_an_unknown_stage_names_the_known_ones(
    stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--only=c: the config has a, b"):
        run_pipeline(config, tmp_path / "run", only="c")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_have_the_keys_of_their_stages(file: Path) -> None:
    # Without an argument the recipe for one's own data lacks a model.
    config = load_config(file, *(["gsm8k"] if file.stem == "rlt" else []))
    sections = stage_sections(config)
    assert list(sections) == list(config.get("pipeline") or [config.stage])


@pytest.mark.parametrize("student", ["7b", "32b:v5e:8x16", "32b:h200:8"])
def test_the_recipe_of_distillation_takes_a_student(student: str) -> None:
    size, _, topology = student.partition(":")
    (section,) = stage_sections(
        load_config(CONFIGS[0].with_name("distil.py"), student)
    ).values()
    assert section.model.path == f"Qwen/Qwen2.5-{size.upper()}-Instruct"
    assert section.mesh.tensor == {"": 2, "v5e:8x16": 8, "h200:8": 8}[topology]


def test_the_recipe_of_distillation_knows_its_students() -> None:
    with pytest.raises(UserError, match=r"distil.py:v5e:8x16: begin with 7b or 32b"):
        load_config(CONFIGS[0].with_name("distil.py"), "v5e:8x16")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "warmup.sft.step",
            "config.warmup.sft: unknown key 'step' (did you mean 'steps'?)",
        ),
        (
            "rl.loop.stepz",
            "config.rl.loop: unknown key 'stepz' (did you mean 'steps'?); known keys: steps",
        ),
        ("rl.rlt_reward.lamda", "config.rl.rlt_reward: unknown key 'lamda'"),
        ("eval_base.mesh.rows", "config.eval_base.mesh: unknown key 'rows'"),
        ("report.pictures", "config.report: unknown key 'pictures'"),
    ],
)
def test_unknown_keys_are_found_in_every_depth(path: str, message: str) -> None:
    config = load_config(CONFIGS[-1].with_name("quickstart.py"))
    config.update_from_flattened_dict({path: 1})
    with pytest.raises(UserError) as error:
        stage_sections(config)
    assert message in str(error.value)


def test_several_processes_need_a_file_system(
    stage: Stage, config: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "--workdir=hf://datasets/a/b: this run cannot work there. Name a folder"
    with pytest.raises(UserError, match=message):
        run_pipeline(config, "hf://datasets/a/b")
    monkeypatch.setattr(private_jax, "num_processes", lambda: 2)
    for workdir in ("gs://bucket/my/run", Path("gs://bucket/my/run"), "s3://b/run"):
        with pytest.raises(UserError, match="gcsfuse and name the folder: docs/pods"):
            run_pipeline(config, workdir)
    assert not stage.ran


@pytest.mark.parametrize("workdir", ["", "file", "file/x/y", "x" * 300])
def test_a_workdir_is_a_folder(
    workdir: str,
    stage: Stage,
    config: ml_collections.ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--workdir={workdir[:99]}.*: .*(folder|long)"):
        run_pipeline(config, workdir)
    assert not stage.ran


@pytest.mark.parametrize("value", [np.int64(5), np.float32(0.5), {1}, Path("x")])
def test_values_that_are_no_json_are_refused(
    value: Any, stage: Stage, config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    config.b.options = {"x": value}
    with pytest.raises(UserError, match=": give plain JSON values"):
        run_pipeline(config, tmp_path / "run")


def load_config(file: Path, *arguments: str) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)
