"""Adapters in the layout of PEFT, with peft as the reference."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlt_jax
from rlt_jax.errors import UserError

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
        base = architecture(config(**SHAPE))
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


def test_names_of_older_versions_are_read(make: Make) -> None:
    folder, model = make()
    file = folder / "adapter_model.safetensors"
    renamed = {
        name.replace(".weight", ".default.weight"): value
        for name, value in load_file(file).items()
    }
    save_file(renamed, file)
    np.testing.assert_allclose(log_probs(folder), their_log_probs(model), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; merge"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
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
        (drop("0.mlp.up_proj.lora_B.weight"), "has only lora_A for .*0.mlp.up_proj"),
        (rename("layers.1.", "layers.7."), "or the model has no such layer"),
        (rename("lora_A", "lora_embedding_A"), "is not an adapter of a projection"),
        (rename("down_proj", "fc_down"), "or the model has no such layer"),
        (
            lambda x: {k: v[:2] for k, v in x.items()},
            "has lora_A .* the model's tensor",
        ),
        (lambda x: {k: v[:, :1] for k, v in x.items()}, "has lora_A "),
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


def test_damaged_and_missing_files_are_named(make: Make) -> None:
    folder, _ = make()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="adapter_model.safetensors is damaged"):
        log_probs(folder)
    file.unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors is missing"):
        log_probs(folder)


def test_an_adapter_of_a_head_that_the_model_lacks_is_refused(make: Make) -> None:
    folder, _ = make()
    base = folder.with_name("base")
    config = base / "config.json"
    changed = json.loads(config.read_text()) | {"tie_word_embeddings": True}
    config.write_text(json.dumps(changed))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, base / "model.safetensors")
    file = folder / "adapter_model.safetensors"
    head = {
        "base_model.model.lm_head.lora_A.weight": np.ones((2, 32), np.float32),
        "base_model.model.lm_head.lora_B.weight": np.ones((96, 2), np.float32),
    }
    save_file(load_file(file) | head, file)
    with pytest.raises(UserError, match="lm_head, or the model has no such layer"):
        log_probs(folder)


def test_an_adapter_beside_a_config_is_an_adapter(make: Make) -> None:
    folder, model = make()
    shutil.copy(folder.with_name("base") / "config.json", folder)
    np.testing.assert_allclose(log_probs(folder), their_log_probs(model), atol=1e-5)
