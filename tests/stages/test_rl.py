"""The RL loop beyond its plainest setting."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlt_jax.training.metrics import read_jsonl

Section = Callable[[str], dict[str, Any]]
RunStage = Callable[[dict[str, Any], Path], Path]


def test_several_students_and_a_balanced_kl(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    rl = section("rl")
    rl["student"] = [rl["student"], rl["student"]]
    rl["students"] = {"combine": "weights", "weights": (3.0, 1.0)}
    rl["reward"] = {"explanation_kl_coef": "auto"}
    folder = run_stage(rl, tmp_path)
    result = json.loads((folder / "done.json").read_text(encoding="utf-8"))["summary"]
    score, divergence = (
        result[f"held_out_{name}_first"]
        for name in ("solution_score", "explanation_kl")
    )
    assert score < 0
    assert divergence > 0
    assert result["kl_coef"] == pytest.approx(-score / divergence, rel=0.5)
    assert result["held_out_format_penalty_first"] == -1
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
