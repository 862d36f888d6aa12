"""Continuous batching against full forward passes, and against itself."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from rlt_jax.data import examples
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import Engine, make_engine
from rlt_jax.inference.layout import EngineConfig
from rlt_jax.inference.sampler import take
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.transformer import Transformer
from rlt_jax.types import Params, Request, Rollout

V, T, MAX_LENGTH = 40, 24, 64
STOPS = (5, 6, 7)
KEY = jax.random.key(0)
SIZES = EngineConfig(slots=16, page_size=8, steps=4, prefill_chunk=16)
SAMPLED = SamplingConfig(T)
LENGTHS = (3, 33, 7, 1, 17, 8, 9, 40)
PROMPTS = [
    np.random.default_rng(n).integers(8, V, length, np.int32)
    for n, length in enumerate(LENGTHS)
]
# Groups of three with completions of several lengths.
REQUESTS = [Request(PROMPTS[n // 3], n, T - n % 5) for n in range(3 * len(PROMPTS))]

Run = Callable[..., Rollout]
NaiveLogProbs = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def engine_of(model: Transformer, mesh: Mesh) -> Callable:
    @functools.cache
    def make(sampling: SamplingConfig, sizes: EngineConfig) -> Engine:
        return make_engine(model, None, sampling, sizes, mesh, MAX_LENGTH)

    def engine(
        sampling: SamplingConfig = SAMPLED,
        sizes: EngineConfig = SIZES,
        stops: tuple[int, ...] = STOPS,
    ) -> Engine:
        return make(dataclasses.replace(sampling, stop_ids=stops), sizes)

    return engine


@pytest.fixture(scope="session")
def run(engine_of: Callable, params: Params) -> Run:
    def rollout(
        requests: Sequence[Request] = REQUESTS, key: jax.Array = KEY, **engine: object
    ) -> Rollout:
        return engine_of(**engine).generate(params, requests, key)

    return rollout


@pytest.fixture(scope="session")
def sampled(run: Run) -> Rollout:
    return run()


def sequences_of(rollout: Rollout) -> np.ndarray:
    """Prompts with their completions, padded on the right to one length."""
    sequences = [
        np.append(request.prompt, tokens)
        for request, tokens in zip(rollout.requests, rollout.tokens, strict=True)
    ]
    return np.stack([np.pad(one, (0, MAX_LENGTH - len(one))) for one in sequences])


def assert_same_bits(ours: Rollout, expected: Rollout) -> None:
    assert len(ours.tokens) == len(expected.tokens)
    jax.tree.map(np.testing.assert_array_equal, ours.tokens, expected.tokens)
    jax.tree.map(np.testing.assert_array_equal, ours.log_probs, expected.log_probs)
    np.testing.assert_array_equal(ours.finished, expected.finished)


def assert_log_probs(
    rollout: Rollout, expected: np.ndarray, atol: float = 1e-4
) -> None:
    for n, (request, log_probs) in enumerate(
        zip(rollout.requests, rollout.log_probs, strict=True)
    ):
        start = len(request.prompt)
        theirs = expected[n, start : start + len(log_probs)]
        np.testing.assert_allclose(log_probs, theirs, atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_full_forward_pass(
    model: Transformer,
    params: Params,
    run: Run,
    naive_log_probs: NaiveLogProbs,
    temperature: float,
) -> None:
    rollout = run(sampling=SamplingConfig(T, temperature))
    sequences = sequences_of(rollout)
    assert_log_probs(rollout, naive_log_probs(model, params, sequences, temperature))


def test_greedy_takes_the_likeliest_token(
    model: Transformer,
    params: Params,
    run: Run,
    full_logits: Callable[..., np.ndarray],
    naive_log_probs: NaiveLogProbs,
) -> None:
    rollout = run(sampling=SamplingConfig(T, temperature=0.0))
    sequences = sequences_of(rollout)
    likeliest = full_logits(model, params, sequences).argmax(-1)
    for n, tokens in enumerate(rollout.tokens):
        start = len(REQUESTS[n].prompt) - 1
        theirs = likeliest[n, start : start + len(tokens)]
        np.testing.assert_array_equal(tokens, theirs)
    assert_log_probs(rollout, naive_log_probs(model, params, sequences, 1.0))
    # Another size of the pages is another order of sums, but not other tokens.
    pages = EngineConfig(slots=16, page_size=16, steps=4, prefill_chunk=32)
    others = run(sampling=SamplingConfig(T, temperature=0.0), sizes=pages)
    for a, b in zip(others.tokens, rollout.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(others.log_probs, rollout.log_probs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_completion_ends_with_its_first_stop_token_or_at_its_maximum(
    sampled: Rollout,
) -> None:
    ends = [int(tokens[-1]) for tokens in sampled.tokens]
    stopped = {end for end, finished in zip(ends, sampled.finished) if finished}
    assert stopped == set(STOPS), "a poor example"
    assert not sampled.finished.all(), "a poor example"
    for n, (request, tokens) in enumerate(zip(REQUESTS, sampled.tokens, strict=True)):
        assert not np.isin(tokens[:-1], STOPS).any()
        assert sampled.finished[n] == (tokens[-1] in STOPS)
        assert sampled.finished[n] or len(tokens) == request.max_new_tokens
        assert 1 <= len(tokens) <= request.max_new_tokens
        assert len(sampled.log_probs[n]) == len(tokens)
    assert sampled.requests == REQUESTS


def test_without_stop_tokens_completions_end_at_their_maximum(run: Run) -> None:
    requests = [Request(PROMPTS[0], n, 1 + n) for n in range(5)]
    rollout = run(requests, stops=())
    assert [len(tokens) for tokens in rollout.tokens] == [1, 2, 3, 4, 5]
    assert not rollout.finished.any()


def test_a_stop_token_at_the_maximum_finishes(run: Run, sampled: Rollout) -> None:
    lengths = [len(tokens) for tokens in sampled.tokens]
    n = next(n for n, c in enumerate(sampled.finished) if c and lengths[n] > 1)
    for maximum, finished in ((lengths[n], True), (lengths[n] - 1, False)):
        rollout = run([REQUESTS[n]._replace(max_new_tokens=maximum)])
        assert rollout.finished.tolist() == [finished]
        expected = sampled.tokens[n][:maximum]
        np.testing.assert_array_equal(rollout.tokens[0], expected)


@pytest.mark.parametrize(
    "sizes",
    [
        EngineConfig(slots=4, page_size=8, steps=7, prefill_chunk=16),
        EngineConfig(slots=64, page_size=8, steps=1, prefill_chunk=16),
    ],
)
def test_slots_and_steps_change_no_bit(
    run: Run, sampled: Rollout, sizes: EngineConfig
) -> None:
    assert_same_bits(run(sizes=sizes), sampled)


def test_order_and_neighbours_change_no_bit(run: Run, sampled: Rollout) -> None:
    order = np.random.default_rng(0).permutation(len(REQUESTS)).tolist()
    assert_same_bits(run([REQUESTS[n] for n in order]), take(sampled, order))
    for n in (1, 4, 23):  # alone
        assert_same_bits(run([REQUESTS[n]]), take(sampled, [n]))
    others = [Request(PROMPTS[n % 5][::-1].copy(), 100 + n, 20) for n in range(20)]
    mixed = run([*others[:9], *REQUESTS[3:6], *others[9:]])
    assert_same_bits(take(mixed, range(9, 12)), take(sampled, range(3, 6)))


def test_parts_of_a_stream_are_what_generate_returns(
    engine_of: Callable, params: Params, sampled: Rollout
) -> None:
    parts = list(engine_of().stream(params, REQUESTS, KEY))
    order = [n for indices, _ in parts for n in indices]
    assert sorted(order) == list(range(len(REQUESTS)))
    assert sum(bool(indices) for indices, _ in parts) > 1, "a poor example"
    for indices, part in parts:
        assert_same_bits(part, take(sampled, indices))


def test_requests_that_are_put_off_change_no_bit(
    engine_of: Callable, params: Params, sampled: Rollout
) -> None:
    engine = engine_of(
        sizes=EngineConfig(
            slots=16, page_size=8, cache_tokens=128, steps=4, prefill_chunk=16
        )
    )
    assert engine.layout.pages == 17
    counting, parts = counted(engine)
    assert_same_bits(counting.generate(params, REQUESTS, KEY), sampled)
    # Seven prompts have something to compute, and some of them more than once.
    assert sum(start[0] == 0 for _, start in parts) > 7


def counted(engine: Engine) -> tuple[Engine, list[tuple[tuple[int, ...], list[int]]]]:
    """The engine, and a list that will have the shape and start of every prefill."""
    parts: list[tuple[tuple[int, ...], list[int]]] = []

    def prefill(
        params: Params,
        cache: object,
        table: np.ndarray,
        tokens: np.ndarray,
        start: np.ndarray,
    ) -> object:
        parts.append((tokens.shape, start.tolist()))
        return engine.prefill(params, cache, table, tokens, start)

    return dataclasses.replace(engine, prefill=prefill), parts


def test_the_key_and_the_request_id_decide(run: Run, sampled: Rollout) -> None:
    assert_same_bits(run(), sampled)
    other = run(key=jax.random.key(1))
    same = map(np.array_equal, other.tokens, sampled.tokens)
    assert sum(same) < 4
    ids = [Request(PROMPTS[1], n, T) for n in (8, 9, 9, 10)]
    rollout = run(ids)
    assert_same_bits(take(rollout, [1]), take(rollout, [2]))
    first, second, _, fourth = rollout.tokens
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, fourth)


def test_equal_prompts_are_prefilled_once(engine_of: Callable, params: Params) -> None:
    engine, parts = counted(engine_of())
    requests = [Request(PROMPTS[1], n, T) for n in range(16)]
    engine.generate(params, requests, KEY)
    # 32 tokens of 33, 16 at a time; the last is fed by the first step.
    assert parts == [((1, 16), [0]), ((1, 16), [16])]


def test_the_penalty_changes_the_tokens_and_not_the_log_probs(
    model: Transformer,
    params: Params,
    run: Run,
    full_logits: Callable[..., np.ndarray],
    naive_log_probs: NaiveLogProbs,
) -> None:
    greedy = run(sampling=SamplingConfig(T, temperature=0.0, repetition_penalty=1.5))
    sequences = sequences_of(greedy)
    assert_log_probs(greedy, naive_log_probs(model, params, sequences, 1.0))
    scores = full_logits(model, params, sequences)
    plain = 0
    for n, tokens in enumerate(greedy.tokens):
        start = len(REQUESTS[n].prompt)
        for t in range(start, start + len(tokens)):
            row, seen = scores[n, t - 1].copy(), np.unique(sequences[n, :t])
            plain += row.argmax() == sequences[n, t]
            row[seen] = np.where(row[seen] > 0, row[seen] / 1.5, row[seen] * 1.5)
            assert row.argmax() == sequences[n, t]
    assert plain < sum(map(len, greedy.tokens)), "a poor example"


def test_stop_texts_end_completions(
    text_model: Transformer, teacher_params: Params, mesh: Mesh, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("1+2").ids
    requests = [Request(prompt, n, 30) for n in range(6)]

    def generated(stop: tuple[str, ...]) -> Rollout:
        sampling = SamplingConfig(30, stop=stop)
        engine = make_engine(text_model, tokenizer, sampling, SIZES, mesh, MAX_LENGTH)
        return engine.generate(teacher_params, requests, KEY)

    free = generated(())
    stop = (free.texts[0][7:10], free.texts[1][2:4])
    assert all("\ufffd" not in text for text in stop), "a poor example"
    ours = generated(stop)
    for n, tokens in enumerate(ours.tokens):
        text, count = tokenizer.decode(tokens), len(tokens)
        np.testing.assert_array_equal(tokens, free.tokens[n][:count])
        np.testing.assert_array_equal(ours.log_probs[n], free.log_probs[n][:count])
        stopped = tokens[-1] in tokenizer.stop_ids
        assert ours.finished[n] == (stopped or any(part in text for part in stop))
        before = tokenizer.decode(tokens[:-1])
        assert not any(part in before for part in stop)
        assert ours.finished[n] or count == 30
    assert ours.finished.sum() > free.finished.sum(), "a poor example"


def test_completions_are_decoded_without_their_stop_token(
    text_model: Transformer, teacher_params: Params, mesh: Mesh, tokenizer: Tokenizer
) -> None:
    requests = [Request(tokenizer.encode("1+2").ids, n, 12) for n in range(6)]
    sampling = SamplingConfig(12)
    engine = make_engine(text_model, tokenizer, sampling, SIZES, mesh, MAX_LENGTH)
    rollout = engine.generate(teacher_params, requests, KEY)
    for n, tokens in enumerate(rollout.tokens):
        text, offsets = examples.decode_completion(tokenizer, tokens)
        assert rollout.texts[n] == text
        np.testing.assert_array_equal(rollout.offsets[n], offsets)
    without = make_engine(text_model, None, sampling, SIZES, mesh, MAX_LENGTH)
    assert not without.generate(teacher_params, requests, KEY).texts


def test_nothing_compiles_after_the_first_call(
    engine_of: Callable, params: Params
) -> None:
    engine = engine_of()
    engine.generate(params, REQUESTS, KEY)
    compiled: list[str] = []

    def note(event: str, _: float, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for seed in range(4):
            rng = np.random.default_rng(seed)
            requests = [
                Request(rng.integers(8, V, length, np.int32), n, int(maximum))
                for n, (length, maximum) in enumerate(rng.integers(1, 32, (19, 2)))
            ]
            rollout = engine.generate(params, requests, jax.random.key(seed))
            assert len(rollout.tokens) == 19
        own = list(compiled)
        jax.jit(lambda x: x * 3 + 1)(np.arange(seed + 5))
        assert len(compiled) > len(own), "compilations are not counted"
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not own
    assert engine.decode._cache_size() == 1
    assert engine.prefill._cache_size() == len(engine.chunks) == 2


def test_slot_steps_are_counted(run: Run) -> None:
    requests = [Request(PROMPTS[0], n, 5) for n in range(16)]
    rollout = run(requests, stops=())
    assert (rollout.steps_used, rollout.steps_computed) == (16 * 5, 16 * 5)
    # One request alone has all slots computed.
    rollout = run(requests[:1], stops=())
    assert (rollout.steps_used, rollout.steps_computed) == (5, 16 * 5)


def test_bfloat16_weights_are_those_of_rounded_parameters(
    run: Run, engine_of: Callable, params: Params
) -> None:
    sizes = EngineConfig(
        slots=16, page_size=8, steps=4, prefill_chunk=16, weights="bfloat16"
    )
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype(x.dtype), params)
    expected = engine_of().generate(rounded, REQUESTS, KEY)
    ours = run(sizes=sizes)
    jax.tree.map(np.testing.assert_array_equal, ours.tokens, expected.tokens)
    for a, b in zip(ours.log_probs, expected.log_probs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(np.zeros(0, np.int32), 0, 4), "prompt 1 is empty"),
        (Request(PROMPTS[0], 0, 0), "prompt 1: max_new_tokens=0: at least 1"),
        (
            Request(PROMPTS[7], 0, 25),
            "prompt 1 has 40 tokens, with its completion up to 65; the engine was",
        ),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    run: Run, request_: Request, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run([REQUESTS[0], request_])
