"""Sizes that are accepted, and those that are refused."""

import numpy as np
import pytest
from jax.sharding import Mesh

from rlt_jax.errors import UserError
from rlt_jax.inference.engine import make_engine
from rlt_jax.inference.layout import (
    EngineConfig,
    check_memory,
    check_requests,
    make_layout,
)
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.transformer import Transformer
from rlt_jax.types import Request

T, MAX_LENGTH = 24, 64
SIZES = EngineConfig(slots=16, page_size=8, steps=4, prefill_chunk=16)
SAMPLED = SamplingConfig(T, stop_ids=(5, 6, 7))
PROMPT = np.arange(40, dtype=np.int32)


def test_sizes_follow_from_the_settings(model: Transformer, mesh: Mesh) -> None:
    layout = make_layout(model, SAMPLED, SIZES, mesh, 60)
    assert layout.columns == 8  # 60 tokens, 8 a page
    # Each slot has the pages of a row and one for the end of a prompt; page 0.
    assert layout.pages == 1 + 16 * 9
    assert layout.seen_size == 0
    penalty = SamplingConfig(T, repetition_penalty=1.1)
    sizes = EngineConfig(slots=20, page_size=8, cache_tokens=100)
    layout = make_layout(model, penalty, sizes, mesh, 60)
    assert (layout.slots, layout.pages, layout.seen_size) == (32, 13, 40)


def test_prompts_are_computed_in_few_sizes() -> None:
    sizes = [EngineConfig(page_size=8, prefill_chunk=n) for n in (8, 32, 56)]
    found = [config.prefill_sizes for config in sizes]
    assert found == [(8,), (8, 16, 32), (8, 16, 32, 56)]


def test_a_cache_too_small_for_a_request_names_the_size_that_is_not(
    model: Transformer, mesh: Mesh
) -> None:
    def check(cache_tokens: int) -> None:
        sizes = EngineConfig(page_size=8, cache_tokens=cache_tokens)
        layout = make_layout(model, SAMPLED, sizes, mesh, MAX_LENGTH)
        check_requests(layout, [Request(PROMPT, 0, T)])

    with pytest.raises(UserError, match="holds 64. Raise engine.cache_tokens to 72"):
        check(64)
    check(72)


def test_a_cache_too_large_for_the_memory_is_refused(
    model: Transformer, mesh: Mesh
) -> None:
    def make(cache_tokens: int) -> None:
        sizes = EngineConfig(cache_tokens=cache_tokens)
        engine = make_engine(model, None, SAMPLED, sizes, mesh, MAX_LENGTH)
        check_memory(model, engine.layout, mesh)

    message = r"needs .* GB a device, .* GB are free: at most engine.cache_tokens=\d+"
    with pytest.raises(UserError, match=message) as refused:
        make(10**13)
    fits = int(str(refused.value).split("cache_tokens=")[1].split()[0])
    assert 0 < fits < 10**13
    make(fits // 2)  # memory comes and goes


def test_other_sizes_that_cannot_be_are_refused(model: Transformer, mesh: Mesh) -> None:
    with pytest.raises(UserError, match="may have 513 tokens, the model's context is"):
        make_engine(model, None, SAMPLED, SIZES, mesh, model.config.max_length + 1)
    with pytest.raises(UserError, match="EngineConfig.slots=0: at least 1"):
        EngineConfig(slots=0)
    with pytest.raises(UserError, match="prefill_chunk=100 is no multiple of page_si"):
        EngineConfig(prefill_chunk=100)
    with pytest.raises(UserError, match="weights='int3': one of model, bfloat16, int8"):
        EngineConfig(weights="int3")
