"""The RLT reward of explanations in a file, without any training.

    python -m rlt_jax.main --config=configs/score.py --workdir=runs/score \\
        --config.data.path=rows.jsonl --config.teacher.path=TEACHER \\
        --config.student.path=STUDENT --config.template=FILE.json

Rows are `{"question": ..., "solution": ..., "completions": [text, ...]}`. Writes
runs/score/score/scores.jsonl, a row for each completion in order. For several students
set `student` to a tuple of sections here.

Hardware: any; two forward passes a completion.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """One stage."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.stage = "score"
    config.teacher = {"path": "embedded"}
    config.student = {"path": "embedded"}
    config.students = {"combine": "mean"}
    config.template = "rlt"
    config.data = {"path": "rows.jsonl"}
    config.reward = {
        "explanation_kl_coef": ml_collections.config_dict.placeholder(object)
    }
    config.reward = {}
    config.select = {"max_tokens": 0, "best_per_question": 0, "top_fraction": 1.0}
    config.teacher_temperature = 0.7
    config.batch_size = 32
    config.assume_closed = False
    config.per_token = False
    config.controls = False
    config.num_examples = 10
    config.mesh = {}
    return config
