"""Stage `score`: order, resuming, controls, selection, page."""

import json
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from rlt_jax.errors import UserError
from rlt_jax.stages import run_pipeline
from rlt_jax.training import metrics
from rlt_jax.training.metrics import read_jsonl

ROWS = [
    {
        "question": f"Start at {n}: +3. Last digit?",
        "solution": str((n + 3) % 10),
        "completions": [f"{n}+3={(n + 3) % 10}<|end_of_explanation|>", f"it is <b>{n}"],
    }
    for n in range(3)
]


@pytest.fixture
def config(tmp_path: Path) -> ml_collections.ConfigDict:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "stage": "score",
            "teacher": {"path": "embedded"},
            "students": ({"path": "embedded"},),
            "ensemble": {},
            "template": "tiny",
            "data": {"path": str(data)},
            "rlt_reward": {},
            "select": {"best_per_question": 1},
            "teacher_temperature": 0.7,
            "batch_size": 4,
            "assume_closed": False,
            "per_token": True,
            "controls": True,
            "num_examples": 1,
            "mesh": {},
        }
    )
    return config


def test_rows_come_in_order_with_all_they_need(
    config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    data = Path(config.data.path)
    data.write_text(f"no row\n{data.read_text('utf-8')}", encoding="utf-8")
    config.data.on_bad_row = "skip"
    run_pipeline(config, tmp_path / "run")
    folder = tmp_path / "run" / "score"
    rows = read_jsonl(folder / "scores.jsonl")
    texts = [text for row in ROWS for text in row["completions"]]
    assert [row["completion"] for row in rows] == texts
    for row in rows:
        assert {"reward", "terms", "provenance", "copied_share"} <= set(row)
        assert len(row["explanation_tokens"]) == len(row["explanation_kl_tokens"])
        assert {"reward_empty", "reward_shuffled", "reward_other"} <= set(row)
    assert [row["closed"] for row in rows] == [True, False] * 3
    assert len(read_jsonl(folder / "selected.jsonl")) == 3
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert "background: rgba(" in page


def test_a_run_that_was_cut_off_continues(
    config: ml_collections.ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config.rlt_reward = {"explanation_kl_coef": "auto"}
    run_pipeline(config, tmp_path / "whole")
    append = metrics.append_jsonl

    def cut(file: Path, records: list[dict[str, Any]]) -> None:
        append(file, records[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "append_jsonl", cut)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, tmp_path / "cut")
    monkeypatch.undo()
    run_pipeline(config, tmp_path / "cut")
    whole, resumed = (
        (tmp_path / name / "score" / "scores.jsonl").read_text(encoding="utf-8")
        for name in ("whole", "cut")
    )
    assert whole == resumed


def test_rows_without_any_completion_are_refused(
    config: ml_collections.ConfigDict, tmp_path: Path
) -> None:
    rows = [row | {"completions": []} for row in ROWS]
    data = Path(config.data.path)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"rows.jsonl: there is nothing to score; write"
    ):
        run_pipeline(config, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
