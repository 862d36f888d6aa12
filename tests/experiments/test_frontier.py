"""The frontier: stages read what was made before, compute is equal, numbers by hand."""

import json
from pathlib import Path

import pytest

from experiments import (
    frontier,
    frontier_claims,
    frontier_plots,
    frontier_tables,
    kept,
    pages,
)
from experiments.compare import compare
from experiments.frontier_cells import Cell
from rlt_jax.errors import UserError
from rlt_jax.settings import resolve
from rlt_jax.stages import run_pipeline, stage_sections
from rlt_jax.stages.preflight import stages_read

PNG = b"\x89PNG\r\n\x1a\n"


def test_stages_read_what_was_made_before_from_other_questions() -> None:
    config = frontier.get_config("7,8")
    made = set()
    for name, section in stage_sections(config).items():
        values = json.loads(section.to_json().replace("{workdir}", "/runs"))
        assert {*stages_read(values, "/runs")} <= made, name
        made.add(name)
        data = section.data.to_dict()
        splits = {
            x["split"] for x in data.get("sources", {"": data}).values() if "split" in x
        }
        solves = section.stage == "evaluate" and not section.evaluate.keep_right
        assert splits <= {"test" if solves else "train"}
    for seed in (7, 8):
        for cell in frontier.CELLS:
            for route in frontier_claims._routes(cell):
                folders = (route.evaluation, *route.stages)
                assert {folder.format(seed=seed) for folder in folders} <= made


def test_parts_cells_and_quick_choose_stages() -> None:
    config = frontier.get_config("7")
    resolve(config)
    everything = set(config.pipeline)
    of_parts = []
    for part in frontier.PARTS:
        config.parts = (part,)
        of_parts.append(set(config.pipeline))
    assert set.union(*of_parts) == everything
    assert sum(map(len, of_parts)) == len(everything)
    config.parts, config.cells = frontier.PARTS, ("d1c0",)
    assert {"rlt_d1c0_7", "kl_10_d1c0_7"} <= {*config.pipeline}
    assert all("_d1c0_" in name for name in config.pipeline)
    config.cells, config.quick = ("d3c1", "d1c0"), True
    quick = set(config.pipeline)
    assert {"habit_d3c1_7", "warm_quarter_d3c1_7", "rlt_eval_quarter_d3c1_7"} <= quick
    assert all("_d3c1_" in name for name in quick)
    assert not {name for name in quick if "on_itself" in name or "solved" in name}
    assert quick <= everything
    config.cells = ("d3c0",)
    with pytest.raises(UserError, match="config.quick leave no stage"):
        stage_sections(config)
    config.cells = ("d9c0",)
    with pytest.raises(UserError, match="config.cells='d9c0': one of d3c2000"):
        stage_sections(config)


def test_a_part_of_the_compute_only_where_it_can_suffice() -> None:
    all_of_them, some = [*frontier.ROUTES], [*frontier.WITH_LESS]
    assert frontier.routes_of(Cell(3, 0.0), "") == all_of_them
    assert frontier.routes_of(Cell(3, 0.2), "_quarter") == all_of_them
    assert frontier.routes_of(Cell(3, 0.0001), "_quarter") == some
    stages = frontier._parts(Cell(1, 0.0), 7)["frontier"]
    assert {"rejection_d1c0", "rlt_clip_rl_quarter_d1c0"} <= stages.keys()
    assert "rejection_traces_quarter_d1c0" not in stages


def test_a_habit_has_its_share_of_careful_steps() -> None:
    for share in (0.0, 0.0005, 0.2):
        kinds = Cell(3, share).kinds
        assert sum(kinds.values()) == pytest.approx(1)
        assert kinds.get("careful", 0) == share
    assert Cell(3, 0.0005).name == "d3c5" and Cell(1, 0.2).name == "d1c2000"


def test_compute_to_an_accuracy_by_hand() -> None:
    points = [(0.0, 0.1), (4.0, 0.2), (8.0, 0.6), (9.0, 0.4)]
    assert frontier_tables.compute_to(points, 0.4) == pytest.approx(6)
    assert frontier_tables.compute_to(points, 0.05) == 0
    assert frontier_tables.compute_to(points, 0.7) is None


def made_up(seeds: tuple[int, ...]) -> dict:
    """A comparison with two routes in two cells, one of them with a part of compute."""

    def numbers(mean: float, flops: float | None) -> dict:
        over_runs = [mean - 0.1, mean + 0.1] if len(seeds) > 1 else None
        cost = {"flops": flops} if flops else None
        runs = {
            "over_runs": over_runs,
            "each_run": dict.fromkeys(map(str, seeds), mean),
        }
        return {"mean": mean, "cost": cost, **runs}

    routes = {
        "base_d3c0": numbers(0.1, None),
        "solver_d3c0": numbers(0.1, 4e12),
        "rlt_quarter_d3c0": numbers(0.3, 1e12),
        "rlt_d3c0": numbers(0.7, 5e12),
        "base_d3c5": numbers(0.1, None),  # of a cell that has only begun
        "base_d1c0": numbers(0.6, None),
        "solver_d1c0": numbers(0.6, 4e12),
    }
    return {"routes": routes}


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_curves_table_and_pictures_of_what_is_there(seeds: tuple[int, ...]) -> None:
    of_cells = frontier_tables.curves(made_up(seeds))
    assert [cell.name for cell in of_cells] == ["d3c0", "d1c0"]
    rlt = of_cells[Cell(3, 0.0)]["rlt"]
    assert [flops for flops, _ in rlt] == [0, 1e12, 5e12]
    table = frontier_tables.compute_table(of_cells).set_index("")
    labels = {name: route.label for name, route in frontier.ROUTES.items()}
    assert table.loc[labels["solver"]].to_list() == ["> 4.0e+12", "0.0e+00"]
    assert table.loc[labels["rlt"]].to_list() == ["3.0e+12", "–"]
    for picture in (frontier_plots.frontier, frontier_plots.compute):
        assert picture(of_cells).startswith(PNG)


def test_a_workdir_without_a_complete_route_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete route for the seeds 0, 1"):
        frontier_claims.study(tmp_path, [0, 1])


def test_a_cell_that_lacks_a_seed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"cost": {"flops": 1.0}, "asked": 0, "right": [1, 3], "samples": 4}
    (tmp_path / kept.FOLDER).mkdir()
    for name in ("d3c0_0", "d3c0_1", "d1c0_1"):
        content = {"questions": [["a", "b"]], "stages": {f"base_eval_{name}": base}}
        kept.write(tmp_path / kept.FOLDER / f"{name}.json", content)
    command = ["frontier_claims", f"--workdir={tmp_path}", "--seeds=0,1"]
    monkeypatch.setattr("sys.argv", command)
    frontier_claims.main()
    left_out, page = capsys.readouterr().out.splitlines()
    assert left_out == "1 digit, c = 0 is left out: it lacks the seeds 0."
    assert Path(page).is_file()


@pytest.mark.parametrize("asked", [1, "x", None])
def test_a_damaged_kept_file_is_named(tmp_path: Path, asked: object) -> None:
    stage = {"asked": asked, "right": [1], "samples": 4}
    (tmp_path / kept.FOLDER).mkdir()
    content = {"questions": [["a"]], "stages": {"base_eval_d3c0_0": stage}}
    kept.write(tmp_path / kept.FOLDER / "d3c0_0.json", content)
    with pytest.raises(
        UserError, match="d3c0_0.json: not what experiments.kept writes"
    ):
        frontier_claims.study(tmp_path, [0])


@pytest.mark.parametrize("text", ["a", "0,0", "1,", "-1", ":a"])
def test_bad_seeds_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="seeds are different numbers such as 0,1,2"):
        frontier.get_config(text)


def shrink(section: dict) -> None:
    """Makes a stage as small as it can be."""
    for data in ("data", "held_out"):
        if section.get(data) is None:
            continue
        for source in section[data].get("sources", {"": section[data]}).values():
            if "size" in source:
                source.size, source.drills = 8, 0
                if source.task != "arithmetic" or "kinds" not in source:
                    del source.drills
    for part, smaller in (
        ("sft", {"steps": 2, "epochs": 0.0, "batch_size": 2}),
        ("loop", {"steps": 1, "batch_size": 2, "group_size": 2}),
        ("collect", {"batch_size": 8}),
        ("evaluate", {"batch_size": 8, "samples_per_problem": 2}),
    ):
        if part in section:
            section[part].update(smaller)
    if section.stage == "sft" and section.data.task == "file":
        section.data.keep_cut_off = True
    if section.stage == "score":
        section.batch_size = 8


@pytest.mark.slow
def test_all_stages_run_at_the_smallest_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: frontier.REWARDS[name] for name in ("strong", "both", "careful_5")}
    for module in (frontier, frontier_tables):
        monkeypatch.setattr(module, "BUDGETS", {"": 1.0})
    for module in (frontier, frontier_claims):
        monkeypatch.setattr(module, "REWARDS", few)
    monkeypatch.setattr(frontier_claims, "PART_OF_COMPUTE", {"": ""})
    frontier._parts.cache_clear()
    config = frontier.get_config("7")
    for section in stage_sections(config).values():
        shrink(section)
    config.cells = (frontier.CLAIMS_IN.name, "d1c0")
    run_pipeline(config, tmp_path)
    study = frontier_claims.study(tmp_path, [7])
    comparison = compare(tmp_path, study, [7])
    cells = (frontier.CLAIMS_IN, Cell(1, 0.0))
    names = {route.name for cell in cells for route in frontier_claims._routes(cell)}
    assert {*comparison["routes"]} == names
    assert all(x["verdict"] == "one run only" for x in comparison["claims"])
    of_puzzles = 3 * 3
    assert len(comparison["measures"]) == 3 * (3 + 3 + len(few)) + of_puzzles
    of_cells = frontier_tables.curves(comparison)
    assert {*of_cells[Cell(1, 0.0)]} == {*frontier.ROUTES}
    tables = frontier_claims.tables_of_stages(tmp_path, names, [7])
    *_, judged = tables.values()
    assert judged["judge"].nunique() == 2 and (judged["tokens"] > 0).all()

    # What is kept of the stages says the same.
    for cell in cells:
        content = kept.content_of(tmp_path, f"_{cell.name}_7")
        (tmp_path / "other" / kept.FOLDER).mkdir(parents=True, exist_ok=True)
        kept.write(tmp_path / "other" / kept.FOLDER / f"{cell.name}.json", content)
    other = tmp_path / "other"
    assert frontier_claims.study(other, [7]) == study
    assert compare(other, study, [7]) == comparison
    again = frontier_claims.tables_of_stages(other, names, [7])
    assert all(table.equals(again[title]) for title, table in tables.items())
    page = pages.write_comparison(
        tmp_path, comparison, {"frontier": frontier_plots.frontier(of_cells)}
    )
    assert 'src="frontier.png"' in page.read_text(encoding="utf-8")
    frontier._parts.cache_clear()
