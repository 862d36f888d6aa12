"""What a stage reads of others, told from its settings."""

from rlt_jax.stages.preflight import origin_of, stages_read, with_origins

STAGES = {
    "warmup": {"stage": "sft", "model": {"path": "base"}},
    "rl": {"stage": "rl", "policy": {"path": "/runs/warmup"}},
    "traces": {"stage": "collect", "teacher": {"path": "/runs/rl"}},
}


def test_stages_that_paths_anywhere_name() -> None:
    settings = {
        "model": {"path": "/runs/rl/best", "tokenizer": "", "kwargs": None},
        "name": 'so-called "quotes"',
        "data": [{"path": "/runs/traces/traces.jsonl", "weight": 1.0}],
        "held_out": {"path": "/elsewhere/warmup"},
    }
    read = stages_read(settings, "/runs")
    assert {"rl", "traces"} <= {*read}
    assert "warmup" not in read
    # Empty texts stand before paths in every section of a model.
    assert "rl" in stages_read({"empty": "", "path": "/runs/rl"}, "/runs")


def test_models_are_those_that_stages_start_from_and_data_stay() -> None:
    assert origin_of({"path": "/runs/rl"}, STAGES, "/runs") == {"path": "base"}
    data = {"path": "/runs/traces/traces.jsonl"}
    settings = {
        "policy": {"path": "base"},
        "students": [{"path": "/runs/rl"}, {"path": "other"}],
        "teaching": {"teacher": {"path": "/runs/warmup"}, "traces": ""},
        "data": data,
    }
    assert with_origins(settings, STAGES, "/runs") == settings | {
        "students": [{"path": "base"}, {"path": "other"}],
        "teaching": {"teacher": {"path": "base"}, "traces": ""},
    }
    assert with_origins({"teaching": None}, STAGES, "/runs") == {"teaching": None}
