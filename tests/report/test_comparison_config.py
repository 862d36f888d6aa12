"""What a comparison's config may say, before any file is read."""

from typing import Any

import pytest

from rlt_jax.errors import UserError
from rlt_jax.report.comparison_config import CompareConfig, parts_of


def _routes(**changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "evaluation": f"{name}_eval_{{seed}}",
            "stages": ["pretrain", f"{name}_rl_{{seed}}"],
            "traces": f"{name}_score_{{seed}}",
        }
        | changes
        for name in ("rlt", "warmup", "copy")
    ]


def _config(**changes: Any) -> CompareConfig:
    claim = {"title": "RLT helps", "published": "It did."}
    values = {
        "seeds": (10, 11, 12),
        "routes": _routes(),
        "claims": [claim | {"better": "rlt", "worse": "warmup"}],
        "correlation": ("rlt", "warmup", "copy"),
    }
    return CompareConfig(**values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "one or more"),
        ({"seeds": (1, 1)}, "each once"),
        ({"routes": _routes(name="rlt")}, r"routes\[1\]: the name 'rlt' is taken"),
        ({"routes": _routes(seeds=(7,))}, r"routes\[0\].seeds: 7 is not in"),
        ({"routes": _routes(colour="red")}, r"routes\[0\]: unknown key 'colour'"),
        ({"routes": {"rlt": {}}}, r"routes\[0\] is 'rlt'; give it as keys"),
        ({"routes": _routes(traces="")}, "the route 'rlt' has no traces"),
        ({"correlation": ("rlt", "copy")}, "three or more"),
        ({"correlation": ("sft",)}, "no route 'sft'; there are rlt, warmup"),
        ({"correlation_without": ("sft",)}, "without: 'sft' is not in"),
        ({"correlation_without": ("rlt",)}, "three or more have to be left"),
        ({"claims": [{"title": "x"}]}, r"claims\[0\]: the key 'published' is missing"),
        ({"measures": [{"label": "x"}]}, r"measures\[0\]: the key 'folder'"),
        (
            {"routes": _routes(evaluation="rlt_eval_10")},
            r"routes\[0\].evaluation='rlt_eval_10': seeds 10, 11, 12 would all be read",
        ),
        ({"routes": _routes(traces="s")}, r"routes\[0\].traces='s': seeds 10, 11, 12"),
        (
            {"measures": [{"label": "x", "folder": "rl", "key": "seconds"}]},
            r"measures\[0\].folder='rl': seeds .*; write {seed} where",
        ),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _config(**changes)


def test_a_folder_of_one_seed_needs_no_name_for_it() -> None:
    routes = _routes()
    routes[2] |= {"seeds": (11,), "evaluation": "copy_eval_11", "traces": "scored"}
    assert parts_of(_config(routes=routes)).routes["copy"].seeds == (11,)
    alone = _config(seeds=(10,), routes=_routes(stages=("pretrain",), traces="scored"))
    assert parts_of(alone).routes["rlt"].seeds == (10,)


def test_claims_need_a_shared_seed() -> None:
    routes = _routes()
    routes[0]["seeds"], routes[1]["seeds"] = (10,), (11,)
    with pytest.raises(UserError, match="its two routes share no seed"):
        _config(routes=routes)
