"""Adapters in the layout of PEFT, with peft as the reference."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlt_jax
from rlt_jax.errors import UserError
from rlt_jax.models.families import family
from rlt_jax.models.peft import AdaptedTensor, adapt
from rlt_jax.models.weight_files import find_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 20), np.int32)
Make = Callable[..., tuple[Path, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a base model with an adapter of random weights, by peft."""

    def adapter(model_type: str = "llama", **settings: Any) -> tuple[Path, Any]:
        torch.manual_seed(0)
        config, architecture = FAMILIES[model_type]
        tied = settings.pop("tied", False)
        base = architecture(config(**SHAPE, tie_word_embeddings=tied))
        base.save_pretrained(tmp_path / "base")
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ALL} | settings
        model = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_" in name:
                    value.normal_(std=0.2)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", model

    return adapter


def log_probs(folder: Path) -> np.ndarray:
    model, params = rlt_jax.load_model(str(folder))
    return np.asarray(rlt_jax.token_log_probs(model, params, TOKENS))[:, 1:]


def their_log_probs(model: Any) -> np.ndarray:
    ids = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.inference_mode():
        values = torch.log_softmax(model(ids).logits[:, :-1], -1)
    return values.gather(-1, ids[:, 1:, None])[..., 0].numpy()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"]},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}},
        {"alpha_pattern": {r"layers\.0\..*": 12, "v_proj": 1}},
    ],
)
def test_an_adapter_of_peft_is_a_model(
    model_type: str, settings: dict[str, Any], make: Make
) -> None:
    folder, model = make(model_type, **settings)
    ours = log_probs(folder)
    np.testing.assert_allclose(ours, their_log_probs(model), atol=1e-5)
    assert np.abs(ours - log_probs(folder.with_name("base"))).max() > 0.1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".weight", ".default.weight"),  # of older versions
        ("base_model.", "_orig_mod.base_model."),
        ("layers.1.", "layers.1._orig_mod."),
    ],
)
def test_names_may_be_others(old: str, new: str, make: Make) -> None:
    folder, model = make()
    file = folder / "adapter_model.safetensors"
    renamed = {k.replace(old, new): value for k, value in load_file(file).items()}
    save_file(renamed, file)
    np.testing.assert_allclose(log_probs(folder), their_log_probs(model), atol=1e-5)


class Recorded(NamedTuple):
    """A stored tensor that remembers what was read of it."""

    values: np.ndarray
    asked: list[tuple[slice, ...]]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        self.asked.append(index)
        return self.values[index]


def test_only_the_slices_asked_for_are_read() -> None:
    rng = np.random.default_rng(0)
    shapes = (12, 8), (2, 8), (12, 2)
    W, A, B = (Recorded(rng.normal(size=x).astype(np.float16), []) for x in shapes)
    part = AdaptedTensor(W, A, B, scale=0.5)[4:10, 2:5]
    product = B.values.astype(np.float32) @ A.values.astype(np.float32)
    whole = W.values.astype(np.float32) + 0.5 * product
    assert part.dtype == np.float32
    np.testing.assert_allclose(part, whole[4:10, 2:5], rtol=1e-6)
    every, rows, columns = slice(None), slice(4, 10), slice(2, 5)
    asked = [tensor.asked for tensor in (W, A, B)]
    assert asked == [[(rows, columns)], [(every, columns)], [(rows, every)]]


def test_tensors_without_adapters_stay_as_they_are(make: Make) -> None:
    folder, _ = make(target_modules=["v_proj"])
    stored = find_tensors(folder.with_name("base"), family("llama"))
    adapted = adapt(folder, stored)
    assert adapted.keys() == stored.keys()
    changed = {name for name in stored if adapted[name] != stored[name]}
    assert changed == {f"layers.{i}.self_attn.v_proj.weight" for i in range(2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; merge"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' is not supported"),
        ({"revision": "v2"}, "revision='v2' is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens="),
        ({"r": 8}, r"lora_A \[4, .* and lora_B .*, not for r=8, lora_alpha=6 and the"),
        ({"rank_pattern": {"v_proj": 2}}, r"v_proj has lora_A .*, not for r=2"),
        ({"lora_alpha": None}, "not for r=4, lora_alpha=None and"),
        ({"alpha_pattern": {"v_proj": "1"}}, "v_proj has .*, lora_alpha='1' and"),
        ({"base_model_name_or_path": None}, "has base_model_name_or_path=None; write"),
        ({"base_model_name_or_path": "/nowhere"}, "model '/nowhere'"),
    ],
)
def test_settings_that_would_be_lost_are_refused(
    changes: dict[str, Any], message: str, make: Make
) -> None:
    folder, _ = make()
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        log_probs(folder)


def drop(name: str) -> Callable[[dict], dict]:
    return lambda x: {k: v for k, v in x.items() if not k.endswith(name)}


def rename(old: str, new: str) -> Callable[[dict], dict]:
    return lambda x: {k.replace(old, new): v for k, v in x.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("0.mlp.up_proj.lora_B.weight"), "0.mlp.up_proj has .* lora_B None, not"),
        (rename("layers.1.", "layers.7."), "layers.7.* is no layer, or"),
        (rename("lora_A", "lora_embedding_A"), "is not an adapter of a projection"),
        (rename("down_proj", "fc_down"), "fc_down is no layer, or"),
        (
            lambda x: {k: v[:2] for k, v in x.items()},
            "has lora_A .* the model's ",
        ),
        (lambda x: {k: v[:, :1] for k, v in x.items()}, "has lora_A "),
        (lambda x: {}, "has no tensors"),
        (
            lambda x: {k: v.astype(np.int8) for k, v in x.items()},
            r"\(I8\) .* is not an",
        ),
        (
            lambda x: x | rename("lora_A.", "lora_A.default.")(x),
            "lora_A.weight' .*, or not the only one",
        ),
        (lambda x: x | rename("l.layers", "l.model.layers")(x), "or has two adapters"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict], dict], message: str, make: Make
) -> None:
    folder, _ = make()
    file = folder / "adapter_model.safetensors"
    changed = {k: np.ascontiguousarray(v) for k, v in change(load_file(file)).items()}
    save_file(changed, file)
    with pytest.raises(UserError, match=message):
        log_probs(folder)


def test_an_adapter_of_a_tied_head_is_refused(make: Make) -> None:
    """The head beside the embedding is not read, so neither is its adapter."""
    folder, _ = make(tied=True)
    file, base = folder / "adapter_model.safetensors", folder.with_name("base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, base / "model.safetensors")
    head = {"A": np.ones((4, 32), np.float32), "B": np.ones((96, 4), np.float32)}
    named = {f"base_model.model.lm_head.lora_{k}.weight": x for k, x in head.items()}
    save_file(load_file(file) | named, file)
    with pytest.raises(UserError, match="lm_head is no layer, or"):
        log_probs(folder)


def test_damaged_and_missing_files_are_named(make: Make) -> None:
    folder, _ = make()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="adapter_model.safetensors is damaged"):
        log_probs(folder)
    file.unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors is missing"):
        log_probs(folder)


def test_an_adapter_beside_a_config_is_an_adapter(make: Make) -> None:
    folder, model = make()
    shutil.copy(folder.with_name("base") / "config.json", folder)
    np.testing.assert_allclose(log_probs(folder), their_log_probs(model), atol=1e-5)
