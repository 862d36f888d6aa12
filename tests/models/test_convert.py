"""Model directories as files: what is written, read and refused."""

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig, RopeScaling
from rlt_jax.models.config_json import config_from_json, config_to_json
from rlt_jax.models.convert import (
    model_type_of,
    read_config,
    read_params,
    write_model,
)
from rlt_jax.models.layouts import Tensor, axis_sizes, read_part
from rlt_jax.models.transformer import init_params
from rlt_jax.types import Params

CONFIG = ModelConfig(
    vocab_size=64,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=32,
    max_length=64,
    qkv_bias=True,
)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"


def random_params(config: ModelConfig) -> Params:
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes
    )


@pytest.fixture(scope="module")
def params() -> Params:
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def whole(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one file; not to be changed."""
    path = tmp_path_factory.mktemp("whole")
    write_model(path, CONFIG, params, "qwen2")
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A model in one file, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def change_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_shards_hold_what_one_file_holds(
    params: Params, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlt_jax.models.convert.MAX_SHARD_BYTES", 10_000)
    write_model(tmp_path, CONFIG, params, "qwen2")
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert all(file.stat().st_size < 12_000 for file in files)
    expected = load_file(whole / WEIGHTS)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / file)[name], expected[name])
    jax.tree.map(np.testing.assert_array_equal, read_params(tmp_path, CONFIG), params)


def test_overrides_replace_what_the_file_says(whole: Path) -> None:
    config = read_config(whole, dtype="bfloat16", remat="full", max_length=32)
    assert (config.dtype, config.remat, config.max_length) == ("bfloat16", "full", 32)
    assert read_config(whole) == CONFIG


def test_only_the_rows_asked_for_are_read() -> None:
    """Two of four heads and half the width are rows 4 to 8 and columns 0 to 8."""
    asked = []

    class Stored:
        def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
            asked.append(index)
            return matrix[index]

    matrix = np.arange(16 * 16, dtype=np.float32).reshape(16, 16)
    tensor = Tensor("query", "NH,D", "DNH")
    part = slice(0, 8), slice(1, 3), slice(None)
    read = read_part(Stored(), tensor, axis_sizes(CONFIG), np.float32, part)
    assert asked == [(slice(4, 12), slice(0, 8))]
    np.testing.assert_array_equal(read, matrix.T.reshape(16, 4, 4)[part])


def test_a_split_head_is_read_right() -> None:
    matrix = np.arange(16 * 16, dtype=np.float32).reshape(16, 16)
    tensor = Tensor("query", "NH,D", "DNH")
    part = slice(4, 16), slice(0, 2), slice(2, 4)
    read = read_part(matrix, tensor, axis_sizes(CONFIG), np.float32, part)
    np.testing.assert_array_equal(read, matrix.T.reshape(16, 4, 4)[part])


def test_the_host_never_holds_a_whole_parameter(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=64,
        embed_dim=256,
        num_layers=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=2048,
        max_length=64,
    )
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(jnp.zeros_like, shapes)
    write_model(tmp_path, config, params, "llama")
    tracemalloc.start()
    read_params(tmp_path, config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one_parameter = 16 * 256 * 2048 * 4
    assert peak < one_parameter / 2


def test_two_processes_read_their_parts_and_write_the_whole(
    whole: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("two_processes.py")
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                script,
                str(i),
                port,
                whole,
                tmp_path / "out",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    written = (tmp_path / "out" / WEIGHTS).read_bytes()
    assert written == (whole / WEIGHTS).read_bytes()


def test_tensors_that_carry_nothing_are_passed_over(copy: Path, params: Params) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        for buffer in ("inv_freq", "cos_cached"):
            name = f"model.layers.0.self_attn.rotary_emb.{buffer}"
            tensors[name] = np.ones(2, np.float32)

    change_tensors(copy, add)
    jax.tree.map(np.testing.assert_array_equal, read_params(copy, CONFIG), params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), "1 missing tensors: layers.1.mlp.gate_proj.weight"),
        (lambda t: t.update(odd=t[GATE]), "1 unexpected tensors: odd"),
        (
            lambda t: t.update({"vision_tower.weight": t[GATE]}),  # of another family
            "1 unexpected tensors: vision_tower.weight",
        ),
        (lambda t: t.update({GATE: t[GATE][1:]}), r"has shape \[31, 16\]"),
        (lambda t: t.update({GATE: t[GATE].astype(np.int8)}), "dtype I8"),
    ],
)
def test_wrong_tensors_are_refused(
    copy: Path, change: Callable[[dict], Any], message: str
) -> None:
    change_tensors(copy, change)
    with pytest.raises(UserError, match=message):
        read_params(copy, CONFIG)


def test_a_file_cut_short_is_refused(copy: Path) -> None:
    content = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"{WEIGHTS} is damaged; download it again"):
        read_params(copy, CONFIG)


@pytest.fixture
def shards(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Path]:
    """The files of a model in three shards, to be damaged."""
    monkeypatch.setattr("rlt_jax.models.convert.MAX_SHARD_BYTES", 10_000)
    write_model(tmp_path / "shards", CONFIG, params, "qwen2")
    return sorted((tmp_path / "shards").glob("*.safetensors"))


def test_a_missing_shard_is_refused(shards: list[Path]) -> None:
    shards[0].unlink()
    for read in (read_config, lambda path: read_params(path, CONFIG)):
        with pytest.raises(UserError, match=f"{shards[0].name} is missing"):
            read(shards[0].parent)


def test_a_shape_needs_no_shards(shards: list[Path]) -> None:
    """Like `plan`, of a folder with only the JSON files of a large model."""
    for file in shards:
        file.unlink()
    assert read_config(shards[0].parent) == CONFIG


def test_an_index_without_files_is_refused(shards: list[Path]) -> None:
    shards[0].with_name(INDEX).write_text("{}")
    with pytest.raises(UserError, match=f"neither {WEIGHTS} nor files of {INDEX}"):
        read_params(shards[0].parent, CONFIG)


def test_a_tensor_in_two_shards_is_refused(shards: list[Path]) -> None:
    first, second = (load_file(file) for file in shards[:2])
    name = next(iter(first))
    save_file(second | {name: first[name] + 1}, shards[1])
    twice = rf"{name} and {name} \(in {shards[1].name}\) are the same"
    with pytest.raises(UserError, match=twice):
        read_params(shards[0].parent, CONFIG)


def test_a_shard_without_what_the_index_says_is_refused(shards: list[Path]) -> None:
    tensors = load_file(shards[0])
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, shards[0])
    bare = name.removeprefix("model.")
    with pytest.raises(UserError, match=f"1 missing tensors: {bare}"):
        read_params(shards[0].parent, CONFIG)


def test_a_directory_without_weights_is_refused(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"neither {WEIGHTS} nor files of {INDEX}"):
        read_params(copy, CONFIG)


def test_a_missing_or_broken_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="config.json is damaged"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported are llama, qwen2"),
        ({"hidden_size": None, "head_dim": None}, "lacks 'hidden_size'"),
        ({"num_attention_heads": None}, "lacks 'num_attention_heads'"),
        ({"hidden_act": "relu"}, "hidden_act='relu': one of silu, gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope_type='dynamic': one of default",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling: the key 'factor' is missing",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1.0}},
            "yarn RoPE with 'mscale'",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {"layer_types": ["full_attention", "linear_attention"]},
            "layer_types=.*: a list, each one of sliding_attention, full_attention",
        ),
    ],
)
def test_configs_we_do_not_implement_are_refused(
    copy: Path, changes: dict, message: str
) -> None:
    change_json(copy / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        read_config(copy)


def test_head_sizes_may_be_left_out(copy: Path) -> None:
    left_out = {"head_dim": None, "num_key_value_heads": None}
    change_json(copy / "config.json", **left_out)
    config = read_config(copy)
    assert (config.head_dim, config.num_kv_heads) == (4, 4)


def test_both_spellings_of_rope_are_read(copy: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0}
    change_json(copy / "config.json", rope_theta=7.0, rope_scaling=scaling)
    earlier = read_config(copy)
    change_json(copy / "config.json", rope_theta=None, rope_scaling=None)
    change_json(copy / "config.json", rope_parameters={**scaling, "rope_theta": 7.0})
    assert read_config(copy) == earlier
    assert earlier.rope_theta == 7.0
    assert earlier.rope_scaling == RopeScaling("yarn", 2.0, original_length=64)


@pytest.mark.parametrize(
    ("model_type", "field"),
    [("llama", "qkv_bias"), ("qwen3", "qk_norm"), ("gemma2", "post_norms")],
)
def test_a_family_that_cannot_express_a_config_is_refused(
    params: Params, tmp_path: Path, model_type: str, field: str
) -> None:
    with pytest.raises(UserError, match=f"'{model_type}' does not fit.*{field}="):
        write_model(tmp_path / "out", CONFIG, params, model_type)
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(params: Params, tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    with pytest.raises(UserError, match="remove it or choose another"):
        write_model(tmp_path, CONFIG, params, "qwen2")
    assert [file.name for file in tmp_path.iterdir()] == ["notes"]


def test_an_interrupted_export_leaves_no_model(params: Params, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError):
        write_model(out, CONFIG, {**params, "layers": {}}, "qwen2")
    assert not out.exists()
    write_model(out, CONFIG, params, "qwen2")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_tokenizer_and_stop_ids_go_along(params: Params, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "optimizer.bin").write_text("not a tokenizer")
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [9, 5], "top_p": 0.8})
    )
    write_model(out, CONFIG, params, "qwen2", source, stop_ids=[np.int32(3), 5])
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [3, 5, 9]
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "optimizer.bin").exists()
    assert generation["top_p"] == 0.8
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [3, 5, 9]


def test_the_family_of_a_shape_is_found() -> None:
    assert model_type_of(CONFIG) == "qwen2"
    plain = dataclasses.replace(CONFIG, qkv_bias=False)
    assert model_type_of(plain) == "llama"
    assert model_type_of(dataclasses.replace(plain, qk_norm=True)) == "qwen3"
    with pytest.raises(UserError, match="none of the families llama"):
        model_type_of(dataclasses.replace(plain, qk_norm=True, mlp_bias=True))


def test_a_window_needs_a_family_with_windows() -> None:
    plain = config_from_json(config_to_json(CONFIG, "qwen2"))
    assert plain == CONFIG
    windowed = {"windowed_layers": (False, True), "sliding_window": 8}
    config = ModelConfig(**{**vars(CONFIG), **windowed})
    assert config_from_json(config_to_json(config, "qwen2")) == config
    llama = ModelConfig(**{**vars(config), "qkv_bias": False})
    with pytest.raises(UserError, match="sliding_window=None, not 8"):
        config_to_json(llama, "llama")


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("scale", "dtype", "tied"),
    [(1.0, np.float32, True), (2.0, np.float32, False), (1.0, np.float16, False)],
)
def test_a_head_that_differs_from_the_embedding_is_used(
    scale: float,
    dtype: type,
    tied: bool,
    copy: Path,
    params: Params,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def add_head(tensors: dict[str, np.ndarray]) -> None:
        tensors[HEAD] = (scale * tensors[EMBEDDING]).astype(dtype)

    change_tensors(copy, add_head)
    config = read_config(copy)
    assert config == dataclasses.replace(CONFIG, tie_embeddings=tied)
    assert ("a head that differs" in caplog.text) == (not tied)
    read = read_params(copy, config)
    assert ("output" in read) == (not tied)
    if not tied:
        expected = (scale * params["embedding"]).astype(dtype)
        np.testing.assert_array_equal(read["output"], expected.T)


def test_a_head_is_compared_in_shards_under_other_names(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlt_jax.models.weight_files._ROWS", 10)

    def change_last_row(tensors: dict[str, np.ndarray]) -> None:
        head = tensors[EMBEDDING].copy()
        head[-1, -1] += 1
        tensors["module.lm_head.weight"] = head

    change_tensors(copy, change_last_row)
    assert not read_config(copy).tie_embeddings
    (copy / WEIGHTS).unlink()
    assert read_config(copy).tie_embeddings  # as `plan` reads it, without weights


def test_a_head_of_another_size_is_refused(copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][1:]}))
    with pytest.raises(UserError, match=r"lm_head.weight has shape \[63, 16\]"):
        read_params(copy, read_config(copy))


def test_a_tied_model_may_have_its_head_alone(copy: Path, params: Params) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        tensors[HEAD] = tensors.pop(EMBEDDING)

    change_tensors(copy, rename)
    config = read_config(copy)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, read_params(copy, config), params)
    # Untied, neither stands for the other.
    with pytest.raises(UserError, match="1 missing tensors: embed_tokens.weight"):
        read_params(copy, dataclasses.replace(config, tie_embeddings=False))


def test_an_untied_model_without_a_head_is_refused(copy: Path) -> None:
    change_json(copy / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match="1 missing tensors: lm_head.weight"):
        read_params(copy, read_config(copy))


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: name.removeprefix("model."),  # AutoModel.save_pretrained
        lambda name: f"_orig_mod.{name}",  # torch.compile
        lambda name: f"module.{name}",  # DataParallel
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("model.", "model.language_model."),
        lambda name: f"language_model.{name}",
        lambda name: f"_forward_module.{name}",  # Lightning
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        lambda name: (
            "_fsdp_wrapped_module."
            + name.replace(".1.", ".1._fsdp_wrapped_module._checkpoint_wrapped_module.")
        ),
    ],
)
def test_names_may_be_wrapped(
    renamed: Callable[[str], str], copy: Path, params: Params
) -> None:
    save_file(
        {renamed(k): v for k, v in load_file(copy / WEIGHTS).items()}, copy / WEIGHTS
    )
    jax.tree.map(np.testing.assert_array_equal, read_params(copy, CONFIG), params)


def test_two_names_of_a_tensor_are_refused(copy: Path) -> None:
    change_tensors(
        copy, lambda tensors: tensors.update({f"module.{GATE}": tensors[GATE]})
    )
    with pytest.raises(UserError, match=f"{GATE} .* are the same tensor of the model"):
        read_params(copy, CONFIG)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_only_the_language_model_of_gemma_3_is_read(
    prefix: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        CONFIG,
        qkv_bias=False,
        qk_norm=True,
        activation="gelu_tanh",
        norm_plus_one=True,
        post_norms=True,
        scale_embeddings=True,
        query_scale_dim=4,
        local_rope_theta=10_000.0,
    )
    params = random_params(config)
    write_model(tmp_path / "model", config, params, "gemma3_text")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    outer = {"model_type": "gemma3", "text_config": content}
    file.write_text(json.dumps(outer))

    def wrap(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            inner = name.removeprefix("model.")
            tensors[f"{prefix}language_model.{inner}"] = tensors.pop(name)
        tensors[f"{prefix}vision_tower.encoder.weight"] = np.zeros(3)
        tensors[f"{prefix}multi_modal_projector.weight"] = np.zeros(3)

    change_tensors(tmp_path / "model", wrap)
    read = read_config(tmp_path / "model")
    assert read == config
    again = read_params(tmp_path / "model", read)
    jax.tree.map(np.testing.assert_array_equal, again, params)
