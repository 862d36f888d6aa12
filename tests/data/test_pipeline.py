"""Sources by name, and the iterators that training reads."""

import json
from collections import Counter
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from rlt_jax.data import pipeline
from rlt_jax.data.examples import EMPTY, Row
from rlt_jax.data.templates import Problem, Template, Trace
from rlt_jax.errors import UserError

ARITHMETIC = {"task": "arithmetic", "split": "train", "size": 3}
ROW_LENGTH = 12


def numbered_rows(count: int) -> list[Row]:
    """Rows of 2 to 7 tokens; row n holds n + 1 alone, the first token is no target."""
    rows = []
    for n in range(count):
        tokens = np.full(2 + n % 6, n + 1, np.int32)
        rows.append(Row(tokens, np.arange(len(tokens)) > 0, EMPTY, EMPTY))
    return rows


def test_a_source_is_picked_by_its_name(tiny: Template) -> None:
    problems = pipeline.load_problems(ARITHMETIC, tiny, seed=0)
    assert len(problems) == 3 and isinstance(problems[0], Problem)
    kinds = {"kinds": {"careful": 1.0}, "known_answer": False}
    traces = pipeline.load_traces(ARITHMETIC | kinds, tiny, seed=0)
    assert [trace.problem for trace in traces] == problems
    assert pipeline.load_problems(ARITHMETIC, tiny, seed=1) != problems
    assert pipeline.load_problems(ARITHMETIC | {"stream": 1}, tiny, 0) != problems


def test_files_are_read_with_the_template(tmp_path: Path, tiny: Template) -> None:
    file = tmp_path / "traces.jsonl"
    row = {"question": "q", "solution": "s", "reasoning_trace": "z", "answer": "a"}
    file.write_text(json.dumps(row) + "\n")
    data = {"task": "file", "path": str(file)}
    assert pipeline.load_problems(data, tiny, 0) == [Problem("q", "s", "a")]
    assert pipeline.load_traces(data, tiny, 0) == [Trace(Problem("q", "s", "a"), "z")]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"task": "chess"}, "'chess': choose one of arithmetic, countdown, gsm8k"),
        ({}, "task=None"),
        (ARITHMETIC | {"sizes": 4}, "'arithmetic': unknown key 'sizes'"),
        (ARITHMETIC | {"seed": 4}, "'arithmetic': 'seed' is the run's own"),
        ({"task": "arithmetic", "split": "test"}, "the key 'size' is missing"),
    ],
)
def test_bad_data_sections_are_refused(
    section: dict[str, object], message: str, tiny: Template
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.load_problems(section, tiny, seed=0)


def test_sources_of_a_mix_have_names_and_shares(tmp_path: Path, tiny: Template) -> None:
    file = tmp_path / "traces.jsonl"
    row = {"question": "q", "solution": "s", "reasoning_trace": "z"}
    file.write_text((json.dumps(row) + "\n") * 3)
    ours = {"task": "file", "path": str(file)}
    theirs = ARITHMETIC | {"kinds": {"careful": 1.0}, "known_answer": False}
    (whole,) = pipeline.load_sources(ours, tiny, 0)
    assert (whole.where, whole.share, len(whole.traces)) == ("data", 1.0, 3)
    sources = {
        "theirs": theirs,
        "ours": ours | {"share": 2.5, "limit": 2},
        "missing": {"task": "file", "path": "nowhere", "share": 0},
    }
    mix = ml_collections.ConfigDict({"task": "mix", "sources": sources})
    first, second = pipeline.load_sources(mix, tiny, 0)
    assert (first.where, first.share) == ("data.sources.ours", 2.5)
    assert first.traces == whole.traces[:2]
    assert (second.where, second.share) == ("data.sources.theirs", 1.0)
    assert second.traces == pipeline.load_traces(theirs, tiny, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sources": {}}, "data.sources: none has a share above 0"),
        ({"sources": {"x": {"share": 0}}}, "data.sources: none has a share above 0"),
        ({"sources": {"x": {}}}, "data.sources.x.task=None: choose one of arithmetic"),
        (
            {"sources": {"x": ARITHMETIC}},
            "data.sources.x of task 'arithmetic': the key",
        ),
        ({"sources": {"x": {"share": -1}}}, "data.sources.x.share=-1: a number from 0"),
        ({"sources": {"x": {"share": "2"}}}, "data.sources.x.share='2': a number"),
        ({"sources": {"x": "file"}}, "data.sources.x is 'file'"),
        ({"sources": "x"}, "data.sources is 'x'"),
        ({"source": {}}, "data: unknown key 'source'; known keys: task, sources"),
        ({}, "data: the key 'sources' is missing"),
    ],
)
def test_bad_mixes_are_refused(
    keys: dict[str, object], message: str, tiny: Template
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.load_sources({"task": "mix"} | keys, tiny, seed=0)


def test_every_problem_comes_once_in_each_pass() -> None:
    problems = [Problem(str(n), "") for n in range(12)]
    batches = pipeline.problem_batches(problems, batch_size=4, seed=0)
    passes = [np.concatenate([next(batches) for _ in range(3)]) for _ in range(3)]
    for indices in passes:
        assert sorted(indices.tolist()) == list(range(12))
    assert len({tuple(indices.tolist()) for indices in passes}) == 3


def test_batches_run_on_over_the_end_of_a_pass() -> None:
    problems = [Problem(str(n), "") for n in range(5)]
    batches = pipeline.problem_batches(problems, batch_size=3, seed=0)
    indices = np.concatenate([next(batches) for _ in range(5)])
    assert Counter(indices.tolist()) == dict.fromkeys(range(5), 3)


def test_the_seed_decides_the_order() -> None:
    problems = [Problem(str(n), "") for n in range(20)]
    orders = [
        next(pipeline.problem_batches(problems, batch_size=20, seed=seed)).tolist()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_too_few_problems_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size=4 prompts, but only 3 problems"):
        pipeline.problem_batches([Problem("", "")] * 3, batch_size=4, seed=0)


def test_packed_batches_hold_whole_rows() -> None:
    rows = numbered_rows(9)
    batches = pipeline.packed_batches([rows], [1.0], 2, ROW_LENGTH, seed=0)
    for _ in range(6):
        batch = next(batches)
        tokens, segment_ids = batch["tokens"], batch["segment_ids"]
        assert tokens.shape == (2, ROW_LENGTH)
        assert {k: v.dtype for k, v in batch.items()} == {
            "tokens": np.int32,
            "segment_ids": np.int32,
            "positions": np.int32,
            "loss_mask": np.bool_,
        }
        for line in range(2):
            for segment in range(1, segment_ids[line].max() + 1):
                place = segment_ids[line] == segment
                row = rows[tokens[line][place][0] - 1]
                np.testing.assert_array_equal(tokens[line][place], row.tokens)
                mask = batch["loss_mask"][line][place]
                np.testing.assert_array_equal(mask, row.loss_mask)
                positions = batch["positions"][line][place]
                np.testing.assert_array_equal(positions, np.arange(len(row.tokens)))
        padding = segment_ids == 0
        assert not batch["loss_mask"][padding].any()


def test_every_row_is_packed_equally_often() -> None:
    rows = numbered_rows(9)
    batches = pipeline.packed_batches([rows], [1.0], 2, ROW_LENGTH, seed=0)
    seen: Counter[int] = Counter()
    for _ in range(40):
        batch = next(batches)
        seen.update(firsts(batch))
    # Rows wait in the packer's four open lines, so a count may lag behind a little.
    assert seen.keys() == set(range(1, 10))
    assert max(seen.values()) - min(seen.values()) <= 3
    assert min(seen.values()) > 10


def firsts(batch: dict[str, np.ndarray]) -> list[int]:
    """Numbers of the rows of a batch."""
    first = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    return batch["tokens"][first].tolist()


def mixed(seed: int = 0) -> pipeline.grain.DatasetIterator:
    """Rows 1 and 2, 3 to 7, 8 and 9, with shares of 3 : 1 : 0.5."""
    rows = numbered_rows(9)
    sources = [rows[:2], rows[2:7], rows[7:]]
    return pipeline.packed_batches(sources, [3.0, 1.0, 0.5], 2, ROW_LENGTH, seed)


def test_sources_have_their_shares_of_the_rows() -> None:
    batches, seen = mixed(), Counter()
    for _ in range(150):
        seen.update(firsts(next(batches)))
    total = seen.total()
    assert total > 500
    for part, share in (((1, 2), 3.0), (range(3, 8), 1.0), ((8, 9), 0.5)):
        counts = [seen[number] for number in part]
        # Rows wait in the packer's four open lines.
        assert abs(sum(counts) - share / 4.5 * total) <= 8
        assert max(counts) - min(counts) <= 6


def test_the_seed_decides_the_order_of_a_mix() -> None:
    orders = [
        [firsts(next(batches)) for _ in range(5)] for batches in map(mixed, (0, 0, 1))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_all_batches_hold_every_row_once() -> None:
    rows = numbered_rows(9)
    batches = pipeline.all_batches(rows, 3, ROW_LENGTH)
    assert sorted(number for batch in batches for number in firsts(batch)) == [
        *range(1, 10)
    ]
    assert len(batches) > 1
    for batch in batches:
        assert {x.shape for x in batch.values()} == {(3, ROW_LENGTH)}
    learned = sum(int(batch["loss_mask"].sum()) for batch in batches)
    assert learned == sum(int(row.loss_mask.sum()) for row in rows)


@pytest.mark.parametrize("kind", ["problems", "packed", "mixed"])
def test_a_saved_state_brings_the_same_batches_again(kind: str) -> None:
    def iterator() -> pipeline.grain.DatasetIterator:
        if kind == "mixed":
            return mixed()
        if kind == "packed":
            return pipeline.packed_batches(
                [numbered_rows(9)], [1.0], 2, ROW_LENGTH, seed=3
            )
        return pipeline.problem_batches([Problem("", "")] * 7, 3, seed=3)

    first = iterator()
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    expected = [next(first) for _ in range(6)]
    second = iterator()
    second.set_state(state)
    for batch in expected:
        again = next(second)
        for a, b in zip(_leaves(batch), _leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)


def _leaves(batch: dict[str, np.ndarray] | np.ndarray) -> list[np.ndarray]:
    return list(batch.values()) if isinstance(batch, dict) else [batch]
