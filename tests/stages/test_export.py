"""Stage `export`: what other tools load, and where it came from."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from safetensors.numpy import load_file

import rlt_jax
from rlt_jax.errors import UserError
from rlt_jax.models.families import FAMILIES
from rlt_jax.models.transformer import Transformer
from rlt_jax.settings import build
from rlt_jax.stages import run_pipeline
from rlt_jax.training import checkpoint
from rlt_jax.training.lora import LoRAConfig, combine, make_tuning
from rlt_jax.types import Params


def export(
    workdir: Path, path: str, dtype: str = "float32", adapter_base: str = ""
) -> Path:
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "stage": "export",
            "model": {"path": path},
            "model_type": "",
            "dtype": dtype,
            "adapter_base": adapter_base,
            "mesh": {},
        }
    )
    run_pipeline(config, workdir)
    return workdir / "export" / "model"


def test_the_exported_model_is_the_model(tmp_path: Path) -> None:
    folder = export(tmp_path, "embedded")
    before, after = (rlt_jax.load_model(str(p))[1] for p in ("embedded", folder))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert rlt_jax.load_tokenizer(folder).decode([20]) != ""
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "853,120 parameters in float32" in card


def test_transformers_computes_the_same(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = export(tmp_path, "embedded")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = np.arange(3, 35, dtype=np.int32)[None]
    with torch.inference_mode():
        logits = theirs(torch.from_numpy(tokens.astype(np.int64))).logits[0, :-1]
    expected = torch.log_softmax(logits, -1).gather(
        1, torch.from_numpy(tokens[0, 1:, None].astype(np.int64))
    )
    model, params = rlt_jax.load_model("embedded")
    ours = rlt_jax.token_log_probs(model, params, tokens)
    np.testing.assert_allclose(ours[0, 1:], expected[:, 0], atol=1e-4)


def test_a_hub_id_is_downloaded_and_a_folder_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(tmp_path, "embedded")
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(checkpoint.huggingface_hub, "snapshot_download", download)
    assert checkpoint.find_model(str(folder)) == folder
    assert asked == []
    assert checkpoint.find_model("someone/some-model") == folder
    assert asked == ["someone/some-model"]


def test_trained_adapters_are_exported_with_their_base(
    section: Callable[[str], dict[str, Any]],
    run_stage: Callable[[dict[str, Any], Path], Path],
    tmp_path: Path,
    mesh: Mesh,
    full_logits: Callable[[Transformer, Params, np.ndarray], np.ndarray],
) -> None:
    sft, key = section("sft"), jax.random.key(0)
    source = build(checkpoint.ModelSource, sft["model"], "model")
    model, base = checkpoint.load(source, mesh, key)[:2]
    config = LoRAConfig(4, modules=("query", "down"))
    sft["lora"] = dataclasses.asdict(config)
    stage = run_stage(sft, tmp_path / "run")
    tuning, fresh = make_tuning(config, model, base, mesh, key)
    with checkpoint.open_manager(stage, 1) as manager:
        _, trees = checkpoint.restore_latest(manager, {"adapters": fresh}, print)
    tree = combine(tuning.model, base, trees["adapters"])

    folder = export(tmp_path, str(stage))
    exported = rlt_jax.load_model(str(folder))
    tokens = np.arange(3, 35, dtype=np.int32)[None]
    ours = full_logits(*exported[:2], tokens)
    expected = full_logits(tuning.model, tree, tokens)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(ours - full_logits(model, base, tokens)).max() > 0.01
    for path, kernel in flatten_dict(exported[1]).items():
        trained = any(name in config.modules for name in path)
        assert bool((kernel != flatten_dict(base)[path]).any()) == trained, path


def test_adapters_are_exported_for_peft(
    section: Callable[[str], dict[str, Any]],
    run_stage: Callable[[dict[str, Any], Path], Path],
    tmp_path: Path,
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base = export(tmp_path / "base", "embedded_small")
    sft = section("sft")
    sft["model"] = {"path": str(base)}
    sft["lora"] = {"rank": 4, "alpha": 6.0, "modules": ("query", "out", "down")}
    stage = run_stage(sft, tmp_path / "run")
    merged = export(tmp_path / "merged", str(stage))
    adapter = export(tmp_path / "adapter", str(stage), "bfloat16", str(base))
    assert (adapter / "tokenizer_config.json").is_file()
    assert not (adapter / "model.safetensors").exists()
    modes = {file.stat().st_mode for file in adapter.iterdir() if file.is_file()}
    assert len(modes) == 1
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}
    size = sum(x.size for x in tensors.values())
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert f"{size:,} parameters in float32" in card
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 4,
        "lora_alpha": 6.0,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["down_proj", "o_proj", "q_proj"],
        "inference_mode": True,
    }
    tokens = np.arange(3, 35, dtype=np.int32)[None]
    expected = rlt_jax.token_log_probs(*rlt_jax.load_model(str(merged)), tokens)
    before = rlt_jax.token_log_probs(*rlt_jax.load_model(str(base)), tokens)
    assert np.abs(expected - before).max() > 0.01
    # Here, where the folder of the adapter is a model, and there.
    ours = rlt_jax.token_log_probs(*rlt_jax.load_model(str(adapter)), tokens)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), adapter
    )
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.inference_mode():
        logits = theirs(ids).logits[0, :-1]
    picked = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(expected[0, 1:], picked, atol=1e-4)


def test_the_base_of_adapters_has_to_be_their_model(
    section: Callable[[str], dict[str, Any]],
    run_stage: Callable[[dict[str, Any], Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = export(tmp_path / "base", "embedded_small")
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    sft = section("sft")
    sft["model"] = {"path": str(base)}
    sft["sft"]["steps"] = 1
    sft["lora"] = {"rank": 2, "alpha": 2.0, "modules": ("query",)}
    stage = str(run_stage(sft, tmp_path / "run"))
    refused = "is no text model in Hugging Face format; export it"
    with pytest.raises(UserError, match=f"adapter_base='{stage}' {refused}"):
        export(tmp_path / "out", stage, adapter_base=stage)
    export(tmp_path / "same", stage, adapter_base=str(base))
    assert "has to have the weights" not in caplog.text
    export(tmp_path / "else", stage, adapter_base=str(moved))
    warning = f"adapter_base={moved} has to have the weights of '{base}'"
    assert warning in caplog.text
    multimodal = FAMILIES["llama"]._replace(skipped=("vision_tower.",))
    monkeypatch.setitem(FAMILIES, "llama", multimodal)
    with pytest.raises(UserError, match=refused):
        export(tmp_path / "out", stage, adapter_base=str(base))


@pytest.fixture
def trained(
    section: Callable[[str], dict[str, Any]],
    run_stage: Callable[[dict[str, Any], Path], Path],
    tmp_path: Path,
) -> Path:
    """The folder of a stage that trained all parameters for a step."""
    sft = section("sft")
    sft["sft"]["steps"] = 1
    return run_stage(sft, tmp_path / "run")


def test_the_card_has_every_stage_on_the_way(trained: Path, tmp_path: Path) -> None:
    first = trained
    for after, role in (("second", "policy"), ("third", "model")):
        folder = Path(shutil.copytree(first, tmp_path / after))
        settings = json.dumps({role: {"path": str(first)}, "of": after})
        (folder / "settings.json").write_text(settings)
        first = folder
    card = (export(tmp_path, str(first)) / "README.md").read_text(encoding="utf-8")
    stages = [line for line in card.splitlines() if line.startswith("## ")]
    assert stages == ["## Stage `third`", "## Stage `second`", "## Stage `part`"]


def test_a_stage_without_adapters_has_none_to_export(
    trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for path in (str(trained), "embedded"):
        with pytest.raises(UserError, match="is no stage that trained adapters"):
            export(tmp_path / "out", path, adapter_base=str(tmp_path))


def test_the_export_has_the_chat_template_that_is_in_use(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[-1]['content'] }}!")
    config = {
        "seed": 0,
        "stage": "export",
        "model": {"path": "embedded", "chat_template": str(template)},
        "model_type": "",
        "dtype": "float32",
        "adapter_base": "",
        "mesh": {},
    }
    run_pipeline(ml_collections.ConfigDict(config), tmp_path / "run")
    folder = tmp_path / "run" / "export" / "model"
    exported = rlt_jax.load_tokenizer(folder)
    assert exported.render([{"role": "user", "content": "q"}]) == "q!"
    config["dtype"] = "int8"
    with pytest.raises(UserError, match="config.dtype='int8': one of float32"):
        run_pipeline(ml_collections.ConfigDict(config), tmp_path / "other")


def test_a_family_that_does_not_fit_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlt_jax.training.checkpoint, "load_params", None)
    config = {"seed": 0, "stage": "export", "model": {"path": "embedded"}, "mesh": {}}
    config |= {"dtype": "float32", "adapter_base": ""}
    for name, message in [("lama", "one of , llama"), ("gemma2", "does not fit")]:
        with pytest.raises(UserError, match=f"model_type.*{message}"):
            run_pipeline(
                ml_collections.ConfigDict(config | {"model_type": name}), tmp_path
            )


def test_the_alpha_of_adapters_may_be_the_default(
    section: Callable[[str], dict[str, Any]],
    run_stage: Callable[[dict[str, Any], Path], Path],
    tmp_path: Path,
) -> None:
    base = export(tmp_path / "base", "embedded_small")
    sft = section("sft")
    sft["model"], sft["lora"] = {"path": str(base)}, {"rank": 2}
    sft["sft"]["steps"] = 1
    stage = run_stage(sft, tmp_path / "run")
    adapter = export(tmp_path / "adapter", str(stage), adapter_base=str(base))
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (2, 16.0)
