"""What one accelerator reaches: attention, decoding, training. Made for a short lease.

    python -m benchmarks.device [--quick] [--json=FILE] [--sections=bcad]

    b   attention over packed rows of three segments and padding: what `attention` picks
        and plain XLA, both against dense attention in float32
    c   the same for one query a row and a layer of the paged cache; then generation in
        bfloat16, 256 tokens in every slot
    a   the ceilings: a large bfloat16 product, a large copy (bytes read and written)
    d   scores of packed rows of 2,048 tokens, and the update of stage `sft`; weights in
        float32, activations in bfloat16

Errors are ||x - reference|| / ||reference|| of the output and the gradients of query,
key and value. Attention takes 4 N H operations for each pair of a query and a key it
sees, 3.5 times as many with the backward pass ("both"). A decode step reads the weights
and all slots' keys and values; its time is a whole run's less that of one token. MFU
counts the products of `costs/flops.py`, three times for an update; HFU also what it
computes again. Lines begin with the seconds since the start, none after --seconds.
--quick is for CPUs, which interpret the kernel of section b.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
import timeit
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlt_jax.costs.flops import forward_flops, train_flops
from rlt_jax.data.rows import RowShape, pack_sequences
from rlt_jax.inference import engine, log_probs, sampling
from rlt_jax.models import attention, attention_kernels, paged_cache
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.published import published_config
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.stages.sft import next_token_loss
from rlt_jax.training import learner, optimizer, sharding, state
from rlt_jax.types import Array, Batch, PagedCache, Request

PARTS = (0.45, 0.3, 0.2)  # of a row, the lengths of its segments; the rest is padding
PAGE, GROUP = 64, 8  # tokens of a page; completions of a prompt
LAYERS = 8  # of a cache in section c; a call reads all, so none of it stays in L2
# V, D, L, N, K, H, F and the longest sequence.
SMOLLM2 = ModelConfig(49_152, 576, 30, 9, 3, 64, 1536, 8192, dtype="bfloat16")
QWEN = published_config("Qwen/Qwen2.5-1.5B", dtype="bfloat16", remat="full")
TINY = ModelConfig(256, 64, 2, 2, 1, 32, 128, 512, dtype="bfloat16", remat="full")

Figures = dict[str, Any]
Measure = Callable[[Any], Figures]  # the figures of a line, by its kind
Programs = dict[str, tuple[Any, tuple]]  # a `jax.jit` function and its arguments

FULL: Figures = {
    "packed": {  # B, T, N, K, H
        "SmolLM2": (4, 2048, 9, 3, 64),
        "0.5B": (4, 2048, 14, 2, 64),
        "7B": (1, 4096, 28, 4, 128),
    },
    "paged": {  # slots, pages of a row, N, K, H, dtype
        "SmolLM2 384": (256, 6, 9, 3, 64, "bfloat16"),
        "1.5B 384": (256, 6, 12, 2, 128, "bfloat16"),
        "1.5B 16k": (16, 256, 12, 2, 128, "bfloat16"),
        "SmolLM2 f32": (64, 6, 9, 3, 64, "float32"),
    },
    "models": {"SmolLM2": (SMOLLM2, 16, 2048), "1.5B": (QWEN, 8, 2048)},  # and B, T
    "slots": (64, 256),
    "tokens": (128, 256),  # of a prompt and of a completion
}
QUICK: Figures = {
    "packed": {"tiny": (2, 128, 4, 2, 32)},
    "paged": {"tiny": (4, 3, 4, 2, 32, "bfloat16")},
    "models": {"tiny": (TINY, 2, 128)},
    "slots": (16,),
    "tokens": (16, 8),
}


def report(sections: list[tuple], file: Path | None, limit: float) -> None:
    """Prints figures as they come; nothing is begun after `limit` seconds."""
    device, start = jax.devices()[0].device_kind, time.perf_counter()
    lines: list[Figures] = [{"jax": jax.__version__, "device": device}]
    print(lines[0], flush=True)

    def begin(call: Callable, *args: Any) -> Any:
        if time.perf_counter() - start > limit:
            raise TimeoutError(f"left out, {limit:.0f} seconds are over")
        return call(*args)

    for letter, cases, kinds in sections:
        with ThreadPoolExecutor(len(cases)) as pool:
            ready = {name: pool.submit(begin, case) for name, case in cases.items()}
        for name, kind in itertools.product(cases, kinds):
            try:
                figures = begin(ready[name].result(), kind)
            except Exception as error:  # noqa: BLE001, must not lose the other lines
                message = traceback.format_exception_only(error)[-1]
                figures = {"failed": " ".join(message.split())[:300]}
            at, title = time.perf_counter() - start, f"{letter} {name} {kind}"
            lines.append({"name": title, "at": at} | figures)
            cells = [x if isinstance(x, str) else f"{x:.4g}" for x in figures.values()]
            pairs = map(" ".join, zip(figures, cells, strict=True))
            print(f"{at:4.0f}  {title:18}", " | ".join(pairs), flush=True)
            if file:
                file.write_text(json.dumps(lines, indent=1), "utf-8")


def seconds_of(call: Callable, *args: Any) -> float:
    """Median seconds of a call, dispatched many times before results are awaited."""

    def run(calls: int) -> None:
        for _ in range(calls):
            results = call(*args)
        jax.block_until_ready(results)

    run(1)
    calls = int(min(max(0.05 / timeit.timeit(lambda: run(1), number=1), 1), 100))
    return statistics.median(timeit.repeat(lambda: run(calls), number=1)) / calls


def compile_all(programs: Programs) -> dict[str, Future]:
    """The compiled programs, made at once."""
    with ThreadPoolExecutor(len(programs)) as pool:
        return {
            name: pool.submit(lambda f, args: f.lower(*args).compile(), *program)
            for name, program in programs.items()
        }


def errors_of(ours: Any, reference: Any) -> str:
    """||ours - reference|| / ||reference|| of each array."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    arrays = ([np.asarray(x, np.float32) for x in pair] for pair in pairs)
    found = (np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in arrays)
    return " ".join(f"{x:.1e}" for x in found)


def compare(programs: Programs, rate: Callable[[str, float], Figures]) -> Measure:
    """Times "picked ..." and "xla ..."; "... both" is compared with "dense both"."""
    made, times = compile_all(programs), {}

    @functools.cache
    def results(path: str) -> Any:
        return made[f"{path} both"].result()(*programs[f"{path} both"][1])

    def measure(path: str) -> Figures:
        found: Figures = {}
        for key in (key for key in programs if key.startswith(path)):
            (jitted, args), kind = programs[key], key.split()[1]
            kernel = "triton" in jitted.lower(*args).as_text()
            times[key] = seconds_of(made[key].result(), *args)
            found["by"] = "triton" if kernel else "no kernel"
            found |= rate(kind, times[key])
            if path == "xla" and f"picked {kind}" in times:
                found[f"{kind} / picked"] = times[key] / times[f"picked {kind}"]
        found["errors"] = errors_of(results(path), results("dense"))
        if path == "xla" and "picked both" in times:
            found["from picked"] = errors_of(results("xla"), results("picked"))
        return found

    return measure


def normal(seed: int, shape: tuple[int, ...], dtype: str = "bfloat16") -> Array:
    """Random numbers on the device."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@functools.cache
def ceiling(kind: str) -> float:
    """Operations a second of a product; bytes a second, read and written, of a copy."""
    scale = 1 if jax.default_backend() == "cpu" else 32
    if kind == "product":
        size = 256 * scale
        x, y = normal(0, (size, size)), normal(1, (size, size))
        return 2 * size**3 / seconds_of(jax.jit(jnp.matmul), x, y)
    x = jax.random.bits(jax.random.key(0), (2**18 * scale**2,), jnp.uint32)
    return 2 * x.nbytes / seconds_of(jax.jit(lambda x: x + 1), x)


def packed_rows(B: int, T: int, vocab_size: int = 2) -> tuple[Batch, np.ndarray]:
    """[1, B, T] random tokens in segments, and how many keys each of them sees."""
    rng, lengths, places = np.random.default_rng(0), [], []
    for row in range(B):
        mine = [int(part * T) for part in PARTS[row % 3 :] + PARTS[: row % 3]]
        places += [(row, sum(mine[:i])) for i in range(len(mine))]
        lengths += mine
    sequences = [rng.integers(vocab_size, size=n, dtype=np.int32) for n in lengths]
    batch, _ = pack_sequences(sequences, RowShape(B, T), B, places)
    learned = (batch.positions > 0).astype(np.float32)
    seen = 1 + batch.positions[batch.segment_ids > 0]
    return batch._replace(loss_weights=learned / learned.sum()), seen


def dense(query: Array, key: Array, value: Array, visible: Array) -> Array:
    """Attention of scaled queries in float32; `visible` is [B, T, S] bool."""
    q, k, v = (x.astype("float32") for x in (query, key, value))
    einsum = functools.partial(jnp.einsum, precision="highest")
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = einsum("BTKGH,BSKH->BKGTS", q, k)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30))
    return einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(query.shape)


def dense_rows(settings: Any, q: Array, k: Array, v: Array, tokens: Any) -> Array:
    """The same over packed rows."""
    ids, order = tokens.segment_ids, jnp.arange(q.shape[1])
    same = ids[:, :, None] == ids[:, None]
    return dense(q * settings.scale, k, v, same & (order[:, None] >= order))


def dense_pages(q: Array, cache: PagedCache, layer: Any, at: Array, _: Any) -> Array:
    """The same for one query a row, at positions [B, 1], over the row's pages."""
    pools = (x[:, layer, cache.table] for x in (cache.keys, cache.values))
    k, v = (jnp.moveaxis(x, 0, 3).reshape(len(q), -1, *x.shape[::4]) for x in pools)
    return dense(q, k, v, jnp.arange(k.shape[1]) <= at[..., None])


def picked(settings: Any, q: Array, k: Array, v: Array, tokens: Any) -> Array:
    """What `attention` computes on a GPU; on a CPU the same kernel, interpreted."""
    if jax.default_backend() != "cpu":
        return attention.attention(q, k, v, tokens, settings)
    operands = q, k, v, tokens.segment_ids, tokens.windowed, settings
    return attention_kernels.gpu_attention(*operands, interpret=True)


def with_gradients(attend: Callable, *args: Any) -> tuple:
    """Output, zero for padding, and gradients of query, key and value."""
    *qkv, tokens, d_out = args
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, tokens), *qkv)
    live = (tokens.segment_ids > 0)[:, :, None, None]
    return jnp.where(live, out, 0), *pull(jnp.where(live, d_out, 0))


def packed_attention(B: int, T: int, N: int, K: int, H: int) -> Measure:
    """The paths of `attention` for one size."""
    batch, seen = packed_rows(B, T)
    rows = batch.positions[0], batch.segment_ids[0], np.array(False)
    tokens = attention.Tokens(*map(jnp.asarray, rows))
    arrays = [normal(i, (B, T, n, H)) for i, n in enumerate((N, K, K, N))]
    flops = 4 * N * H * int(seen.sum())
    paths = {"picked": picked, "xla": attention._blockwise, "dense": dense_rows}
    programs: Programs = {}
    for path, function in paths.items():
        attend = functools.partial(function, attention_kernels.Settings(H**-0.5))
        dtype = "float32" if path == "dense" else "bfloat16"
        *qkv, d_out = (x.astype(dtype) for x in arrays)
        programs[f"{path} forward"] = jax.jit(attend), (*qkv, tokens)
        both = jax.jit(functools.partial(with_gradients, attend))
        programs[f"{path} both"] = both, (*qkv, tokens, d_out)
    del programs["dense forward"]

    def rate(kind: str, seconds: float) -> Figures:
        done = flops * (3.5 if kind == "both" else 1)
        return {f"{kind} ms": seconds * 1e3, f"{kind} TFLOP/s": done / seconds / 1e12}

    return compare(programs, rate)


def over_layers(attend: Callable, query: Array, cache: PagedCache, *args: Any) -> Array:
    """The sum of the outputs for all layers of a cache, in float32."""
    one, zeros = functools.partial(attend, query, cache), jnp.zeros(query.shape)
    return jax.lax.fori_loop(0, LAYERS, lambda i, x: x + one(i, *args), zeros)


def paged_attention(*size: Any) -> Measure:
    """The paths of `paged_attention` for one size."""
    slots, columns, N, K, H, dtype = size
    rng, used = np.random.default_rng(0), slots * columns
    table = 1 + rng.permutation(used).reshape(slots, columns).astype(np.int32)
    pools = (normal(i, (K, LAYERS, 1 + used, PAGE, H), dtype) for i in range(2))
    at = rng.integers(columns * PAGE, size=(slots, 1), dtype=np.int32)
    query = normal(2, (slots, 1, N, H), dtype) * H**-0.5
    cache = PagedCache(*pools, jnp.asarray(table))
    args = query, cache, jnp.asarray(at), jnp.array(False)
    read = LAYERS * 2 * K * H * query.dtype.itemsize * int((at + 1).sum())
    settings = attention_kernels.Settings(1.0)
    xla = functools.partial(paged_cache._pagewise, settings)
    attend = functools.partial(paged_cache.paged_attention, settings=settings)
    paths = {"picked": attend, "xla": xla, "dense": dense_pages}
    programs: Programs = {
        f"{path} both": (jax.jit(functools.partial(over_layers, attend)), args)
        for path, attend in paths.items()
    }

    def rate(_: str, seconds: float) -> Figures:
        share = read / seconds / ceiling("copy")
        return {"us a layer": seconds / LAYERS * 1e6, "share of copy": share}

    return compare(programs, rate)


def generation(config: ModelConfig, sizes: Figures) -> Measure:
    """Speed of the engine, by the number of slots."""
    mesh, key = sharding.make_mesh(sharding.MeshConfig()), jax.random.key(0)
    params = jax.jit(functools.partial(init_params, config))(key)
    params = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    (prompt, new), engines = sizes["tokens"], {}
    for slots in sizes["slots"]:
        options = engine.EngineConfig(slots=slots, page_size=PAGE)
        args = sampling.SamplingConfig(new), options, mesh, prompt + new
        engines[slots] = engine.make_engine(Transformer(config), None, *args)

    def run(slots: int, length: int) -> float:
        ids = np.random.default_rng(0).integers(config.vocab_size, size=(slots, prompt))
        ids = ids[np.arange(slots) // GROUP].astype(np.int32)
        requests = [Request(tokens, n, length) for n, tokens in enumerate(ids)]
        start = time.perf_counter()
        rollout = engines[slots].generate(params, requests, key)
        assert {len(tokens) for tokens in rollout.tokens} == {length}
        return time.perf_counter() - start

    with ThreadPoolExecutor(len(engines)) as pool:
        compiled = {slots: pool.submit(run, slots, 1) for slots in engines}

    def measure(slots: int) -> Figures:
        compiled[slots].result()
        runs = ([run(slots, n) for _ in range(3)] for n in (1, new))
        short, whole = map(statistics.median, runs)
        weights = sum(x.nbytes for x in jax.tree.leaves(params))
        cached = slots * (prompt + new / 2) * paged_cache.page_bytes(config, 1)
        step, limit = (whole - short) / (new - 1), (weights + cached) / ceiling("copy")
        found = {"tokens/s": slots * new / whole, "start ms": short * 1e3}
        found |= {"step ms": step * 1e3, "step MB": (weights + cached) / 1e6}
        return found | {"share of copy": limit / step}

    return measure


def training(config: ModelConfig, B: int, T: int) -> Measure:
    """The update of stage `sft`, and the scores of its rows."""
    mesh, model = sharding.make_mesh(sharding.MeshConfig()), Transformer(config)
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(1e-5), 100)
    shardings = state.state_shardings(model, tx, mesh)
    init = functools.partial(init_params, config, jax.random.key(0))
    shapes = state.abstract_state(model, jax.eval_shape(init), tx, mesh)
    batch, seen = packed_rows(B, T, config.vocab_size)
    batch = sharding.put_rows(batch, mesh)
    update = learner.jit_update(next_token_loss, model, tx, mesh, shardings)
    score = functools.partial(log_probs.packed_log_probs, model, 1.0)
    programs: Programs = {"update": (update, (shapes, batch, None))}
    programs["score"] = sharding.jit(score, mesh), (shapes.params, batch)
    made, states = compile_all(programs), []
    counts = config, len(seen), float(seen.mean()), int((seen > 1).sum())

    def step() -> Any:
        states[0], metrics = made["update"].result()(states[0], batch, None)
        return metrics["sft/loss"]

    def measure(kind: str) -> Figures:
        if not states:  # not before it is needed: it is large
            states.append(state.new_state(jax.jit(init)(), tx, shardings))
        program, updates = made[kind].result(), kind == "update"
        call = step if updates else functools.partial(program, states[0].params, batch)
        seconds = seconds_of(call)
        peak = seconds * ceiling("product")
        found = {"ms": seconds * 1e3, "tokens/s": len(seen) / seconds}
        found["MFU"] = forward_flops(*counts) * (3 if updates else 1) / peak
        if updates:
            found |= {"HFU": train_flops(*counts) / peak, "loss": float(step())}
        return found | {"temp GB": program.memory_analysis().temp_size_in_bytes / 1e9}

    return measure


def main() -> None:
    """Parses the flags, and measures section by section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--json", type=Path, help="file of all figures")
    parser.add_argument("--sections", default="bcad")
    parser.add_argument("--seconds", type=float, default=150)
    flags = parser.parse_args()
    sizes, part = QUICK if flags.quick else FULL, functools.partial
    rows, pages, models = (sizes[x].items() for x in ("packed", "paged", "models"))
    packed = {name: part(packed_attention, *x) for name, x in rows}
    paged = {name: part(paged_attention, *x) for name, x in pages}
    engines = {name: part(generation, config, sizes) for name, (config, *_) in models}
    trained = {name: part(training, *x) for name, x in models}
    rates = {"ceiling": lambda: lambda kind: {"10^12 a second": ceiling(kind) / 1e12}}
    sections = [  # letter, cases, kinds of lines
        ("a", rates, ("product", "copy")),
        ("b", packed, ("picked", "xla")),
        ("c", paged, ("picked", "xla")),
        ("c", engines, sizes["slots"]),
        ("d", trained, ("score", "update")),
    ]
    chosen = [one for x in flags.sections for one in sections if one[0] == x]
    report(chosen, flags.json, flags.seconds)


if __name__ == "__main__":
    main()
