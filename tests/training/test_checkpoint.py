"""Checkpoints there and back, and every place that a model is loaded from."""

import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from rlt_jax import files
from rlt_jax.data import pipeline
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.models.transformer import Transformer
from rlt_jax.records import Problem
from rlt_jax.training import checkpoint, checksums
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.state import new_state, state_shardings
from rlt_jax.types import Params

ARCHITECTURE = {
    "embed_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "mlp_dim": 24,
    "max_length": 64,
}
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory,
    text_model: Transformer,
    teacher_params: Params,
    tokenizer: Tokenizer,
) -> Path:
    """The folder of a finished stage."""
    folder = tmp_path_factory.mktemp("stage")
    checkpoint.describe(folder, text_model, tokenizer)
    with checkpoint.open_manager(folder, keep=1) as manager:
        trees = {"params": teacher_params, "other": {"x": np.arange(3)}}
        checkpoint.save(manager, 3, trees, {})
        manager.wait_until_finished()
    return folder


def assert_equal(ours: object, theirs: object) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_state_and_data_come_back(
    tmp_path: Path, model: Transformer, params: Params, mesh: Mesh
) -> None:
    tx = optax.adam(0.1)
    shardings = state_shardings(model, tx, mesh)
    state = new_state(params, tx, shardings)._replace(step=jnp.int32(7))
    batches = pipeline.problem_batches([Problem("", "")] * 9, 4, seed=0)
    next(batches)
    trees = {"params": state.params, "optimizer": (state.step, state.opt_state)}
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        assert checkpoint.restore_latest(manager, trees, print) is None
        for step in (5, 6, 7):
            data = {"batches": batches.get_state(), "start": {"loss": 0.5 + step}}
            checkpoint.save(manager, step, trees, data)
    kept = sorted(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
    assert kept == [6, 7]
    sums = json.loads((tmp_path / "checksums.json").read_text())
    assert sorted(sums) == ["6", "7"]
    upcoming = [next(batches) for _ in range(4)]

    blank = jax.tree.map(jnp.zeros_like, trees)
    again = pipeline.problem_batches([Problem("", "")] * 9, 4, seed=0)
    data: dict[str, Any] = {}
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        step, restored = checkpoint.restore_latest(manager, blank, data.update)
    assert step == 7
    assert_equal(restored["params"], state.params)
    assert_equal(tuple(restored["optimizer"]), (state.step, state.opt_state))
    for leaf, sharding in zip(
        jax.tree.leaves(restored["params"]),
        jax.tree.leaves(shardings.params),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert data["start"] == {"loss": 7.5}
    again.set_state(data["batches"])
    for batch in upcoming:
        np.testing.assert_array_equal(next(again), batch)


def save_steps(folder: Path, steps: Iterable[int], keep: int = 1) -> list[str]:
    """Saves checkpoints whose weights are their steps; names of all that are left."""
    with checkpoint.open_manager(folder, keep) as manager:
        for step in steps:
            trees = {"params": {"w": jnp.full(3, float(step))}}
            checkpoint.save(manager, step, trees, {})
    return sorted(file.name for file in (folder / "checkpoints").iterdir())


def read_weight(folder: Path) -> float:
    return float(checkpoint.read_item(folder, "params")["w"][0])


def test_an_old_checkpoint_stays_until_a_new_one_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert save_steps(tmp_path, [1]) == ["1"]
    with monkeypatch.context() as disk:
        disk.setattr(checksums, "add", lambda *_: False)
        assert save_steps(tmp_path, [2, 3]) == ["1", "2", "3"]
    assert save_steps(tmp_path, [4]) == ["4"]
    assert list(json.loads((tmp_path / "checksums.json").read_text())) == ["4"]


def test_all_of_a_checkpoint_is_synced_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, [1])
    synced, sync = [], files.sync

    def keep(path: Path) -> None:
        synced.append((path, (tmp_path / "checkpoints" / "1").is_dir()))
        sync(path)

    monkeypatch.setattr(files, "sync", keep)
    save_steps(tmp_path, [2])
    folder = tmp_path / "checkpoints" / "2"
    before = {path for path, old_is_there in synced if old_is_there}
    assert before >= {*folder.rglob("*"), folder, folder.parent, tmp_path}


def test_checksums_of_a_checkpoint_that_was_removed_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, [1, 2], keep=2)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    monkeypatch.setattr(checksums, "add", lambda *_: False)  # killed before
    with checkpoint.open_manager(tmp_path, 2) as manager:
        checkpoint.save(manager, 2, {"params": {"w": jnp.full(5, 7.0)}}, {})
    assert read_weight(tmp_path) == 7.0


def test_parts_of_a_save_that_was_cut_off_are_removed(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert save_steps(tmp_path, [3]) == ["3"]


def test_the_best_model_may_be_of_an_earlier_step(
    tmp_path: Path, model: Transformer, params: Params, tokenizer: Tokenizer
) -> None:
    loaded = checkpoint.LoadedModel(model, params, tokenizer)
    for step, weight in ((50, 5.0), (45, 4.0), (45, 3.0), (60, 6.0)):
        new = {"w": jnp.full(3, weight)}
        checkpoint.save_model(tmp_path, step, loaded, new)
        assert [int(x.name) for x in (tmp_path / "checkpoints").iterdir()] == [step]
        assert read_weight(tmp_path) == weight


def test_a_save_that_failed_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise OSError("the save has failed")

    failed = pytest.raises(OSError, match="has failed")
    with failed, checkpoint.open_manager(tmp_path, 1) as manager:
        manager._thread.submit(
            manager._complete, 9
        )  # waits for a step that never comes
        monkeypatch.setattr(ocp.CheckpointManager, "close", fails)
    assert not manager._is_open


def test_an_older_checkpoint_is_used_where_the_newest_is_on_a_bad_sector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, [1, 2], keep=2)
    damage, number = checksums.damage, errno.EIO

    def read(folder: Path, step: int, item: str) -> str | None:
        if step == 2:
            raise OSError(number, os.strerror(number))
        return damage(folder, step, item)

    monkeypatch.setattr(checksums, "damage", read)
    assert read_weight(tmp_path) == 1.0
    assert "an older one is used" in caplog.text
    number = errno.ESTALE  # passes, so it is not damage
    with pytest.raises(OSError, match="[Ss]tale"):
        read_weight(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"):  # there is no other
        read_weight(tmp_path)


def test_a_stage_folder_is_a_model(
    stage: Path,
    mesh: Mesh,
    text_model: Transformer,
    teacher_params: Params,
    tokenizer: Tokenizer,
) -> None:
    model, params, loaded = checkpoint.load(ModelSource(str(stage)), mesh, KEY)
    assert model.config == text_model.config
    assert_equal(params, teacher_params)
    assert loaded.encode("3+4=7").ids.tolist() == tokenizer.encode("3+4=7").ids.tolist()
    assert loaded.stop_ids == tokenizer.stop_ids


def test_numerics_are_those_of_the_source_not_of_the_stage(
    stage: Path, mesh: Mesh, teacher_params: Params
) -> None:
    source = ModelSource(
        str(stage), dtype="bfloat16", param_dtype="bfloat16", remat="full"
    )
    model, params, _ = checkpoint.load(source, mesh, KEY)
    assert (model.config.dtype, model.config.remat) == ("bfloat16", "full")
    assert_equal(params, jax.tree.map(lambda x: x.astype("bfloat16"), teacher_params))


def test_the_tokenizer_is_kept_without_what_lies_beside_it(
    tmp_path: Path, text_model: Transformer, tokenizer: Tokenizer
) -> None:
    beside = tmp_path / "model"
    shutil.copytree(tokenizer.path, beside)
    (beside / "model.safetensors").write_text("large")
    (beside / "generation_config.json").write_text('{"eos_token_id": [6, 9]}')
    checkpoint.describe(
        tmp_path / "stage", text_model, checkpoint.load_tokenizer(beside)
    )
    kept = tmp_path / "stage" / "tokenizer"
    assert not (kept / "model.safetensors").exists()
    assert checkpoint.load_tokenizer(kept).stop_ids == (6, 9)


def test_an_architecture_gets_random_weights(mesh: Mesh, tokenizer: Tokenizer) -> None:
    source = ModelSource(architecture=ARCHITECTURE, tokenizer="embedded")
    model, params, _ = checkpoint.load(source, mesh, KEY)
    assert model.config.vocab_size == tokenizer.vocab_size
    assert params["embedding"].shape == (tokenizer.vocab_size, 16)
    assert 0.01 < params["embedding"].std() < 0.03


def test_the_shipped_model_is_loaded_by_name(mesh: Mesh, tokenizer: Tokenizer) -> None:
    loaded = checkpoint.load(ModelSource("embedded"), mesh, KEY)
    assert loaded.model.config.vocab_size == tokenizer.vocab_size
    assert loaded.params["embedding"].dtype == jnp.float32
    assert loaded.tokenizer.stop_ids == tokenizer.stop_ids


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "set either path or architecture"),
        ({"path": "embedded", "architecture": ARCHITECTURE}, "set either path or"),
        ({"architecture": ARCHITECTURE}, "set a tokenizer"),
        ({"path": "embedded", "param_dtype": "float16"}, "param_dtype='float16'"),
    ],
)
def test_sources_that_contradict_themselves_are_refused(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ModelSource(**fields)


def test_bad_architectures_are_refused(mesh: Mesh) -> None:
    for fields, message in (
        (ARCHITECTURE | {"width": 3}, "unknown key 'width'"),
        ({"embed_dim": 16}, "the key 'num_layers' is missing"),
    ):
        source = ModelSource(architecture=fields, tokenizer="embedded")
        with pytest.raises(UserError, match=message):
            checkpoint.load(source, mesh, KEY)


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(
    tmp_path: Path, mesh: Mesh, model: Transformer, params: Params, tokenizer: Tokenizer
) -> None:
    checkpoint.describe(tmp_path, model, tokenizer)
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 1, {"params": params}, {})
    with pytest.raises(
        UserError, match="the model has 40 rows, none for ids up to 511"
    ):
        checkpoint.load(ModelSource(str(tmp_path)), mesh, KEY)


def test_places_without_a_model_are_refused(
    tmp_path: Path, mesh: Mesh, text_model: Transformer, tokenizer: Tokenizer
) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            UserError, match="neither a config.json .* nor a model.json"
        ):
            checkpoint.load(ModelSource(str(path)), mesh, KEY)
    checkpoint.describe(tmp_path, text_model, tokenizer)
    with pytest.raises(UserError, match="the stage has no checkpoint yet"):
        checkpoint.load(ModelSource(str(tmp_path)), mesh, KEY)


def test_hub_ids_are_downloaded(
    stage: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, teacher_params: Params
) -> None:
    asked = []

    def snapshot_download(name: str, **_: object) -> str:
        asked.append(name)
        return str(stage)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = checkpoint.load(ModelSource("someone/some-model"), mesh, KEY)
    assert set(asked) == {"someone/some-model"}
    assert_equal(loaded.params, teacher_params)

    def fails(name: str, **_: object) -> str:
        raise OSError("no route\nto the host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UserError, match="Hugging Face Hub failed: no route$"):
        checkpoint.load(ModelSource("someone/some-model"), mesh, KEY)


def test_model_json_says_what_the_model_is(
    stage: Path, text_model: Transformer
) -> None:
    fields = json.loads((stage / "model.json").read_text())
    assert fields["embed_dim"] == text_model.config.embed_dim
    assert fields["num_layers"] == text_model.config.num_layers


def saved(folder: Path, steps: Iterable[int], params: Params) -> None:
    with checkpoint.open_manager(folder, keep=9) as manager:
        for step in steps:
            checkpoint.save(manager, step, {"params": params}, {"next": step})


@pytest.mark.parametrize(
    "content",
    [
        '{"2": []}',
        '{"2": 7}',
        '{"2": {"a": 1}}',
        '{"2": {"params/x": [1]}}',
        '{"2": {"../../x": [1, 2]}}',
        "[",
    ],
)
def test_damaged_checksums_are_not_used(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = {"x": jnp.ones(3)}
    saved(tmp_path, (1, 2), params)
    (tmp_path / "checksums.json").write_text(content)
    data: dict[str, Any] = {}
    with checkpoint.open_manager(tmp_path, keep=9) as manager:
        found = checkpoint.restore_latest(manager, {"params": params}, data.update)
    assert found is not None and found[0] == data["next"] == 2
    assert "checksums.json is damaged" in caplog.text


def test_data_that_cannot_be_used_are_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = {"x": jnp.ones(3)}
    saved(tmp_path, (1, 2), params)
    (tmp_path / "checksums.json").unlink()
    for file in (tmp_path / "checkpoints/2/data").rglob("metadata"):
        file.write_text("{}")
    used: list[int] = []
    with checkpoint.open_manager(tmp_path, keep=9) as manager:
        found = checkpoint.restore_latest(
            manager, {"params": params}, lambda data: used.append(data["next"])
        )
    assert found is not None and found[0] == used[0] == 1
    assert "checkpoints/2 cannot be read (KeyError: 'next')" in caplog.text


def test_a_checkpoint_of_other_shapes_is_as_it_was_saved(tmp_path: Path) -> None:
    saved(tmp_path, (1,), {"x": jnp.ones(3)})
    with pytest.raises(UserError, match="it is as it was saved, so restore model.json"):
        checkpoint.read_item(tmp_path, "params", {"x": jnp.ones((4, 4))})
