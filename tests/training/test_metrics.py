"""Metrics files: when rows are written, and what a cut-off run leaves."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.errors import UserError
from rlt_jax.training.metrics import (
    RESET,
    MetricWriter,
    append_jsonl,
    keep_records,
    keep_whole_batches,
    peak_gib,
    read_jsonl,
    reset_peak,
    steps,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def steps_of(file: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(file)]


def test_metrics_are_written_one_step_late(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(0, {"a/b": jnp.float32(1.5)})
        assert not file.exists()
        writer.write(1, {"a/b": np.float64(2.5), "c": 3})
        assert read_jsonl(file) == [{"step": 0, "a/b": 1.5}]
        writer.flush()
        assert steps_of(file) == [0, 1]
        writer.flush()
        assert steps_of(file) == [0, 1]
        writer.write(2, {"a/b": 4.0})
    assert read_jsonl(file) == [
        {"step": 0, "a/b": 1.5},
        {"step": 1, "a/b": 2.5, "c": 3.0},
        {"step": 2, "a/b": 4.0},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_last_step_is_written_though_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), MetricWriter(tmp_path, 0) as writer:
        writer.write(0, {"a": 1.0})
        raise ZeroDivisionError
    assert steps_of(tmp_path / "metrics.jsonl") == [0]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path, file: Path) -> None:
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(0, {"a": jnp.nan, "b": -jnp.inf, "c": 1.5})
        numbers = writer.flush()
    # Whoever writes them still gets the numbers.
    assert np.isnan(numbers["a"]) and numbers["b"] == -np.inf
    row = {"step": 0, "a": None, "b": None, "c": 1.5}
    assert strict(tmp_path / "metrics.jsonl") == [row]
    deep = {"terms": {"x": [1.0, (np.float64("nan"), 2)], "y": float("inf")}}
    append_jsonl(file, [deep | {"text": "NaN", "flag": True, "none": None}])
    deep = {"terms": {"x": [1.0, [None, 2]], "y": None}}
    assert strict(file) == [deep | {"text": "NaN", "flag": True, "none": None}]


def strict(file: Path) -> list[dict[str, Any]]:
    """Records of a file that has nothing but JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_resuming_drops_the_rows_that_come_again(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, 0) as writer:
        for step in range(5):
            writer.write(step, {"run": 1})
    with MetricWriter(tmp_path, 3) as writer:
        for step in range(3, 6):
            writer.write(step, {"run": 2})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["run"]) for row in rows] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 2),
    ]


def test_rows_survive_whatever_they_hold(file: Path) -> None:
    # Line ends of other alphabets, controls, and what JSON itself uses.
    texts = ["a\nb", "a\u2028b\u2029c\x85d", '"{}\\', "naïve 🦉", "\x00\x0b\x0c\x1c\r"]
    append_jsonl(file, [{"text": text} for text in texts[:2]])
    append_jsonl(file, [{"text": text} for text in texts[2:]])
    assert [row["text"] for row in read_jsonl(file)] == texts
    assert "naïve 🦉" in file.read_text(encoding="utf-8"), "people read these files"


def test_a_last_line_cut_off_in_writing_is_left_out(file: Path) -> None:
    rows = [{"step": step, "text": "🦉"} for step in range(3)]
    append_jsonl(file, rows)
    whole = file.read_bytes()
    # Also in the middle of a character, and after the last line but for its end.
    for cut in (1, 4, 5, 10):
        file.write_bytes(whole[:-cut])
        assert read_jsonl(file) == rows[:2]
        append_jsonl(file, rows[2:])
        assert read_jsonl(file) == rows
        assert file.read_bytes() == whole


def test_a_file_of_one_cut_off_line_is_begun_afresh(file: Path) -> None:
    file.write_text('{"step": 0')
    assert read_jsonl(file) == []
    append_jsonl(file, [{"step": 0}])
    assert read_jsonl(file) == [{"step": 0}]


def test_keep_records(file: Path) -> None:
    keep_records(file, lambda record: record["step"] < 3)
    assert not file.exists()
    append_jsonl(file, [{"step": step} for step in (0, 1, 3, 2, 7)])
    with file.open("a") as lines:
        lines.write('{"step": 1')
    keep_records(file, lambda record: record["step"] < 3)
    assert steps_of(file) == [0, 1, 2]
    keep_records(file, lambda record: False)
    assert steps_of(file) == []
    assert list(file.parent.iterdir()) == [file], "nothing else is left behind"


@pytest.mark.parametrize(("rows", "kept"), [(0, 0), (3, 0), (4, 4), (9, 8)])
def test_only_whole_batches_are_kept(file: Path, rows: int, kept: int) -> None:
    questions = [f"question {step}" for step in range(10)]
    assert keep_whole_batches(file, 4, questions) == 0
    made = [{"step": n, "question": text} for n, text in enumerate(questions)]
    append_jsonl(file, made[:rows])
    with file.open("a") as lines:
        lines.write(json.dumps(made[rows])[:-1])
    assert keep_whole_batches(file, 4, questions) == kept
    assert steps_of(file) == list(range(kept))


@pytest.mark.parametrize(
    ("order", "line"),
    [((0, 2, 3), 2), ((0, 0, 1, 2), 2), ((0, 1, 2, 3, 3), 5)],
    ids=["missing", "twice", "too many"],
)
def test_rows_about_other_questions_are_refused(
    file: Path, order: tuple[int, ...], line: int
) -> None:
    append_jsonl(file, [{"question": f"question {n}"} for n in order])
    before, questions = file.read_bytes(), [f"question {n}" for n in range(4)]
    with pytest.raises(UserError, match=f"jsonl:{line} is about another question"):
        keep_whole_batches(file, 2, questions)
    assert file.read_bytes() == before


@pytest.mark.parametrize("row", [{}, {"step": "1"}, {"step": None}, {"step": -1}])
def test_rows_without_their_step_are_refused(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    file = tmp_path / "metrics.jsonl"
    append_jsonl(file, [{"step": 0}, row])
    with pytest.raises(UserError, match="metrics.jsonl:2 is damaged: its step="):
        MetricWriter(tmp_path, 1)


def test_a_training_cannot_be_made_shorter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step 5, the config has steps=3"):
        next(steps(5, 3, tmp_path))
    assert list(steps(5, 5, tmp_path)) == []


def test_chosen_steps_are_traced(tmp_path: Path) -> None:
    found = []
    for step in steps(1, 5, tmp_path, (2, 4)):
        found.append((step, (tmp_path / "profile").is_dir()))
        jnp.ones(3).sum().block_until_ready()
    assert found == [(1, False), (2, False), (3, False), (4, True)]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_loop_that_ends_early_keeps_its_trace(tmp_path: Path) -> None:
    for step in steps(0, 5, tmp_path, (1, 9)):
        if step == 2:
            break
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.skipif(not RESET.exists(), reason="the peak can be reset on Linux only")
def test_the_peak_counts_from_its_last_reset() -> None:
    size = 1 << 29
    reset_peak()
    before = peak_gib()
    np.ones(size, np.uint8)
    high = peak_gib()
    assert high > before + 0.4
    reset_peak()
    assert peak_gib() < high - 0.4
