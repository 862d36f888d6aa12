"""Damaged and hostile models: each is valid, or one message names the file and key."""

import dataclasses
import json
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from rlt_jax.errors import UserError
from rlt_jax.models.config import ModelConfig, RopeScaling
from rlt_jax.models.convert import read_config, read_params, write_model
from rlt_jax.models.families import family
from rlt_jax.models.peft import adapt, adapter_base
from rlt_jax.models.transformer import init_params
from rlt_jax.models.weight_files import find_tensors, has_own_head
from rlt_jax.training.checkpoint import ModelSource, shape_of
from tests.data.mutations import (
    COUNTS,
    TEXTS,
    check_settings,
    message_of,
    mutated_bytes,
    mutated_json,
)

CONFIG = ModelConfig(
    vocab_size=32,
    embed_dim=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    mlp_dim=12,
    max_length=64,
    qkv_bias=True,
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY = "model.layers.0.self_attn.q_proj"
# Families with all kinds of keys.
CONTENTS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 4.0},
    },
    "llama": {
        "hidden_act": "silu",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
    "gemma3": {
        "text_config": {"hidden_size": 8, "final_logit_softcapping": 30.0},
        "sliding_window_pattern": 2,
        "sliding_window": 8,
    },
}
SIZES = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
for _name, _content in CONTENTS.items():
    CONTENTS[_name] = {"model_type": _name} | SIZES | _content
STAGE = dataclasses.asdict(
    dataclasses.replace(
        CONFIG,
        sliding_window=8,
        windowed_layers=(True, False),
        rope_scaling=RopeScaling("yarn", 2.0, original_length=32),
    )
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the family Qwen2, not to be changed."""
    path = tmp_path_factory.mktemp("model")
    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes
    )
    write_model(path / "whole", CONFIG, params, "qwen2")
    return path / "whole"


@pytest.fixture
def sharded(model: Path, tmp_path: Path) -> Path:
    """The same model in two files with an index."""
    path = tmp_path / "sharded"
    path.mkdir()
    (path / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors, listed = load_file(model / WEIGHTS), {}
    for n, file in enumerate(("a.safetensors", "b.safetensors")):
        part = {name: tensors[name] for name in sorted(tensors)[n::2]}
        save_file(part, path / file)
        listed |= dict.fromkeys(part, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of one projection of the model."""
    path = tmp_path / "adapter"
    path.mkdir()
    shapes = {"A": (2, 8), "B": (8, 2)}
    name = "base_model.model." + QUERY + ".lora_{}.weight"
    tensors = {name.format(k): np.ones(x, np.float32) for k, x in shapes.items()}
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    return path


ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 2,
    "lora_alpha": 4,
    "bias": "none",
    "use_rslora": False,
    "target_modules": ["q_proj"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {r"layers\.[0-9]+\..*": 8},
    "modules_to_save": None,
}


def write(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content))
    return file


def read_adapter(folder: Path, model: Path) -> None:
    adapter_base(folder)
    for tensor in adapt(folder, find_tensors(model, family("qwen2"))).values():
        tensor[tuple(slice(None) for _ in getattr(tensor, "shape", "AB"))]


def read_weights(path: Path) -> None:
    """Everything that is read of weight files, to the last value."""
    has_own_head(path, family("qwen2"))
    for tensor in find_tensors(path, family("qwen2")).values():
        if tensor.dtype in ("F32", "F16", "F64", "BF16") and 0 not in tensor.shape:
            tensor[tuple(slice(None) for _ in tensor.shape)]


@pytest.mark.parametrize("name", CONTENTS)
def test_the_unchanged_contents_are_valid(name: str, tmp_path: Path) -> None:
    write(tmp_path / "config.json", CONTENTS[name])
    assert read_config(tmp_path).num_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "8"}, "hidden_size='8': a whole number, at least 1"),
        ({"hidden_size": 8.0}, "hidden_size=8.0: a whole number"),
        ({"hidden_size": True}, "hidden_size=True: a whole number"),
        ({"hidden_size": []}, r"hidden_size=\[\]: a whole number"),
        ({"hidden_size": {"a": 1}}, "hidden_size={'a': 1}: a whole"),
        ({"hidden_size": -8}, "hidden_size=-8: at least 1"),
        ({"hidden_size": 0}, "hidden_size=0: at least 1"),
        (
            {"hidden_size": 10**30},
            "hidden_size=10*: at least 1, at most 1048576",
        ),
        ({"hidden_size": None, "head_dim": None}, "it lacks 'hidden_size'"),
        ({"hidden_size": 2, "head_dim": None}, "it lacks 'head_dim'"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: at least 1"),
        ({"num_key_value_heads": "x"}, "num_key_value_heads='x': a whole number"),
        ({"num_key_value_heads": 3}, "num_heads=4 is not a multiple of"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000: .* at most 10000"),
        ({"num_hidden_layers": None}, "it lacks 'num_hidden_layers'"),
        ({"head_dim": 10**5}, "head_dim=100000: .* at most 4096"),
        ({"head_dim": 3}, "head_dim=3: .*even"),
        ({"vocab_size": [32]}, r"vocab_size=\[32\]: a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6': a number, at least"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: at least 1e-15"),
        ({"rope_theta": float("inf")}, "rope_theta=inf: above 1, at most"),
        ({"rope_theta": -1}, "rope_theta=-1: above 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no': True or False"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: True or False"),
        ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\]: a text"),
        ({"model_type": ["qwen2"]}, "model_type .* is not supported; supported are"),
        ({"model_type": None}, "model_type 'None' is not supported"),
        ({"model_type": "x" * 10**6}, "model_type 'x+' is not supported"),
        ({"text_config": 5}, "text_config=5: keys and values"),
        ({"text_config": [[1]]}, "text_config=.*: keys and values"),
        ({"text_config": {"hidden_size": "x"}}, "hidden_size='x': a whole number"),
        ({"rope_scaling": []}, r"rope_scaling=\[\]: keys and values"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn': keys and values"),
        ({"rope_scaling": {"type": 5}}, "rope_type=5: a text, one of default"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type=.*: a text, one of default"),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, "factor='2': a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor=0: at least"),
        ({"rope_parameters": 3}, "rope_parameters=3: keys and values"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x': a number"),
        (
            {"rope_parameters": {"full_attention": 5}},
            "full_attention=5: keys and values",
        ),
        ({"rope_parameters": {"sliding_attention": []}}, "sliding_attention="),
        ({"sliding_window": -5}, "sliding_window=-5: at least 1"),
        ({"sliding_window": "x"}, "sliding_window='x': a whole number"),
        ({"use_sliding_window": "no"}, "use_sliding_window='no': True or False"),
        ({"max_window_layers": -1}, "max_window_layers=-1: at least 0"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention': a list"),
        ({"layer_types": 5}, "layer_types=5: a list"),
        (
            {"layer_types": [5, None]},
            r"layer_types=\[5, None\]: a list, each a text, one of",
        ),
        ({"layer_types": ["sliding_attention"] * 9}, "windowed_layers has 9 values"),
        ({"quantization_config": [[[]]]}, "quantization_config=.* is not supported"),
    ],
)
def test_a_wrong_value_of_a_config_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "config.json", CONTENTS["qwen2"] | changes)
    with pytest.raises(UserError, match=f"^{file}: .*{message}"):
        read_config(tmp_path)


def test_scalings_that_divide_by_zero_are_refused(tmp_path: Path) -> None:
    parameters = CONTENTS["llama"]["rope_parameters"] | {"low_freq_factor": 4.0}
    write(tmp_path / "config.json", CONTENTS["llama"] | {"rope_parameters": parameters})
    with pytest.raises(UserError, match="low_freq_factor below high_freq_factor"):
        read_config(tmp_path)


def test_keys_that_are_null_have_their_defaults(tmp_path: Path) -> None:
    nulls = ["max_window_layers", "rope_scaling", "text_config", "layer_types"]
    write(tmp_path / "config.json", CONTENTS["qwen2"] | dict.fromkeys(nulls))
    config = read_config(tmp_path)
    assert config.rope_scaling is None
    assert config.sliding_window is None  # windows begin at layer 28


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:8])
@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "model.json", "adapter_config.json"]
)
def test_a_json_file_of_no_keys_is_named(name: str, text: str, tmp_path: Path) -> None:
    write(tmp_path / "config.json", CONTENTS["qwen2"])
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        if name == INDEX:
            read_config(tmp_path)
            read_params(tmp_path, CONFIG)
        elif name == "adapter_config.json":
            adapter_base(tmp_path)
        else:
            shape_of(ModelSource(path=str(tmp_path)))
    assert str(file) in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 10**6}, "num_layers=1000000"),
        ({"num_layers": "2"}, "num_layers='2'"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"windowed_layers": 5}, "windowed_layers=5"),
        ({"windowed_layers": [1, 0]}, r"windowed_layers=\[1, 0\]"),
        ({"windowed_layers": None}, "windowed_layers=None"),
        ({"rope_scaling": 5}, "rope_scaling"),
        ({"rope_scaling": {"kind": "yarn"}}, "factor"),
        ({"rope_scaling": {"kind": [], "factor": 2.0}}, r"kind=\[\]"),
        ({"rope_scaling": {"kind": "x", "factor": 2.0}}, "rope_scaling.kind='x'"),
        ({"activation": {}}, "activation={}"),
        ({"final_softcap": 0.0}, "final_softcap=0.0"),
    ],
)
def test_a_wrong_value_of_a_stage_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "model.json", STAGE | changes)
    with pytest.raises(UserError, match=f"{file}.*{message}"):
        shape_of(ModelSource(path=str(tmp_path)))
    write(file, STAGE)
    assert shape_of(ModelSource(path=str(tmp_path))).rope_scaling.factor == 2.0


def test_sizes_that_the_files_lack_take_no_memory(model: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).symlink_to(model / WEIGHTS)
    content = json.loads((model / "config.json").read_text())
    before, begin = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        time.process_time(),
    )
    for changes in (
        {"num_hidden_layers": 10_000},
        {"vocab_size": 2**24},
        {"hidden_size": 2**20, "intermediate_size": 2**20},
    ):
        write(tmp_path / "config.json", content | changes)
        message = "missing tensors|has shape .*, but config.json requires"
        with pytest.raises(UserError, match=message):
            read_params(tmp_path, read_config(tmp_path))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # KiB, and seconds, of all of them.
    assert grown < 1_000_000 and time.process_time() - begin < 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_map": None}, "weight_map has None"),
        ({"weight_map": ["a.safetensors"]}, "weight_map has None"),
        ({"weight_map": "a.safetensors"}, "weight_map has None"),
        ({"weight_map": {"x": None}}, "weight_map has None"),
        ({"weight_map": {"x": ["a.safetensors"]}}, "weight_map has .'a.safetensors'"),
        ({"weight_map": {"x": "../a.safetensors"}}, "'../a.safetensors', not a"),
        ({"weight_map": {"x": "/tmp/a.safetensors"}}, "'/tmp/a.safetensors', not a"),
        ({"weight_map": {"x": "c/a.safetensors"}}, "'c/a.safetensors', not a"),
        ({"weight_map": {"x": ".."}}, "'..', not a"),
        ({"weight_map": {"x": ""}}, "'', not a"),
        ({"weight_map": {"x": "a.bin"}}, "'a.bin', not a"),
        ({"weight_map": {"x": "a\0.safetensors"}}, "not a .safetensors file beside"),
        ({"weight_map": {"x": "a" * 999 + ".safetensors"}}, "not a .safetensors file"),
        (
            {"weight_map": {"x": "a.safetensors"}},
            "lists 1 missing tensors: x is not in",
        ),
        ({"weight_map": {"x": "c.safetensors"}}, "c.safetensors is missing; download"),
        ({"weight_map": {}}, f"neither {WEIGHTS} nor files of {INDEX}"),
    ],
)
def test_a_wrong_index_is_named(
    changes: dict[str, Any], message: str, sharded: Path
) -> None:
    index = json.loads((sharded / INDEX).read_text())
    write(sharded / INDEX, index | changes)
    with pytest.raises(UserError, match=message):
        read_params(sharded, CONFIG)


def test_a_shard_may_be_a_link_and_may_have_more_than_the_index(sharded: Path) -> None:
    (sharded / "a.safetensors").rename(sharded.parent / "blob")
    (sharded / "a.safetensors").symlink_to(sharded.parent / "blob")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"].popitem()
    write(sharded / INDEX, index)
    read_params(sharded, CONFIG)


def test_a_tensor_in_another_file_than_the_index_says_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name = next(k for k, v in index["weight_map"].items() if v == "a.safetensors")
    index["weight_map"][name] = "b.safetensors"
    write(sharded / INDEX, index)
    with pytest.raises(UserError, match=f"{INDEX} lists 1 missing tensors: .*b.safe"):
        read_params(sharded, CONFIG)


def header_and_data(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


DAMAGED: dict[str, Callable[[dict, bytes], bytes]] = {
    "empty": lambda h, d: b"",
    "short": lambda h, d: b"abc",
    "zeros": lambda h, d: bytes(64),
    "cut": lambda h, d: with_header(h, d[:-1]),
    "more": lambda h, d: with_header(h, d + b"x"),
    "huge header": lambda h, d: struct.pack("<Q", 2**62) + b"{}",
    "long header": lambda h, d: struct.pack("<Q", 10**8) + b"{}",
    "no JSON": lambda h, d: with_header(b"hello", d),
    "nested": lambda h, d: with_header(b"[" * 100_000, d),
    "list": lambda h, d: with_header([], d),
    "null": lambda h, d: with_header(None, d),
    "no offsets": lambda h, d: with_header({"a": {"dtype": "F32"}}, d),
    "dtype": lambda h, d: with_header(h | {"x": {"dtype": "X9"}}, d),
    "negative": lambda h, d: with_header(changed(h, shape=[-1, 8]), d),
    "overflow": lambda h, d: with_header(changed(h, shape=[2**40, 2**40]), d),
    "outside": lambda h, d: with_header(changed(h, data_offsets=[0, 10**9]), d),
    "reversed": lambda h, d: with_header(changed(h, data_offsets=[64, 0]), d),
    "overlap": lambda h, d: with_header(changed(h, data_offsets=[0, 64]), d),
}


def changed(header: dict[str, Any], **changes: Any) -> dict[str, Any]:
    name = max(header)
    return header | {name: header[name] | changes}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.safetensors"])
def test_a_damaged_weight_file_is_named(
    name: str, kind: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    write(tmp_path / "config.json", json.loads((model / "config.json").read_text()))
    source = model if name == WEIGHTS else adapter
    damaged = DAMAGED[kind](*header_and_data(source / name))
    file = (tmp_path if name == WEIGHTS else adapter) / name
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=f"{file} is damaged; download it again"):
        read_config(tmp_path)
        read_adapter(adapter, model)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8"])
def test_a_head_of_another_type_is_named(
    dtype: str, model: Path, tmp_path: Path
) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["lm_head.weight"] = np.ones((32, 8), np.int8)
    content = save(tensors).replace(b'"I8"', f'"{dtype}"'.encode())
    size = len(content) - 8 - sum(x.nbytes for x in tensors.values())
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", size) + content[8:])
    write(tmp_path / "config.json", json.loads((model / "config.json").read_text()))
    with pytest.raises(UserError, match=f"lm_head.weight has dtype {dtype}"):
        read_params(tmp_path, read_config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0, "rank_pattern": None}, "not for r=0"),
        ({"r": True, "rank_pattern": {}}, "not for r=True"),
        ({"r": "2", "rank_pattern": None}, "not for r='2'"),
        ({"lora_alpha": float("nan"), "alpha_pattern": {}}, "lora_alpha=nan"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "lora_alpha=inf"),
        ({"alpha_pattern": {"q_proj": True}}, "lora_alpha=True"),
        ({"rank_pattern": [2]}, "adapter_config.json: rank_pattern=.2.; give ends"),
        ({"rank_pattern": "q_proj"}, "rank_pattern='q_proj'; give ends of module"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern={'.': 2}; give ends of module"),
        ({"rank_pattern": {"a{99999999999}": 2}}, "rank_pattern=.*; give ends"),
        ({"alpha_pattern": {"(.*)*(.*)*x": 2}}, "alpha_pattern=.*; give ends"),
        ({"alpha_pattern": {".*" * 9 + "x": 2}}, "alpha_pattern=.*; give ends"),
        ({"peft_type": [["LORA"]]}, "peft_type=.* is not supported"),
        ({"modules_to_save": ["x"] * 10**5}, "modules_to_save=.* is not supported"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path=5"),
    ],
)
def test_a_wrong_value_of_an_adapter_is_named(
    changes: dict[str, Any], message: str, adapter: Path, model: Path
) -> None:
    read_adapter(adapter, model)
    write(adapter / "adapter_config.json", ADAPTER | changes)
    begin = time.process_time()
    with pytest.raises(UserError, match=message) as raised:
        read_adapter(adapter, model)
    assert len(str(raised.value)) < 500 and time.process_time() - begin < 10


def test_an_adapter_of_a_norm_is_refused(adapter: Path, model: Path) -> None:
    name = "base_model.model.model.norm.lora_{}.weight"
    shapes = {"A": (2,), "B": (8, 2)}
    tensors = {name.format(k): np.ones(x, np.float32) for k, x in shapes.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="norm has lora_A"):
        read_adapter(adapter, model)


SOME, MANY = COUNTS
EXAMPLES = pytest.mark.parametrize(
    "examples", [SOME, pytest.param(MANY, marks=pytest.mark.slow)]
)


@EXAMPLES
def test_any_config_is_valid_or_named(examples: int, tmp_path: Path) -> None:
    mutated = st.sampled_from(list(CONTENTS.values())).flatmap(mutated_json)
    outcomes = []

    @check_settings(examples)
    @given(mutated)
    def check(content: Any) -> None:
        write(tmp_path / "config.json", content)
        message = message_of(lambda: read_config(tmp_path), "/config.json")
        outcomes.append(message)

    check()
    assert sum(map(bool, outcomes)) > len(outcomes) / 3


@EXAMPLES
def test_any_stage_is_valid_or_named(examples: int, tmp_path: Path) -> None:
    source = ModelSource(path=str(tmp_path))
    outcomes = []

    @check_settings(examples)
    @given(mutated_json(STAGE))
    def check(content: Any) -> None:
        write(tmp_path / "model.json", content)
        outcomes.append(message_of(lambda: shape_of(source), "/model.json"))

    check()
    assert sum(map(bool, outcomes)) > len(outcomes) / 3


@EXAMPLES
def test_any_index_is_valid_or_named(examples: int, sharded: Path) -> None:
    content = json.loads((sharded / INDEX).read_text())

    @check_settings(examples)
    @given(mutated_json(content))
    def check(content: Any) -> None:
        write(sharded / INDEX, content)
        message_of(lambda: read_weights(sharded), INDEX, ".safetensors is missing")

    check()


@EXAMPLES
def test_any_weight_file_is_valid_or_named(
    examples: int, model: Path, tmp_path: Path
) -> None:
    header, data = header_and_data(model / WEIGHTS)
    whole, file = (model / WEIGHTS).read_bytes(), tmp_path / WEIGHTS
    headers = mutated_json(header).map(lambda header: with_header(header, data))

    @check_settings(examples)
    @given(st.one_of(headers, mutated_bytes(whole, len(whole) - len(data))))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        message_of(lambda: read_weights(tmp_path), str(file), "are the same tensor")

    check()


@EXAMPLES
def test_any_adapter_is_valid_or_named(
    examples: int, adapter: Path, model: Path
) -> None:
    file = adapter / "adapter_model.safetensors"
    header, data = header_and_data(file)
    whole = file.read_bytes()
    headers = mutated_json(header).map(lambda header: with_header(header, data))

    @check_settings(examples)
    @given(
        st.one_of(mutated_json(ADAPTER), st.just(ADAPTER)),
        st.one_of(headers, mutated_bytes(whole, 200), st.just(whole)),
    )
    def check(content: Any, weights: bytes) -> None:
        write(adapter / "adapter_config.json", content)
        file.write_bytes(weights)
        message_of(lambda: read_adapter(adapter, model), str(adapter))

    check()
