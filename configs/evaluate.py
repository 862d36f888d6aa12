"""Answers to a benchmark, sampled and graded; or graded alone.

    python -m rlt_jax.main --config=configs/evaluate.py --workdir=runs/aime24 \\
        --config.model.path=MODEL --config.data.task=aime24 --config.data.path=FILE

Writes samples.jsonl and results.json to runs/aime24/evaluate/: accuracy, pass@k and
majority@k with standard errors. Completions of another tool need no model:

    python -m rlt_jax.main --config=configs/evaluate.py --workdir=runs/theirs \\
        --config.data.task=aime24 --config.data.path=FILE \\
        --config.predictions=FILE.jsonl --config.evaluate.untagged=whole \\
        --config.evaluate.compare_with=runs/aime24/evaluate

A row of predictions is {"question": ..., "completions": [text, ...]}, or one text under
"completion"; a samples.jsonl is such a file. Tasks and their files:

    gsm8k    test.jsonl of github.com/openai/grade-school-math
    math500  test.jsonl of huggingface.co/datasets/HuggingFaceH4/MATH-500
    aime24   huggingface.co/datasets/math-ai/aime24 or Maxwell-Jia/AIME_2024
    aime25   huggingface.co/datasets/math-ai/aime25 or opencompass/AIME2025
    amc23    huggingface.co/datasets/math-ai/amc23
    gpqa     gpqa_diamond.csv of huggingface.co/datasets/Idavidrein/gpqa
    file     your own JSONL, JSON, CSV or Parquet with question and answer

A task's other settings come with the whole of data, as do the tasks that need no file:

    --config.data='{"task": "gpqa", "path": "gpqa_diamond.csv", "shuffle_seed": 1}'
    --config.data='{"task": "arithmetic", "split": "test", "size": 500}'

A task of your own is a function, "module:function"; see experiments/countdown.py.

Hardware: what the model needs to sample; predictions are graded on any CPU.
"""

import ml_collections
from ml_collections import config_dict

from rlt_jax.inference.engine import EngineConfig
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.settings import section
from rlt_jax.stages.evaluate import EvaluateConfig
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.sharding import MeshConfig


def get_config() -> ml_collections.ConfigDict:
    """One stage."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.stage = "evaluate"
    config.model = section(ModelSource, path="Qwen/Qwen2.5-7B-Instruct")
    config.template = "rlt"
    config.data = {
        "task": "math500",
        "path": "data/math500/test.jsonl",
        "limit": config_dict.placeholder(int),
    }
    config.predictions = ""
    config.sampling = section(SamplingConfig, max_new_tokens=16384, temperature=0.7)
    config.engine = section(EngineConfig, slots=64)
    config.evaluate = section(EvaluateConfig, batch_size=128, samples_per_problem=4)
    config.mesh = section(MeshConfig)
    return config
