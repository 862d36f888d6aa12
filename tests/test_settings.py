"""Values of a config that follow from others."""

import ml_collections
import pytest

from rlt_jax.settings import link, resolve


@pytest.fixture
def config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict({"rows": 2, "part": {"size": 1, "name": "x"}})
    config.part.pair = ml_collections.config_dict.placeholder(object)
    config.part.pair = (1, 2)
    link(
        config.part,
        size=lambda: 10 * config.rows,
        pair=lambda: (config.part.size, config.rows),
    )
    return config


def test_values_follow_from_others_once_they_are_resolved(
    config: ml_collections.ConfigDict,
) -> None:
    assert config.part.to_dict() == {"size": 1, "name": "x", "pair": (1, 2)}
    config.rows = 3  # as the command line does, on a locked config
    resolve(config)
    assert config.part.to_dict() == {"size": 30, "name": "x", "pair": (30, 3)}
    config.rows = 4
    assert config.part.size == 40


def test_a_value_that_is_set_is_kept(config: ml_collections.ConfigDict) -> None:
    config.lock()
    config.part.size = 7
    resolve(config)
    assert config.part.size == 7
    assert config.part.pair == (7, 2)
    with pytest.raises(TypeError):
        config.part.size = "many"


def test_nothing_is_computed_before(config: ml_collections.ConfigDict) -> None:
    def fail() -> int:
        raise AssertionError("computed")

    link(config.part, size=fail)
    config.lock()
    assert config.part.size == 1
    config.part.size = 5
    resolve(config)
    assert config.part.size == 5
