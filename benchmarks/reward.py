"""Scoring speed and memory, side by side in one run.

    python benchmarks/reward.py [--rows=48] [--repeats=3]

A 25-million-parameter Qwen2 (hidden 384, 8 layers, vocabulary 32,000) in float32 scores
rows whose lengths are drawn from 200 to 4,000 tokens:

    packed   rlt_jax: rows packed into lines of 4,096, chunked head, blocked attention
    padded   rlt_jax: the same model, one row at a time, padded to the longest
    torch    transformers: one row at a time at its own length, full logits

Every contender runs in a process of its own and reports tokens of the rows per second
(compilation not counted) and its peak memory; medians over the repeats, and ratios to
torch. A second table gives peak memory of one line of 4,096 and of 32,768 tokens.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
from rollout import SHAPE, write_model

LINE = 4096
TEMPERATURE = 0.7


def make_rows(count: int) -> list[np.ndarray]:
    """Random token ids with lengths drawn uniformly from 200 to 4,000."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 4001, count)
    return [rng.integers(1, SHAPE["vocab_size"], n).astype(np.int32) for n in lengths]


def jax_scorer(model_dir: Path, packed: bool) -> Callable[[list[np.ndarray]], float]:
    """Scores all rows and returns the sum of their log-probs."""
    import functools

    import jax

    from rlt_jax.data.rows import RowShape, pack_sequences
    from rlt_jax.inference.log_probs import packed_log_probs
    from rlt_jax.models.convert import read_config, read_params
    from rlt_jax.models.transformer import Transformer

    model = Transformer(read_config(model_dir))
    params = read_params(model_dir, model.config)
    score = jax.jit(functools.partial(packed_log_probs, model, TEMPERATURE))

    def run(rows: list[np.ndarray]) -> float:
        groups = [rows] if packed else [[row] for row in rows]
        shape = RowShape(1, LINE if packed else max(len(row) for row in rows))
        packed_groups = [pack_sequences(group, shape)[0] for group in groups]
        results = [score(params, batch) for batch in packed_groups]
        return float(sum(np.asarray(result).sum() for result in results))

    return run


def torch_scorer(model_dir: Path) -> Callable[[list[np.ndarray]], float]:
    """The same with transformers: one chat at a time, full logits."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    model.eval()

    def run(rows: list[np.ndarray]) -> float:
        total = 0.0
        with torch.inference_mode():
            for row in rows:
                ids = torch.from_numpy(row.astype(np.int64))[None]
                logits = model(ids).logits[0, :-1] / TEMPERATURE
                log_probs = torch.log_softmax(logits, dim=-1)
                total += float(log_probs.gather(1, ids[0, 1:, None]).sum())
        return total

    return run


def contender(name: str, model_dir: Path, rows: list[np.ndarray], repeats: int) -> None:
    """Runs one contender and prints its figures as JSON."""
    if name == "torch":
        run = torch_scorer(model_dir)
        run(rows[:1])
    else:
        run = jax_scorer(model_dir, packed=name != "padded")
        run(rows)  # compiles
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        total = run(rows)
        seconds.append(time.perf_counter() - start)
    tokens = sum(len(row) for row in rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    speeds = [tokens / s for s in seconds]
    print(json.dumps({"speeds": speeds, "peak_gib": peak, "sum": total}))


def long_line(model_dir: Path, length: int) -> None:
    """Scores one line of one row of that length and prints the peak memory."""
    global LINE
    LINE = length
    row = np.random.default_rng(1).integers(1, SHAPE["vocab_size"], length)
    jax_scorer(model_dir, packed=True)([row.astype(np.int32)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"peak_gib": peak}))


def child(*arguments: str) -> dict:
    """Runs this file in a new process and reads the JSON of its last line."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(arguments: argparse.Namespace) -> None:
    """Prints both tables."""
    versions = {p: metadata.version(p) for p in ("jax", "torch", "transformers")}
    print(f"python {platform.python_version()}, {versions}")
    sizes = [len(row) for row in make_rows(arguments.rows)]
    print(f"{len(sizes)} rows of {min(sizes)} to {max(sizes)}, {sum(sizes)} tokens")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        counts = [f"--rows={arguments.rows}", f"--repeats={arguments.repeats}"]
        found = {
            name: child(f"--contender={name}", f"--model={folder}", *counts)
            for name in ("packed", "padded", "torch")
        }
        base = statistics.median(found["torch"]["speeds"])
        print(
            f"{'':10}{'tokens/s':>10}{'min':>8}{'max':>8}{'ratio':>8}{'peak GiB':>10}"
        )
        for name, figures in found.items():
            speeds = figures["speeds"]
            middle = statistics.median(speeds)
            print(
                f"{name:10}{middle:10.0f}{min(speeds):8.0f}{max(speeds):8.0f}"
                f"{middle / base:8.2f}{figures['peak_gib']:10.2f}"
            )
        print("sums of log-probs:", {name: f["sum"] for name, f in found.items()})
        for length in (4096, 32_768):
            peak = child(f"--line={length}", f"--model={folder}")["peak_gib"]
            hidden = length * SHAPE["hidden_size"] * 4 / 2**30
            print(f"line of {length}: peak {peak:.2f} GiB, hidden states {hidden:.2f}")


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contender")
    parser.add_argument("--line", type=int)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    if arguments.contender:
        rows = make_rows(arguments.rows)
        contender(arguments.contender, arguments.model, rows, arguments.repeats)
    elif arguments.line:
        long_line(arguments.model, arguments.line)
    else:
        report(arguments)


if __name__ == "__main__":
    main()
