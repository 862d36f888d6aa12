"""Stage `sft`: data formats, traces that are too long, held-out loss."""

import json
import logging
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.sharding import Mesh

from rlt_jax.api import load_model
from rlt_jax.data import pipeline, rows
from rlt_jax.data.examples import Example, Renderer, student_examples
from rlt_jax.data.rows import RowShape
from rlt_jax.data.templates import Template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.models.transformer import Transformer
from rlt_jax.stages import run_pipeline, sft
from rlt_jax.training import hosts
from rlt_jax.training.learner import make_learner
from rlt_jax.training.lora import LoRAConfig, make_tuning
from rlt_jax.training.metrics import read_jsonl
from rlt_jax.training.state import state_shardings
from rlt_jax.types import Params

Section = Callable[[str], dict[str, Any]]
RunStage = Callable[[dict[str, Any], Path], Path]
LogProbs = Callable[..., np.ndarray]
LONG = "3+4=7 " * 40
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "done.json").read_text(encoding="utf-8"))["summary"]


def metric_rows(folder: Path) -> list[dict[str, float]]:
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]


def write(file: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes rows in the format of the file's ending; gives the section that reads them."""
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"task": "file", "path": str(file)}


def plain(*explanations: str) -> list[dict[str, Any]]:
    """Rows of questions of their own; those of one letter share one."""
    return [
        {"question": f"{z[:1]}+4?", "solution": "It is 7.", "reasoning_trace": z}
        for z in explanations
    ]


def conversation(row: dict[str, Any], template: Template) -> dict[str, Any]:
    """The row as one conversation with tags."""
    (thought, after), (solution, end) = template.thought_tags, template.solution_tags
    reply = f"{thought}{row['reasoning_trace']}{after}{solution}{row['solution']}{end}"
    turns = [("user", row["question"]), ("assistant", reply)]
    return {
        "system": "Think.",
        "conversations": [{"from": role, "value": text} for role, text in turns],
    }


def test_all_formats_of_traces_are_the_same_traces(
    section: Section, run_stage: RunStage, tmp_path: Path, tiny: Template
) -> None:
    rows = plain("3+4=7", "a", "b " * 9, "c, d")
    tagged = [conversation(row, tiny) for row in rows]
    found = []
    for name, written in (
        ("plain.jsonl", rows),
        ("plain.parquet", rows),
        ("tagged.jsonl", tagged),
        ("tagged.parquet", tagged),
    ):
        values = section("sft") | {"data": write(tmp_path / name, written)}
        values["sft"]["steps"] = 2
        folder = run_stage(values, tmp_path / name.replace(".", "_"))
        found.append((metric_rows(folder), summary(folder)))
    assert found[0][1]["traces"]["data"]["used"] == 4
    assert found[1:] == [found[0]] * 3


@pytest.mark.parametrize(
    ("overlong", "used", "other"),
    [
        ("drop", 2, {"dropped": 2}),
        ("shorter", 3, {"dropped": 1, "replaced": 1}),
        ("truncate", 4, {"truncated": 2}),
    ],
)
def test_traces_beyond_the_context(
    overlong: str,
    used: int,
    other: dict[str, int],
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = plain("3+4=7", LONG, "a", "b" + LONG)
    values = section("sft") | {"data": write(tmp_path / "traces.jsonl", rows)}
    values["held_out"] = write(tmp_path / "other.jsonl", rows[:3])
    values["sft"] |= {"overlong": overlong, "steps": 1}
    with caplog.at_level(logging.WARNING, "rlt_jax"):
        folder = run_stage(values, tmp_path / "run")
    counts = summary(folder)["traces"]
    nothing = dict.fromkeys(counts["data"], 0)
    assert counts["data"] == nothing | {"read": 4, "used": used} | other
    held_out = {"truncated": 1} if overlong == "truncate" else {"dropped": 1}
    kept = {"read": 3, "used": 2 + (overlong == "truncate")}
    assert counts["held_out"] == nothing | kept | held_out
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("data: traces longer than sft.row_length=128: 4 read")
    for name, number in other.items():
        assert f"{number} {name}" in messages[0]
    assert messages[1].startswith("held_out: traces longer")


def test_a_student_of_no_traces_is_the_model_itself(
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "none.jsonl").touch()
    values = section("sft") | {"model": {"path": "embedded"}}
    values["data"] = {"task": "file", "path": str(tmp_path / "none.jsonl")}
    with pytest.raises(UserError, match="the file has no records"):
        run_stage(values, tmp_path / "run")
    values["sft"]["allow_empty"] = True
    folder = run_stage(values, tmp_path / "run")
    assert "has no traces: the model is saved as it is" in caplog.text
    assert summary(folder) == {"steps": 0, "traces": {}}
    (_, params), (_, kept) = map(load_model, ("embedded", folder))
    jax.tree.map(np.testing.assert_array_equal, params, kept)


def test_a_row_longer_than_the_model_reads_is_refused(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    values = section("sft") | {"data": write(tmp_path / "traces.jsonl", plain(LONG))}
    values["sft"] |= {"row_length": 1024}
    message = r"the model's max_length .*the limit is 128"
    with pytest.raises(UserError, match=message):
        run_stage(values, tmp_path / "run")


def test_a_mix_with_some_traces_of_each_question(
    section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    ours = write(tmp_path / "ours.jsonl", plain("3", "34", "345", "a"))
    theirs = write(tmp_path / "theirs.jsonl", plain(LONG, "3+4=7"))
    values = section("sft")
    sources = {"ours": ours | {"share": 2.0}, "theirs": theirs}
    values |= {"data": {"task": "mix", "sources": sources}}
    values["sft"] |= {"steps": 2, "traces_per_question": 2, "overlong": "drop"}
    counts = summary(run_stage(values, tmp_path / "run"))["traces"]
    assert {"data.sources.ours", "data.sources.theirs", "held_out"} == counts.keys()
    ours, theirs = counts["data.sources.ours"], counts["data.sources.theirs"]
    assert (ours["read"], ours["used"], ours["surplus"]) == (4, 3, 1)
    assert (theirs["read"], theirs["used"], theirs["dropped"]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlong": "cut"}, "overlong='cut': one of error, drop, shorter, truncate"),
        ({"traces_per_question": -1}, "sft.traces_per_question=-1: at least 0"),
        ({"batch_size": 0}, "sft.batch_size=0: at least 1"),
        ({"micro_batch_size": -1}, "sft.micro_batch_size=-1: at least 0"),
        ({"checkpoint_every": 0}, "sft.checkpoint_every=0: at least 1"),
        ({"evaluate_every": -1}, "sft.evaluate_every=-1: at least 0"),
        ({"row_length": 16, "overlong": "drop"}, "data, .* none of 40 traces is left"),
        ({"held_out": None}, "sft.evaluate_every needs traces in the section held_out"),
        ({"held_out": {"task": "mix"}}, "held_out.task='mix': choose one of"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    change: dict[str, Any],
    message: str,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
) -> None:
    values = section("sft")
    for name, value in change.items():
        (values if name in values else values["sft"])[name] = value
    with pytest.raises(UserError, match=message):
        run_stage(values, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"steps": 0}, "sft.steps=0, sft.epochs=0.0: set one of the two"),
        ({"epochs": 2.0}, "sft.steps=5, sft.epochs=2.0: set one of the two"),
        ({"steps": 0, "epochs": -1.0}, "sft.epochs=-1.0: at least 0"),
        ({"steps": -1}, "sft.steps=-1: at least 0"),
    ],
)
def test_the_length_is_steps_or_epochs(
    length: dict[str, Any],
    message: str,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
) -> None:
    values = section("sft")
    values["sft"] |= length
    with pytest.raises(UserError, match=message):
        run_stage(values, tmp_path)


@pytest.mark.parametrize("mixed", [False, True])
def test_epochs_are_counted_in_sequences(
    mixed: bool,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole passes over what is used, in a run that is stopped and continued too."""
    values = section("sft")
    values["sft"] |= {"steps": 0, "epochs": 3.0, "overlong": "drop"}
    used = plain(*(z * (3 + n % 5) for n, z in enumerate("abcdefghijk")))
    data = write(tmp_path / "traces.jsonl", [*used[:6], *plain(LONG)])
    if mixed:
        other = write(tmp_path / "other.jsonl", used[6:])
        data = {"task": "mix", "sources": {"a": data | {"share": 2.0}, "b": other}}
    sequences = 3 * (11 if mixed else 6)
    values["data"] = data

    seen: list[int] = []
    packed = rows.pack_sequences

    def count(taken: list[Any], *args: Any) -> Any:
        seen.append(len(taken))
        return packed(taken, *args)

    monkeypatch.setattr(rows, "pack_sequences", count)
    with caplog.at_level(logging.INFO, "rlt_jax"):
        folder = run_stage(values, tmp_path / "whole")
    done = summary(folder)
    steps = done["steps"]
    of_training = seen[-steps:]  # before them, the held-out traces are packed
    assert sum(of_training[:-1]) < sequences <= sum(of_training)
    number = sequences // 3
    message = f"3 epochs of {number} sequences are {steps} steps"
    assert message in [record.getMessage() for record in caplog.records]
    rows_of_whole = metric_rows(folder)
    assert [row["step"] for row in rows_of_whole] == list(range(steps))
    assert "held_out/loss" in rows_of_whole[-1], "the last step is known to be the last"

    answers = iter([False, False, True])  # before the stage, then in it
    with monkeypatch.context() as patch:
        patch.setattr(hosts, "stopping", lambda: next(answers))
        with pytest.raises(hosts.Stopped):
            run_stage(values, tmp_path / "stopped")
    resumed = run_stage(values, tmp_path / "stopped")
    assert metric_rows(resumed) == rows_of_whole
    assert summary(resumed) == done
    # The schedule is that of as many steps.
    values["sft"] |= {"steps": steps, "epochs": 0.0}
    assert metric_rows(run_stage(values, tmp_path / "steps")) == rows_of_whole


@pytest.mark.parametrize(
    ("topology", "rows"), [("v6e:4x4", 4), ("v5p:2x2x1", 4), ("v5e:8x8", 16)]
)
def test_the_settings_of_the_published_recipe(topology: str, rows: int) -> None:
    file = Path(__file__).parents[2] / "configs" / "rlt_7b.py"
    config = runpy.run_path(str(file))["get_config"](topology)
    names = ("b1", "b2", "weight_decay", "learning_rate", "schedule")
    optimizers = [
        [section.optimizer[name] for name in (*names, "warmup_fraction")]
        for section in (config.warmup, config.rl)
    ]
    assert optimizers[0] == [0.9, 0.95, 1e-4, 1e-5, "cosine", 0.05]
    assert optimizers[1] == [0.9, 0.999, 0.0, 1e-6, "constant", 0.0]
    loop = config.warmup.sft
    assert (loop.epochs, loop.steps, loop.batch_size) == (10, 0, rows)


@pytest.mark.parametrize("rank", [0, 2])
def test_training_in_bfloat16_is_warned_of(
    rank: int,
    section: Section,
    run_stage: RunStage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = section("sft") | {"lora": {"rank": rank}}
    values["model"] = values["model"] | {"param_dtype": "bfloat16"}
    values["sft"] |= {"steps": 1, "evaluate_every": 0}
    run_stage(values, tmp_path)
    warnings = [
        one.getMessage() for one in caplog.records if one.levelname == "WARNING"
    ]
    told = [text for text in warnings if "trained parameters are bfloat16" in text]
    assert len(told) == (rank == 0)


@pytest.mark.parametrize(("every", "rows"), [(0, [4]), (2, [1, 3, 4]), (9, [4])])
def test_the_held_out_loss_is_in_its_rows(
    every: int, rows: list[int], section: Section, run_stage: RunStage, tmp_path: Path
) -> None:
    values = section("sft")
    values["sft"]["evaluate_every"] = every
    folder = run_stage(values, tmp_path)
    found, done = metric_rows(folder), summary(folder)
    assert [row["step"] for row in found if "held_out/loss" in row] == rows
    first = [row["step"] for row in found if "held_out/loss_first" in row]
    assert first == [0] * bool(every)
    assert done["held_out_loss"] == found[-1]["held_out/loss"]
    assert done.get("held_out_loss_first") == found[0].get("held_out/loss_first")
    assert done["held_out_loss"] < 8


@pytest.fixture
def held_out(tokenizer: Tokenizer, tiny: Template) -> list[Example]:
    kinds = {"kinds": {"careful": 0.5, "skipping": 0.5}, "known_answer": False}
    data = {"task": "arithmetic", "split": "test", "size": 11} | kinds
    traces = pipeline.load_traces(data, tiny, seed=0)
    return student_examples(Renderer(tokenizer, tiny, "student"), traces)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_held_out_loss_is_the_mean_over_all_tokens(
    micro_batches: int,
    held_out: list[Example],
    text_model: Transformer,
    student_params: Params,
    mesh: Mesh,
    naive_log_probs: LogProbs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced, log_probs_and_entropy = [], sft.log_probs_and_entropy

    def counted(*args: Any, **options: Any) -> Any:
        traced.append(args)
        return log_probs_and_entropy(*args, **options)

    monkeypatch.setattr(sft, "log_probs_and_entropy", counted)
    batches = pipeline.all_batches(held_out, RowShape(4 // micro_batches, 100), 4)
    assert len(batches) > 1
    assert {len(batch.tokens) for batch in batches} == {micro_batches}
    assert not all(batch.segment_ids.any(axis=-1).all() for batch in batches)
    low_rank, tx, key = LoRAConfig(), optax.sgd(1.0), jax.random.key(0)
    tuning, params = make_tuning(low_rank, text_model, student_params, mesh, key)
    shardings = state_shardings(text_model, tx, mesh)
    learner = make_learner(sft.next_token_loss, tuning, tx, mesh, shardings)
    loss = sft.held_out_loss(learner, params, batches, mesh)
    first = len(traced)
    assert sft.held_out_loss(learner, params, batches, mesh) == loss
    assert len(traced) == first == 1  # all batches and all calls share one program
    learned = []
    for one in held_out:
        log_probs = naive_log_probs(text_model, student_params, one.tokens[None])[0]
        learned += log_probs[one.loss_mask].tolist()
    np.testing.assert_allclose(loss, -np.mean(learned), rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_student_of_another_family(
    family: str, section: Section, tmp_path: Path, tokenizer: Tokenizer, tiny: Template
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = SIZES | {"model_type": family, "vocab_size": tokenizer.vocab_size}
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**settings), attn_implementation="eager"
    ).eval()
    theirs.save_pretrained(tmp_path / "base")
    values = section("sft")
    values["model"] = {"path": str(tmp_path / "base"), "tokenizer": "embedded"}
    values["sft"]["steps"] = 3
    config = {"seed": 0, "pipeline": ("student",), "student": values}
    run_pipeline(ml_collections.ConfigDict(config), tmp_path)

    learned = []
    traces = pipeline.load_traces(values["held_out"], tiny, seed=0)
    for one in student_examples(Renderer(tokenizer, tiny, "student"), traces):
        tokens = torch.from_numpy(one.tokens.astype(np.int64))
        with torch.no_grad():
            logits = theirs(tokens[None]).logits[0, :-1]
        chosen = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]
        learned += chosen[torch.from_numpy(one.loss_mask[1:])].tolist()
    done = summary(tmp_path / "student")
    np.testing.assert_allclose(
        done["held_out_loss_first"], -np.mean(learned), atol=1e-4
    )
    assert done["held_out_loss"] < done["held_out_loss_first"]
