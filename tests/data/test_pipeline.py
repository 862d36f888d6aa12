"""Sources by name, and the iterators that training reads."""

import json
from collections import Counter
from pathlib import Path

import grain
import jax
import ml_collections
import numpy as np
import pytest

from rlt_jax.data import pipeline
from rlt_jax.data.examples import EMPTY, Example
from rlt_jax.data.rows import PackedBatches, RowShape
from rlt_jax.data.templates import Template
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Trace
from rlt_jax.types import Batch

ARITHMETIC = {"task": "arithmetic", "split": "train", "size": 3}
SHAPE = RowShape(micro_batch_size=1, row_length=12)


def numbered(count: int) -> list[Example]:
    """Sequences of 2 to 7 tokens; number n holds n + 1 alone and learns all but its first."""
    made = []
    for n in range(count):
        tokens = np.full(2 + n % 6, n + 1, np.int32)
        made.append(Example(tokens, np.arange(len(tokens)) > 0, EMPTY, EMPTY))
    return made


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


def write_numbered(file: Path, count: int) -> dict[str, object]:
    """A section of `count` traces, of which two have the same question."""
    rows = [
        {"question": f"q{max(n, 1)}", "solution": "s", "reasoning_trace": f"z{n}"}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"task": "file", "path": str(file)}


def test_a_part_of_the_questions_is_held_out(tmp_path: Path, tiny: Template) -> None:
    data = write_numbered(tmp_path / "q.jsonl", 41)
    everything = pipeline.load_problems(data | {"part": "all"}, tiny, 0)
    train = pipeline.load_problems(data | {"part": "train"}, tiny, 0)
    held_out = pipeline.load_problems(data | {"part": "held_out"}, tiny, 1)
    assert len(everything) == 41
    assert len({problem.question for problem in held_out}) == 4
    assert not {p.question for p in held_out} & {p.question for p in train}
    assert sorted([*train, *held_out]) == sorted(everything)
    assert train == [p for p in everything if p not in held_out]
    # Traces of the same file are split alike.
    traces = pipeline.load_traces(data | {"part": "train"}, tiny, 2)
    assert [trace.problem for trace in traces] == train


def test_few_questions_hold_out_two(tmp_path: Path, tiny: Template) -> None:
    data = write_numbered(tmp_path / "q.jsonl", 5)
    held_out = pipeline.load_problems(data | {"part": "held_out"}, tiny, 0)
    assert len({problem.question for problem in held_out}) == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"part": "test"}, "part='test'"),
        ({"part": "train"}, "3 different questions; to hold some out it needs four"),
    ],
)
def test_bad_parts_are_refused(
    keys: dict[str, object], message: str, tmp_path: Path, tiny: Template
) -> None:
    data = write_numbered(tmp_path / "q.jsonl", 4)
    with pytest.raises(UserError, match=message):
        pipeline.load_problems(data | keys, tiny, 0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"task": "chess"}, "'chess': choose one of arithmetic, gsm8k"),
        ({}, "task=None"),
        (ARITHMETIC | {"sizes": 4}, "'arithmetic': unknown key 'sizes'"),
        (ARITHMETIC | {"seed": 4}, "'arithmetic': 'seed' is the run's own"),
        ({"task": "arithmetic", "split": "test"}, "the key 'size' is missing"),
        (ARITHMETIC | {"size": 0}, "'arithmetic': it has no problems; change"),
        ({"task": ".x:y"}, "'.x:y' is not a \"module:function\""),
        ({"task": "math:pi"}, "data.task='math:pi': 3.14.* is not a callable"),
        ({"task": "builtins:max"}, "data.task='builtins:max': no signature"),
        ({"task": "builtins:globals"}, "must give a list, each a Problem"),
    ],
)
def test_bad_data_sections_are_refused(
    section: dict[str, object], message: str, tiny: Template
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.load_problems(section, tiny, seed=0)


def test_problems_where_traces_belong_are_refused(tiny: Template) -> None:
    section = ARITHMETIC | {"task": "rlt_jax.data.tasks.arithmetic:problems"}
    with pytest.raises(UserError, match="must give a list, each a Trace"):
        pipeline.load_traces(section, tiny, seed=0)


def test_sources_of_a_mix_have_names_and_shares(tmp_path: Path, tiny: Template) -> None:
    file = tmp_path / "traces.jsonl"
    row = {"question": "q", "solution": "s", "reasoning_trace": "z"}
    file.write_text((json.dumps(row) + "\n") * 3)
    ours = {"task": "file", "path": str(file)}
    theirs = ARITHMETIC | {"kinds": {"careful": 1.0}, "known_answer": False}
    (whole,) = pipeline.load_sources(ours, tiny, 0)
    assert (whole.where, whole.weight, len(whole.traces)) == ("data", 1.0, 3)
    sources = {
        "theirs": theirs,
        "ours": ours | {"share": 2.5, "limit": 2},
        "missing": {"task": "file", "path": "nowhere", "share": 0},
    }
    mix = ml_collections.ConfigDict({"task": "mix", "sources": sources})
    first, second = pipeline.load_sources(mix, tiny, 0)
    assert (first.where, first.weight) == ("data.sources.ours", 2.5)
    assert first.traces == whole.traces[:2]
    assert (second.where, second.weight) == ("data.sources.theirs", 1.0)
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
        ({"sources": {"x": {"share": -1}}}, "data.sources.x.share=-1: at least 0"),
        ({"sources": {"x": {"share": "2"}}}, "data.sources.x.share='2': a number"),
        ({"sources": {"x": "file"}}, "data.sources.x='file': keys and values"),
        ({"sources": "x"}, "data.sources='x': keys and values"),
        (
            {"source": {}},
            r"data: unknown key 'source' \(did you mean 'sources'\?\); known keys: task",
        ),
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


def test_packed_batches_hold_whole_sequences() -> None:
    made = numbered(9)
    batches = pipeline.packed_batches([made], [1.0], SHAPE, 2, seed=0)
    for _ in range(6):
        batch = next(batches)
        given = {k: x for k, x in batch._asdict().items() if isinstance(x, np.ndarray)}
        assert {k: (x.shape, x.dtype) for k, x in given.items()} == {
            "tokens": ((2, 1, 12), np.int32),
            "segment_ids": ((2, 1, 12), np.int32),
            "positions": ((2, 1, 12), np.int32),
            "loss_weights": ((2, 1, 12), np.float32),
        }
        for m in range(2):
            tokens, positions, segment_ids, weights = (
                given[k][m, 0]
                for k in ("tokens", "positions", "segment_ids", "loss_weights")
            )
            for segment in range(1, segment_ids.max() + 1):
                place = segment_ids == segment
                one = made[tokens[place][0] - 1]
                np.testing.assert_array_equal(tokens[place], one.tokens)
                np.testing.assert_array_equal(weights[place] > 0, one.loss_mask)
                np.testing.assert_array_equal(
                    positions[place], np.arange(len(one.tokens))
                )
        assert not batch.loss_weights[batch.segment_ids == 0].any()


def test_every_sequence_is_packed_equally_often() -> None:
    batches = pipeline.packed_batches([numbered(9)], [1.0], SHAPE, 2, seed=0)
    seen: Counter[int] = Counter()
    for _ in range(40):
        seen.update(firsts(next(batches)))
        counts = [seen[n] for n in range(1, 10)]
        assert max(counts) - min(counts) <= 1
    assert seen.keys() == set(range(1, 10))
    assert min(seen.values()) > 10


def test_every_pass_has_its_own_order() -> None:
    # In rows of their own the sequences keep the order of the stream.
    made = [one for one in numbered(30) if len(one.tokens) > 3][:9]
    batches = pipeline.packed_batches([made], [1.0], RowShape(1, 7), 1, seed=0)
    order = []
    while len(order) < 27:
        order += firsts(next(batches))
    assert len({tuple(order[n : n + 9]) for n in (0, 9, 18)}) == 3


def firsts(batch: Batch) -> list[int]:
    """Numbers of the sequences of a batch."""
    first = (batch.positions == 0) & (batch.segment_ids > 0)
    return batch.tokens[first].tolist()


def mixed(seed: int = 0) -> PackedBatches:
    """Sequences 1 and 2, 3 to 7, 8 and 9, with weights of 3 : 1 : 0.5."""
    made = numbered(9)
    sources = [made[:2], made[2:7], made[7:]]
    return pipeline.packed_batches(sources, [3.0, 1.0, 0.5], SHAPE, 2, seed)


def test_sources_have_their_parts_of_the_sequences() -> None:
    batches, seen = mixed(), Counter()
    for _ in range(150):
        seen.update(firsts(next(batches)))
    total = seen.total()
    assert total > 500
    for part, weight in (((1, 2), 3.0), (range(3, 8), 1.0), ((8, 9), 0.5)):
        counts = [seen[number] for number in part]
        assert abs(sum(counts) - weight / 4.5 * total) <= 2
        assert max(counts) - min(counts) <= 1


def test_the_seed_decides_the_order_of_a_mix() -> None:
    orders = [
        [firsts(next(batches)) for _ in range(5)] for batches in map(mixed, (0, 0, 1))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_all_batches_hold_every_sequence_once() -> None:
    made = numbered(9)
    batches = pipeline.all_batches(made, SHAPE, 2)
    assert sorted(number for batch in batches for number in firsts(batch)) == [
        *range(1, 10)
    ]
    assert len(batches) > 1
    for batch in batches:
        per_token = (batch.tokens, batch.positions, batch.segment_ids)
        assert {x.shape for x in (*per_token, batch.loss_weights)} == {(2, 1, 12)}
    learned = sum(int((batch.loss_weights > 0).sum()) for batch in batches)
    assert learned == sum(int(one.loss_mask.sum()) for one in made)


@pytest.mark.parametrize("kind", ["problems", "packed", "mixed"])
def test_a_saved_state_brings_the_same_batches_again(kind: str) -> None:
    def iterator() -> PackedBatches | grain.DatasetIterator:
        if kind == "mixed":
            return mixed()
        if kind == "packed":
            return pipeline.packed_batches([numbered(9)], [1.0], SHAPE, 2, seed=3)
        return pipeline.problem_batches([Problem("", "")] * 7, 3, seed=3)

    first = iterator()
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    expected = [next(first) for _ in range(6)]
    second = iterator()
    second.set_state(state)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(second), batch)
