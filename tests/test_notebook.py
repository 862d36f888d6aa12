"""The notebook runs from top to bottom and shows what it promises."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_no_outputs_are_stored(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        assert not cell.get("outputs"), cell.id
        assert cell.get("execution_count") is None, cell.id


@pytest.mark.slow
def test_every_cell_runs(
    notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    workdir = tmp_path / "run"
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
    )
    parameters.source = f"scale = 0.04\nworkdir = Path({str(workdir)!r})"
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute()

    pictures = list((workdir / "report").glob("*.png"))
    shown = [o for o in outputs(notebook, "pictures") if "image/png" in o.data]
    assert len(shown) == len(pictures) >= 2
    results = text(notebook, "results")
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    for name in ("teacher_reward_rl", "accuracy_student_rlt_traces"):
        assert f"{name:32} {summary[name]:8.4g}" in results
    explanations = text(notebook, "explanations")
    trace = json.loads(
        (workdir / "collect_rlt" / "traces.jsonl").read_text("utf-8").splitlines()[0]
    )
    assert explanations.startswith(trace["question"])
    assert f"after  ({trace['reward']:7.2f})" in explanations


def outputs(notebook: nbformat.NotebookNode, name: str) -> list[nbformat.NotebookNode]:
    return next(cell.outputs for cell in notebook.cells if cell.id == name)


def text(notebook: nbformat.NotebookNode, name: str) -> str:
    return "".join(o.text for o in outputs(notebook, name) if o.output_type == "stream")
