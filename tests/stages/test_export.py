"""Stage `export`: what other tools load, and where it came from."""

from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

import rlt_jax
from rlt_jax.stages import run_pipeline
from rlt_jax.training import checkpoint


def export(workdir: Path, path: str, dtype: str = "float32") -> Path:
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "stage": "export",
            "model": {"path": path},
            "model_type": "",
            "dtype": dtype,
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
