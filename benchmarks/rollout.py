"""Speed of generation, side by side in one run.

    python benchmarks/rollout.py [--repeats=3] [--workloads=a,b] [--contenders=...]
                                 [--tunix_python=PATH]

A 25-million-parameter Qwen2 (hidden 384, 8 layers, vocabulary 32,000) in float32
completes prompts of 128 tokens, greedy and at temperature 1:

    a   uniform: 16 requests, 256 new tokens each
    b   uneven: 64 requests in 8 groups that share a prompt, lengths geometric with mean
        96 and at most 512

    rlt_jax        the engine with 16 slots
    transformers   `generate` on static batches, with its default cache
    tunix          the vanilla sampler of google-tunix, run by the interpreter
                   --tunix_python, as it need not live with the others

A static batch runs until its longest request is done; what it draws beyond the length of
a request does not count. In b the peers try one batch of 64 and four of 16 and keep the
faster. Every contender has a process of its own and they take turns; compilation is not
counted. Other programs on the machine slow the contenders down unequally: a run counts
when they kept less than a tenth of a core busy; if no run of a contender was that quiet,
all of its runs count and it gets no ratio. Shown are medians, our speed over each peer's,
how many runs were quiet, and the cores that others kept busy in all of them.

The share of the bandwidth limit is the time in which the machine reads the weights once
and every active row's keys and values, over the time of a decode step.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
HEAD_DIM = SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
PROMPT = 128
LONGEST = {"a": 256, "b": 512}
SLOTS = 16
BATCHES = {"a": (16,), "b": (64, 16)}  # rows of a static batch that the peers try
MODES = {"greedy": 0.0, "sampled": 1.0}
QUIET = 0.1  # cores that others may keep busy
COMPARED = 16  # first tokens of a greedy completion


class Job(NamedTuple):
    """A workload, how it is sampled, and rows of a static batch; a short job compiles what
    the whole one needs and samples a token or two of each completion."""

    workload: str
    mode: str
    rows: int
    short: bool = False


# Runs a job and returns the completions and what else there is to say.
Run = Callable[[Job], tuple[list[np.ndarray], dict[str, Any]]]


def requests_of(job: Job) -> tuple[list[np.ndarray], list[int]]:
    """Prompts and the lengths wanted."""
    rng = np.random.default_rng(0)
    groups, size = (16, 1) if job.workload == "a" else (8, 8)
    ids = rng.integers(1, SHAPE["vocab_size"], (groups, PROMPT), np.int32)
    longest = LONGEST[job.workload]
    lengths = np.full(groups * size, longest)
    if job.workload == "b":
        lengths = np.minimum(rng.geometric(1 / 96, groups * size), longest)
    return list(np.repeat(ids, size, axis=0)), lengths.tolist()


def rlt_jax(model_dir: Path) -> Run:
    """The engine; also tells how many slot-steps it used and ran."""
    import functools

    import jax

    from rlt_jax.inference.engine import EngineConfig, make_engine
    from rlt_jax.inference.sampling import SamplingConfig
    from rlt_jax.models.convert import read_config, read_params
    from rlt_jax.models.transformer import Transformer
    from rlt_jax.training.sharding import MeshConfig, make_mesh
    from rlt_jax.types import Request

    model = Transformer(read_config(model_dir))
    params = read_params(model_dir, model.config)
    mesh = make_mesh(MeshConfig())

    @functools.cache
    def engine(workload: str, mode: str) -> Any:
        sampling = SamplingConfig(LONGEST[workload], MODES[mode])
        config = EngineConfig(slots=SLOTS)
        longest = PROMPT + LONGEST[workload]
        return make_engine(model, None, sampling, config, mesh, longest)

    def run(job: Job) -> tuple[list[np.ndarray], dict[str, Any]]:
        requests = [
            Request(prompt, n, 1 if job.short else length)
            for n, (prompt, length) in enumerate(zip(*requests_of(job), strict=True))
        ]
        of_job = engine(job.workload, job.mode)
        rollout = of_job.generate(params, requests, jax.random.key(0))
        steps = {"used": rollout.steps_used, "run": rollout.steps_computed}
        return list(rollout.tokens), steps

    return run


def static(generate: Callable[[np.ndarray, int, Job], np.ndarray]) -> Run:
    """Batches in the order of the requests, each as long as its longest."""

    def run(job: Job) -> tuple[list[np.ndarray], dict[str, Any]]:
        prompts, lengths = requests_of(job)
        completions = []
        for start in range(0, len(prompts), job.rows):
            part = slice(start, start + job.rows)
            tokens = generate(np.stack(prompts[part]), max(lengths[part]), job)
            completions += [x[:n] for x, n in zip(tokens, lengths[part], strict=True)]
        return completions, {}

    return run


def transformers(model_dir: Path) -> Run:
    """`generate` of transformers without a stop token."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32
    )
    model.eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: np.ndarray, longest: int, job: Job) -> np.ndarray:
        ids = torch.from_numpy(prompts.astype(np.int64))
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2 if job.short else longest,
            use_cache=True,
            **(options if job.mode == "sampled" else {"do_sample": False}),
        )
        return tokens[:, PROMPT:].numpy()

    return static(generate)


class Ids:
    """A tokenizer whose texts are lists of ids; no id stops and none is padding."""

    def encode(self, ids: list[int]) -> list[int]:
        return ids

    def decode(self, ids: list[int]) -> list[int]:
        return ids

    def bos_id(self) -> int:
        return 0  # none is put before a prompt

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return -1


def tunix_model(model_dir: Path, mesh: Any = None) -> Any:
    """The same weights as a model of tunix."""
    from tunix.models.qwen2.model import ModelConfig
    from tunix.models.qwen2.params import create_model_from_safe_tensors

    config = ModelConfig(
        num_layers=SHAPE["num_hidden_layers"],
        vocab_size=SHAPE["vocab_size"],
        embed_dim=SHAPE["hidden_size"],
        hidden_dim=SHAPE["intermediate_size"],
        num_heads=SHAPE["num_attention_heads"],
        head_dim=HEAD_DIM,
        num_kv_heads=SHAPE["num_key_value_heads"],
        rope_theta=SHAPE["rope_theta"],
        norm_eps=SHAPE["rms_norm_eps"],
        use_tied_embedding=SHAPE["tie_word_embeddings"],
    )
    return create_model_from_safe_tensors(str(model_dir), config, mesh)


def tunix(model_dir: Path) -> Run:
    """The vanilla sampler of tunix with the same weights."""
    import functools

    from tunix.generate.sampler import CacheConfig, Sampler

    layers, heads = SHAPE["num_hidden_layers"], SHAPE["num_key_value_heads"]
    model = tunix_model(model_dir)

    @functools.cache
    def sampler(cache_size: int) -> Sampler:
        return Sampler(model, Ids(), CacheConfig(cache_size, layers, heads, HEAD_DIM))

    def generate(prompts: np.ndarray, longest: int, job: Job) -> np.ndarray:
        options = {"temperature": 1.0, "top_p": 1.0, "seed": 0}
        draw = sampler(PROMPT + LONGEST[job.workload])
        if job.short:  # the programs depend on the longest, the steps are an argument
            start = functools.partial(Sampler.init_sample_state, draw)
            draw.init_sample_state = lambda *args, **named: dataclasses.replace(
                start(*args, **named), total_sampling_steps=PROMPT + 1
            )
        output = draw(
            prompts.tolist(),
            max_generation_steps=longest,
            max_prompt_length=PROMPT,
            **(options if job.mode == "sampled" else {}),
        )
        vars(draw).pop("init_sample_state", None)
        return np.stack(output.tokens)

    return static(generate)


CONTENDERS = {"rlt_jax": rlt_jax, "transformers": transformers, "tunix": tunix}


def serve(name: str, model_dir: Path) -> None:
    """Runs the jobs that come on standard input, one a line; answers with JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    run = CONTENDERS[name](model_dir)
    print(file=answers, flush=True)  # ready
    for line in sys.stdin:
        job = Job(*json.loads(line))
        start, others = time.perf_counter(), others_time()
        completions, figures = run(job)
        seconds = time.perf_counter() - start
        others = (others_time() - others) / seconds
        lengths = [len(x) for x in completions]
        if not job.short and lengths != requests_of(job)[1]:
            raise RuntimeError(f"{name} drew other lengths than it was asked for.")
        begins = [x[:COMPARED].tolist() for x in completions]
        figures |= {"seconds": seconds, "others": others, "begins": begins}
        print(json.dumps(figures), file=answers, flush=True)


def others_time() -> float:
    """Seconds that the cores have worked for other processes since the start."""
    fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    user, nice, system, _, _, *rest = map(int, fields)
    ticks = user + nice + system + sum(rest)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def wait_for_quiet(seconds: int = 10) -> None:
    """Waits until other processes leave the cores alone, or that many seconds."""
    for _ in range(seconds):
        before = others_time()
        time.sleep(1)
        if others_time() - before < QUIET:
            return


class Contender:
    """A process that runs jobs when asked."""

    def __init__(self, name: str, python: str, model_dir: str) -> None:
        self.name, self.rows = name, {}
        command = [python, __file__, f"--contender={name}", f"--model={model_dir}"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._answer()

    def run(self, job: Job) -> dict[str, Any]:
        """Runs a job and returns its figures."""
        wait_for_quiet()
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        figures = json.loads(self._answer())
        print(
            f"  {self.name}, {job}: {figures['seconds']:.2f} s, "
            f"{figures['others']:.2f} cores busy elsewhere",
            file=sys.stderr,
            flush=True,
        )
        return figures

    def _answer(self) -> str:
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended early; its message is above.")
        return answer

    def end(self) -> None:
        """Ends the process, also in the middle of a job."""
        self._process.terminate()
        self._process.wait()


def measure(
    contenders: list[Contender], workload: str, mode: str, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Runs of every contender, which take turns."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for one in contenders:
        tried = one.rows.get(workload, BATCHES[workload])
        tried = tried[:1] if one.name == "rlt_jax" else tried
        found = {}
        for rows in tried:
            job = Job(workload, mode, rows)
            one.run(job._replace(short=True))
            found[rows] = one.run(job)
        best = min(found, key=lambda rows: found[rows]["seconds"])
        if len(found) > 1:
            print(f"{one.name}, seconds by rows of a static batch:", end=" ")
            print({rows: round(x["seconds"], 1) for rows, x in found.items()})
        one.rows[workload] = (best,)
        runs[one.name] = [found[best]]
    for _ in range(repeats - 1):
        for one in contenders:
            job = Job(workload, mode, *one.rows[workload])
            runs[one.name].append(one.run(job))
    return runs


def counting(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The quiet runs, or all if none was."""
    return [x for x in runs if x["others"] < QUIET] or runs


def median_time(runs: list[dict[str, Any]]) -> float:
    """Seconds of those that count."""
    return statistics.median(x["seconds"] for x in counting(runs))


def table(runs: dict[str, list[dict[str, Any]]], workload: str, mode: str) -> None:
    """Prints tokens a second of all contenders."""
    tokens = sum(requests_of(Job(workload, mode, 0))[1])
    for name, xs in runs.items():
        speeds = [tokens / x["seconds"] for x in counting(xs)]
        ours = runs.get("rlt_jax", xs)
        fair = all(x[0]["others"] < QUIET for x in map(counting, (xs, ours)))
        ratio = f"{median_time(xs) / median_time(ours):.2f}" if fair else "noisy"
        quiet = f"{sum(x['others'] < QUIET for x in xs)}/{len(xs)}"
        others = statistics.mean(x["others"] for x in xs)
        print(
            f"{workload} {mode:8}{name:14}{statistics.median(speeds):10.0f}"
            f"{min(speeds):8.0f}{max(speeds):8.0f}{ratio:>12}{quiet:>8}{others:8.2f}"
        )
    if mode == "greedy" and "rlt_jax" in runs:
        first = runs["rlt_jax"][0]["begins"]
        for name in runs.keys() - {"rlt_jax"}:
            pairs = zip(first, runs[name][0]["begins"], strict=True)
            same = sum(ours == theirs for ours, theirs in pairs)
            print(f"{name}: {same} of {len(first)} begin with the same {COMPARED}")


def step_line(
    one: Contender, runs: list[dict[str, Any]], workload: str, mode: str, speed: float
) -> None:
    """Prints our time of a decode step and its share of the bandwidth limit.

    Args:
      one: our contender.
      runs: its runs.
      workload: which.
      mode: which.
      speed: bytes a second that the machine reads.
    """
    job = Job(workload, mode, 0, short=True)
    short = [one.run(job) for _ in runs]
    whole_time, short_time = median_time(runs), median_time(short)
    steps = (runs[0]["run"] - short[0]["run"]) / SLOTS
    seconds = (whole_time - short_time) / steps
    lengths = np.array(requests_of(job)[1])
    # The step that draws token t of a completion reads all before it.
    stored = (lengths * PROMPT + lengths * (lengths - 1) // 2).sum()
    heads = SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"]
    cached = stored * 2 * heads * HEAD_DIM * 4 / (runs[0]["run"] / SLOTS)
    limit = (weight_bytes() + cached) / speed
    print(
        f"{workload} {mode:8}{seconds * 1e3:.2f} ms a step, prefill and start "
        f"{short_time:.2f} s; weights {weight_bytes() / 1e6:.0f} MB, keys and values "
        f"{cached / 1e6:.0f} MB a step: {limit / seconds:.0%} of the bandwidth limit; "
        f"occupancy {runs[0]['used'] / runs[0]['run']:.0%}"
    )


def weight_bytes() -> int:
    """Bytes of the weights a decode step reads, the tied head included."""
    D, F = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    kv = SHAPE["num_key_value_heads"] * HEAD_DIM
    layer = 2 * D * D + 2 * D * kv + D + 2 * kv + 3 * D * F + 2 * D
    return 4 * (SHAPE["num_hidden_layers"] * layer + D + SHAPE["vocab_size"] * D)


def read_bandwidth() -> float:
    """Bytes a second of a maximum over 1 GiB, a thread to each core; best of 50."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(2**28, np.float32), cores)
    best = np.inf
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for _ in range(50):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return 2**30 / best


def write_model(folder: Path) -> None:
    """A random checkpoint in Hugging Face layout."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SHAPE)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)


def versions_of(python: str) -> str | None:
    """Versions of tunix and its jax under that interpreter; None if it has none."""
    program = "import tunix.generate.sampler, tunix.models.qwen2.params\n"
    program += "from importlib.metadata import version as v\n"
    program += "print('google-tunix', v('google-tunix'), 'on jax', v('jax'))"
    command = [python, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or ["no message"])[-1]
        print(f"tunix is left out, {python} does not import it: {reason}")
        return None
    return done.stdout.splitlines()[-1]


def tables(
    contenders: list[Contender], workload: str, repeats: int, speed: float
) -> None:
    """Measures a workload and prints what was found; `speed` as in `step_line`."""
    lengths = requests_of(Job(workload, "greedy", 0))[1]
    print(f"{workload}: {len(lengths)} requests, {sum(lengths)} tokens, ", end="")
    print(f"{min(lengths)} to {max(lengths)} each")
    columns = f"{'tokens/s':>10}{'min':>8}{'max':>8}{'ours / it':>12}"
    columns += f"{'quiet':>8}{'others':>8}"
    print(f"{'':24}{columns}", flush=True)
    for mode in MODES:
        runs = measure(contenders, workload, mode, repeats)
        table(runs, workload, mode)
        for one in contenders:
            if one.name == "rlt_jax":
                step_line(one, runs[one.name], workload, mode, speed)


def report(arguments: argparse.Namespace) -> None:
    """Prints all tables."""
    names = arguments.contenders.split(",")
    pythons = dict.fromkeys(names, sys.executable)
    versions = {p: metadata.version(p) for p in ("jax", "torch", "transformers")}
    print(f"python {platform.python_version()}, {versions}")
    if "tunix" in names:
        pythons["tunix"] = arguments.tunix_python
        found = versions_of(arguments.tunix_python)
        names = names if found else [name for name in names if name != "tunix"]
        print(found or "", end="\n" if found else "")
    wait_for_quiet()
    speed = read_bandwidth()
    print(f"read bandwidth {speed / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        contenders = [Contender(name, pythons[name], folder) for name in names]
        try:
            for workload in arguments.workloads.split(","):
                tables(contenders, workload, arguments.repeats, speed)
        finally:
            for one in contenders:
                one.end()


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", default="a,b")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--tunix_python", default=sys.executable)
    parser.add_argument("--contender")
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    if arguments.contender:
        serve(arguments.contender, arguments.model)
    else:
        report(arguments)


if __name__ == "__main__":
    main()
