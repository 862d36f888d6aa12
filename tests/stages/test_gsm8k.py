"""The GSM8K config on real questions with a real tokenizer, shrunk to seconds."""

import importlib.util
import json
from pathlib import Path

import ml_collections

from rlt_jax.stages import run_pipeline

CONFIG = Path(__file__).parents[2] / "configs" / "gsm8k.py"


def test_gsm8k_runs_all_its_stages(shared: Path, tmp_path: Path) -> None:
    config = load_config()
    config.data_dir = str(shared / "data" / "gsm8k")
    config.tokenizer = str(shared / "data" / "tokenizers" / "deepseek_r1")
    shrink(config)
    run_pipeline(config, tmp_path)

    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["n_eval"] == 2
    assert summary["accuracy_base"] == summary["accuracy_student"] == 0
    assert summary["teacher_reward_rl"] < 0
    traces = read_rows(tmp_path / "collect" / "traces.jsonl")
    assert [trace["answer"] for trace in traces] == ["72", "10"]
    assert traces[0]["question"].startswith("Natalia sold clips to 48 of her friends")
    for stage in ("base", "warmup", "distil"):
        (row,) = read_rows(tmp_path / stage / "metrics.jsonl")
        assert 11 < row["sft/loss"] < 13  # of guessing among 128k tokens: 11.8


def load_config() -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location("gsm8k", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def shrink(config: ml_collections.ConfigDict) -> None:
    """Fewer and narrower rows; the vocabulary and the questions stay."""
    config.base.model.architecture.update(embed_dim=8, num_layers=1, mlp_dim=8)
    for name in config.pipeline[:-1]:
        section = config[name]
        if "sft" in section:
            section.sft.update(steps=1, batch_size=1, row_length=384)
        if "rows" in section:
            section.rows.update(micro_batch_size=1, row_length=384)
        if "sampling" in section:
            section.sampling.max_new_tokens = 4
        if "limit" in section.data:
            section.data.limit = 2
        if name == "distil":  # four tokens close no explanation
            section.data.keep_cut_off = True
    config.rl.held_out.limit = 1
    config.rl.loop.update(steps=1, batch_size=1, group_size=2)
    config.collect.collect.batch_size = 2
    for name in ("eval_base", "eval_student"):
        config[name].evaluate.batch_size = 2


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]
