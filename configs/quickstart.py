"""The whole method at small scale, on the embedded task.

    python -m rlt_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Teacher warm-up, RL of the teacher with the RLT reward, collection of explanations before
and after RL, distillation of a student from each, evaluation, and a report.

Hardware: 2 CPU cores.
"""

import ml_collections

TEMPLATE = "tiny"
BASE = {"path": "embedded"}
ROWS = {"micro_batch_size": 16, "row_length": 160}
SAMPLING = {"max_new_tokens": 56, "temperature": 0.7}
KINDS = {"careful": 0.2, "skipping": 0.4, "restating": 0.37, "wrong": 0.03}


def get_config() -> ml_collections.ConfigDict:
    """The pipeline."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.pipeline = (
        "warmup",
        "rl",
        "collect_warmup",
        "collect_rlt",
        "distil_warmup",
        "distil_rlt",
        "eval_base",
        "eval_student_warmup",
        "eval_student_rlt",
        "report",
    )
    config.warmup = {
        "stage": "sft",
        "model": BASE,
        "template": TEMPLATE,
        "data": {
            "task": "arithmetic",
            "split": "train",
            "size": 8000,
            "stream": 1,
            "kinds": KINDS,
            "known_answer": True,
        },
        "sft": {
            "format": "teacher",
            "steps": 350,
            "batch_size": 24,
            "row_length": 160,
        },
        "optimizer": {
            "learning_rate": 2e-3,
            "schedule": "cosine",
            "warmup_fraction": 0.05,
        },
        "mesh": {},
    }
    config.rl = {
        "stage": "rl",
        "teacher": {"path": "{workdir}/warmup"},
        "student": BASE,
        "template": TEMPLATE,
        "data": {"task": "arithmetic", "split": "train", "size": 4000, "stream": 2},
        "held_out": {"task": "arithmetic", "split": "test", "size": 128, "stream": 3},
        "rows": ROWS,
        "sampling": SAMPLING,
        "reward": {},
        "grpo": {"steps": 40, "batch_size": 16, "group_size": 8},
        "optimizer": {"learning_rate": 3e-4},
        "mesh": {},
    }
    for name, teacher in (("collect_warmup", "warmup"), ("collect_rlt", "rl")):
        config[name] = {
            "stage": "collect",
            "teacher": {"path": f"{{workdir}}/{teacher}"},
            "student": BASE,
            "template": TEMPLATE,
            "data": {"task": "arithmetic", "split": "train", "size": 1024, "stream": 4},
            "rows": ROWS,
            "sampling": SAMPLING,
            "reward": {},
            "collect": {"batch_size": 128},
            "mesh": {},
        }
    for name, traces in (
        ("distil_warmup", "collect_warmup"),
        ("distil_rlt", "collect_rlt"),
    ):
        config[name] = {
            "stage": "sft",
            "model": BASE,
            "template": TEMPLATE,
            "data": {"task": "file", "path": f"{{workdir}}/{traces}/traces.jsonl"},
            "sft": {
                "format": "student",
                "steps": 60,
                "batch_size": 24,
                "row_length": 160,
            },
            "optimizer": {
                "learning_rate": 5e-4,
                "schedule": "cosine",
                "warmup_fraction": 0.05,
            },
            "mesh": {},
        }
    for name, model in (
        ("eval_base", BASE),
        ("eval_student_warmup", {"path": "{workdir}/distil_warmup"}),
        ("eval_student_rlt", {"path": "{workdir}/distil_rlt"}),
    ):
        config[name] = {
            "stage": "evaluate",
            "model": model,
            "template": TEMPLATE,
            "data": {"task": "arithmetic", "split": "test", "size": 256, "stream": 5},
            "sampling": SAMPLING,
            "evaluate": {"batch_size": 128, "samples_per_problem": 4},
            "mesh": {},
        }
    config.report = {
        "stage": "report",
        "rl": "rl",
        "traces": (("warmup", "collect_warmup"), ("rlt", "collect_rlt")),
        "evaluations": (
            ("base", "eval_base"),
            ("student_warmup_traces", "eval_student_warmup"),
            ("student_rlt_traces", "eval_student_rlt"),
        ),
    }
    return config
