"""The RLT reward of explanations in a file, without any training.

    python -m rlt_jax.main --config=configs/score.py --workdir=runs/score \\
        --config.data.path=explanations.jsonl --config.teacher.path=TEACHER \\
        '--config.students[0].path=STUDENT' --config.template=FILE.json

Records are `{"question": ..., "solution": ..., "completions": [text, ...]}`. Writes
runs/score/score/scores.jsonl, a record for each completion in order. For several students
give `students` several models here.

Hardware: any; two forward passes a completion.
"""

import ml_collections

from rlt_jax.data.selection import SelectionConfig
from rlt_jax.data.traces import CompletionsConfig
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig
from rlt_jax.settings import section
from rlt_jax.training.checkpoint import ModelSource
from rlt_jax.training.sharding import MeshConfig


def get_config() -> ml_collections.ConfigDict:
    """One stage."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.stage = "score"
    config.teacher = section(ModelSource, path="embedded")
    config.students = (section(ModelSource, path="embedded"),)
    config.ensemble = section(EnsembleConfig)
    config.template = "rlt"
    config.data = section(CompletionsConfig, path="explanations.jsonl")
    config.rlt_reward = section(RLTRewardConfig)
    config.select = section(SelectionConfig)
    config.teacher_temperature = 0.7
    config.batch_size = 32
    config.assume_closed = False
    config.per_token = False
    config.controls = False
    config.num_examples = 10
    config.mesh = section(MeshConfig)
    return config
