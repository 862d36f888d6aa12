"""Continuous batching against full forward passes, and against itself."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from rlt_jax.data.stop_texts import stop_finder
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.inference.engine import Engine, Occupancy, complete, make_engine
from rlt_jax.inference.layout import (
    EngineConfig,
    Request,
)
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.transformer import Transformer
from rlt_jax.types import Completion, Params

V, T, LONGEST_ROW = 40, 24, 64
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

Run = Callable[..., list[Completion]]
NaiveLogProbs = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def engine_of(model: Transformer, mesh: Mesh) -> Callable:
    @functools.cache
    def make(
        sampling: SamplingConfig, sizes: EngineConfig, stops: tuple[int, ...]
    ) -> Engine:
        return make_engine(model, sampling, stops, sizes, mesh, LONGEST_ROW)

    def engine(
        sampling: SamplingConfig = SAMPLED,
        sizes: EngineConfig = SIZES,
        stops: tuple[int, ...] = STOPS,
    ) -> Engine:
        return make(sampling, sizes, stops)

    return engine


@pytest.fixture(scope="session")
def run(engine_of: Callable, params: Params) -> Run:
    """Completions in the order of the requests."""

    def completions(
        requests: Sequence[Request] = REQUESTS, key: jax.Array = KEY, **engine: object
    ) -> list[Completion]:
        done = dict(complete(engine_of(**engine), params, requests, key))
        return [done[n] for n in range(len(requests))]

    return completions


@pytest.fixture(scope="session")
def sampled(run: Run) -> list[Completion]:
    return run()


def rows_of(completions: Sequence[Completion]) -> np.ndarray:
    """Prompts with their completions, padded on the right to one length."""
    rows = [
        np.append(request.prompt, completion.tokens)
        for request, completion in zip(REQUESTS, completions, strict=True)
    ]
    return np.stack([np.pad(row, (0, LONGEST_ROW - len(row))) for row in rows])


def assert_same_bits(
    ours: Sequence[Completion], expected: Sequence[Completion]
) -> None:
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.log_probs, b.log_probs)
        assert a.finished == b.finished


def assert_log_probs(
    completions: Sequence[Completion], expected: np.ndarray, atol: float = 1e-4
) -> None:
    for n, (request, completion) in enumerate(zip(REQUESTS, completions, strict=True)):
        start = len(request.prompt)
        theirs = expected[n, start : start + len(completion.tokens)]
        np.testing.assert_allclose(completion.log_probs, theirs, atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_full_forward_pass(
    model: Transformer,
    params: Params,
    run: Run,
    naive_log_probs: NaiveLogProbs,
    temperature: float,
) -> None:
    completions = run(sampling=SamplingConfig(T, temperature))
    rows = rows_of(completions)
    assert_log_probs(completions, naive_log_probs(model, params, rows, temperature))


def test_greedy_takes_the_likeliest_token(
    model: Transformer,
    params: Params,
    run: Run,
    full_logits: Callable[..., np.ndarray],
    naive_log_probs: NaiveLogProbs,
) -> None:
    completions = run(sampling=SamplingConfig(T, temperature=0.0))
    rows = rows_of(completions)
    likeliest = full_logits(model, params, rows).argmax(-1)
    for n, completion in enumerate(completions):
        start = len(REQUESTS[n].prompt) - 1
        theirs = likeliest[n, start : start + len(completion.tokens)]
        np.testing.assert_array_equal(completion.tokens, theirs)
    assert_log_probs(completions, naive_log_probs(model, params, rows, 1.0))
    # Another size of the pages is another order of sums, but not other tokens.
    pages = EngineConfig(slots=16, page_size=16, steps=4, prefill_chunk=32)
    others = run(sampling=SamplingConfig(T, temperature=0.0), sizes=pages)
    for a, b in zip(others, completions, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)


def test_a_completion_ends_with_its_first_stop_token_or_its_longest(
    sampled: list[Completion],
) -> None:
    ended = {int(c.tokens[-1]) for c in sampled if c.finished}
    assert ended == set(STOPS), "a poor example"
    assert not all(c.finished for c in sampled), "a poor example"
    for request, completion in zip(REQUESTS, sampled, strict=True):
        assert not np.isin(completion.tokens[:-1], STOPS).any()
        assert completion.finished == (completion.tokens[-1] in STOPS)
        assert completion.finished or len(completion.tokens) == request.longest
        assert 1 <= len(completion.tokens) <= request.longest
        assert len(completion.log_probs) == len(completion.tokens)


def test_without_stop_tokens_only_the_longest_ends(run: Run) -> None:
    requests = [Request(PROMPTS[0], n, 1 + n) for n in range(5)]
    completions = run(requests, stops=())
    assert [len(c.tokens) for c in completions] == [1, 2, 3, 4, 5]
    assert not any(c.finished for c in completions)


def test_a_stop_token_at_the_longest_finishes(
    run: Run, sampled: list[Completion]
) -> None:
    n = next(n for n, c in enumerate(sampled) if c.finished and len(c.tokens) > 1)
    length = len(sampled[n].tokens)
    for longest, finished in ((length, True), (length - 1, False)):
        (completion,) = run([REQUESTS[n]._replace(longest=longest)])
        assert completion.finished is finished
        np.testing.assert_array_equal(completion.tokens, sampled[n].tokens[:longest])


@pytest.mark.parametrize(
    "sizes",
    [
        EngineConfig(slots=4, page_size=8, steps=7, prefill_chunk=16),
        EngineConfig(slots=64, page_size=8, steps=1, prefill_chunk=16),
    ],
)
def test_slots_and_steps_change_no_bit(
    run: Run, sampled: list[Completion], sizes: EngineConfig
) -> None:
    assert_same_bits(run(sizes=sizes), sampled)


def test_order_and_company_change_no_bit(run: Run, sampled: list[Completion]) -> None:
    order = np.random.default_rng(0).permutation(len(REQUESTS))
    assert_same_bits(run([REQUESTS[n] for n in order]), [sampled[n] for n in order])
    for n in (1, 4, 23):  # alone
        assert_same_bits(run([REQUESTS[n]]), [sampled[n]])
    others = [Request(PROMPTS[n % 5][::-1].copy(), 100 + n, 20) for n in range(20)]
    mixed = run([*others[:9], *REQUESTS[3:6], *others[9:]])
    assert_same_bits(mixed[9:12], sampled[3:6])


def test_requests_that_are_put_off_change_no_bit(
    engine_of: Callable, params: Params, sampled: list[Completion]
) -> None:
    engine = engine_of(
        sizes=EngineConfig(
            slots=16, page_size=8, cache_tokens=128, steps=4, prefill_chunk=16
        )
    )
    assert engine.layout.pages == 17
    counting, parts = counted(engine)
    done = dict(complete(counting, params, REQUESTS, KEY))
    assert_same_bits([done[n] for n in range(len(REQUESTS))], sampled)
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

    return engine._replace(prefill=prefill), parts


def test_the_key_and_the_request_id_decide(run: Run, sampled: list[Completion]) -> None:
    assert_same_bits(run(), sampled)
    other = run(key=jax.random.key(1))
    same = sum(
        np.array_equal(a.tokens, b.tokens) for a, b in zip(other, sampled, strict=True)
    )
    assert same < 4
    ids = [Request(PROMPTS[1], n, T) for n in (8, 9, 9, 10)]
    first, second, third, fourth = run(ids)
    assert_same_bits([second], [third])
    assert not np.array_equal(first.tokens, second.tokens)
    assert not np.array_equal(second.tokens, fourth.tokens)


def test_equal_prompts_are_prefilled_once(engine_of: Callable, params: Params) -> None:
    engine, parts = counted(engine_of())
    requests = [Request(PROMPTS[1], n, T) for n in range(16)]
    list(complete(engine, params, requests, KEY))
    # 32 tokens of 33, 16 at a time; the last is fed by the first step.
    assert parts == [((1, 16), [0]), ((1, 16), [16])]


def test_the_penalty_changes_the_draw_and_not_the_log_probs(
    model: Transformer,
    params: Params,
    run: Run,
    full_logits: Callable[..., np.ndarray],
    naive_log_probs: NaiveLogProbs,
) -> None:
    greedy = run(sampling=SamplingConfig(T, temperature=0.0, repetition_penalty=1.5))
    rows = rows_of(greedy)
    assert_log_probs(greedy, naive_log_probs(model, params, rows, 1.0))
    scores = full_logits(model, params, rows)
    plain = 0
    for n, completion in enumerate(greedy):
        start = len(REQUESTS[n].prompt)
        for t in range(start, start + len(completion.tokens)):
            row, seen = scores[n, t - 1].copy(), np.unique(rows[n, :t])
            plain += row.argmax() == rows[n, t]
            row[seen] = np.where(row[seen] > 0, row[seen] / 1.5, row[seen] * 1.5)
            assert row.argmax() == rows[n, t]
    assert plain < sum(len(c.tokens) for c in greedy), "a poor example"


def test_stop_texts_end_completions(
    text_model: Transformer, teacher_params: Params, mesh: Mesh, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("1+2").ids
    requests = [Request(prompt, n, 30) for n in range(6)]

    engine = make_engine(text_model, SamplingConfig(30), (), SIZES, mesh, LONGEST_ROW)

    def made(stop: tuple[str, ...]) -> list[Completion]:
        stopping = engine._replace(find_stop=stop_finder(tokenizer, stop))
        done = dict(complete(stopping, teacher_params, requests, KEY))
        return [done[n] for n in range(6)]

    free = made(())
    texts = [tokenizer.decode(c.tokens) for c in free]
    stop = (texts[0][7:10], texts[1][2:4])
    assert all("\ufffd" not in text for text in stop), "a poor example"
    for ours, whole in zip(made(stop), free, strict=True):
        text, count = tokenizer.decode(ours.tokens), len(ours.tokens)
        np.testing.assert_array_equal(ours.tokens, whole.tokens[:count])
        np.testing.assert_array_equal(ours.log_probs, whole.log_probs[:count])
        assert ours.finished == any(part in text for part in stop)
        before = tokenizer.decode(ours.tokens[:-1])
        assert not any(part in before for part in stop)
        assert ours.finished or count == 30


def test_nothing_compiles_after_the_first_call(
    engine_of: Callable, params: Params
) -> None:
    engine = engine_of()
    list(complete(engine, params, REQUESTS, KEY))
    compiled: list[str] = []

    def note(event: str, _: float, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for seed in range(4):
            rng = np.random.default_rng(seed)
            requests = [
                Request(rng.integers(8, V, length, np.int32), n, int(longest))
                for n, (length, longest) in enumerate(rng.integers(1, 32, (19, 2)))
            ]
            done = list(complete(engine, params, requests, jax.random.key(seed)))
            assert len(done) == 19
        own = list(compiled)
        jax.jit(lambda x: x * 3 + 1)(np.arange(seed + 5))
        assert len(compiled) > len(own), "compilations are not counted"
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not own
    assert engine.decode._cache_size() == 1
    assert engine.prefill._cache_size() == len(engine.chunks) == 2


def test_occupancy_counts_slot_steps(engine_of: Callable, params: Params) -> None:
    engine, occupancy = engine_of(stops=()), Occupancy()
    requests = [Request(PROMPTS[0], n, 5) for n in range(16)]
    list(complete(engine, params, requests, KEY, occupancy))
    assert (occupancy.used, occupancy.run) == (16 * 5, 16 * 5)
    # One row alone keeps all slots busy with nothing.
    list(complete(engine, params, requests[:1], KEY, occupancy))
    assert (occupancy.used, occupancy.run) == (17 * 5, 32 * 5)


def test_bfloat16_weights_are_those_of_rounded_parameters(
    run: Run, engine_of: Callable, params: Params
) -> None:
    sizes = EngineConfig(
        slots=16, page_size=8, steps=4, prefill_chunk=16, weights="bfloat16"
    )
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype(x.dtype), params)
    done = dict(complete(engine_of(), rounded, REQUESTS, KEY))
    for n, completion in enumerate(run(sizes=sizes)):
        np.testing.assert_array_equal(completion.tokens, done[n].tokens)
        np.testing.assert_allclose(completion.log_probs, done[n].log_probs, atol=1e-5)


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
