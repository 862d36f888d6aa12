"""Speed and memory of training, side by side in one run.

    python benchmarks/rl_step.py --trl_python=PATH --tunix_python=PATH
                                 [--repeats=3] [--workloads=rl,sft] [--contenders=...]
                                 [--tiny]

A 25-million-parameter Qwen2 (hidden 384, 8 layers, vocabulary 32,000) in float32:

    rl    a GRPO step: 4 prompts of 128 tokens, 8 completions of 128 tokens each at
          temperature 1, a cheap reward, a KL to a reference, one update by AdamW
    sft   a step on 8 lines of 512 tokens, all of which are learned, by AdamW

    rlt_jax        the programs of the stages `rl` and `sft`
    trl            GRPOTrainer and SFTTrainer, by the interpreter --trl_python
    transformers   Trainer, by the same
    tunix          GRPOLearner with the vanilla rollout, and PeftTrainer, of google-tunix,
                   by the interpreter --tunix_python

A step of rl is a rollout; scores, which are log-probabilities of the completions by the
reference and the reward; and the rest, which is the update, from whose forward pass the
policy's come. All contenders try to compute all rows at once, and a part of them;
the faster counts. Each has a process of its own and they take turns; the first step,
which compiles, is not counted. A run counts when other programs kept less than a tenth
of a core busy; if no run of a contender was that quiet, all of its runs count and it gets
no ratio. Shown are medians, our speed over each peer's (x), peak resident memory of the
process, how many runs were quiet, and the cores that others kept busy in all of them.

The share of the matmul rate is the time that the model's products take at the rate of a
large float32 product in JAX, over the time of the step or phase. The model's products
are those of weights and of causal attention for every token, and of the head for every
learned token, forward and twice that backward; what is computed again does not count.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rl_contenders import CONTENDERS, PACKAGES, Sizes
from rollout import HEAD_DIM, QUIET, SHAPE, counting, wait_for_quiet, write_model

SIZES = Sizes(prompts=4, group=8, prompt=128, new=128, lines=8, length=512)
TINY = Sizes(prompts=2, group=2, prompt=16, new=16, lines=2, length=64)
PHASES = ("rollout", "score", "update")


def rows_of(workload: str, sizes: Sizes) -> tuple[int, ...]:
    """Rows computed at once that are tried: all of a step, and a part."""
    if workload == "sft":
        return sizes.lines, max(1, sizes.lines // 4)
    return sizes.prompts * sizes.group, sizes.group


def tokens_of(workload: str, sizes: Sizes) -> int:
    """Tokens of a step: those sampled, or those learned."""
    if workload == "sft":
        return sizes.lines * sizes.length
    return sizes.prompts * sizes.group * sizes.new


class Contender:
    """A process that trains a step when asked; see `rl_contenders.py`."""

    def __init__(self, python: str, options: dict[str, Any]) -> None:
        self.rows, self.error = options["rows"], ""
        self._shown = f"{options['contender']}, {self.rows} rows at once"
        file = str(Path(__file__).with_name("rl_contenders.py"))
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [python, file, *(f"--{name}={x}" for name, x in options.items())],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        self.versions = self._answer().get("versions")

    def step(self) -> dict[str, float] | None:
        """Runs a step and returns its figures; None, and says why, after an error."""
        wait_for_quiet()
        figures = {}
        if not self.error:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            figures = self._answer()
        if self.error:
            print(f"{self._shown}: {self.error}", flush=True)
            return None
        if "rollout" in figures:
            before = figures["rollout"] + figures["score"]
            figures["update"] = figures["seconds"] - before
        named = {name: round(x, 2) for name, x in figures.items()}
        print(f"  {self._shown}: {named}", file=sys.stderr, flush=True)
        return figures

    def end(self) -> None:
        """Ends the process, also in the middle of a step."""
        self._process.terminate()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended"}
        self.error = answer.get("error", "")
        return answer


def middle(runs: list[dict[str, float]], figure: str) -> float:
    """Median of a figure over the runs that count."""
    return statistics.median(x[figure] for x in counting(runs))


def trial(one: Contender) -> list[dict[str, float]]:
    """Runs after the one that compiles, up to a quiet one; at most three."""
    runs = []
    if one.step():
        while len(runs) < 3 and (figures := one.step()):
            runs.append(figures)
            if figures["others"] < QUIET:
                break
    return [] if one.error else runs


def fastest(
    name: str, python: str, folder: str, workload: str, sizes: Sizes
) -> tuple[Contender, list[dict[str, float]]] | None:
    """The contender with the faster rows at once, and its first runs; None without."""
    found: list[tuple[Contender, list[dict[str, float]]]] = []
    tried = {}
    for rows in rows_of(workload, sizes):
        if tried and name == "rlt_jax" and workload == "sft":
            break  # all rows of a step are one program
        options = {"contender": name, "workload": workload, "model": folder}
        options |= {"sizes": json.dumps(sizes), "rows": rows}
        one = Contender(python, options)
        runs = trial(one)
        if not runs:
            one.end()
            continue
        tried[rows] = round(middle(runs, "seconds"), 1)
        found = sorted([*found, (one, runs)], key=lambda x: middle(x[1], "seconds"))
        for slower, _ in found[1:]:
            slower.end()
    if not found:
        print(f"{name} is left out.")
        return None
    print(
        f"{name} {found[0][0].versions}, seconds by rows at once: {tried}", flush=True
    )
    return found[0]


def measure(
    pythons: dict[str, str], folder: str, workload: str, sizes: Sizes, repeats: int
) -> dict[str, list[dict[str, float]]]:
    """Runs of every contender that can be run; they take turns."""
    chosen = {}
    try:
        for name, python in pythons.items():
            if found := fastest(name, python, folder, workload, sizes):
                chosen[name] = found
        for _ in range(repeats - 1):
            for one, runs in chosen.values():
                if figures := one.step():
                    runs.append(figures)
    finally:
        for one, _ in chosen.values():
            one.end()
    return {name: runs for name, (_, runs) in chosen.items()}


def table(runs: dict[str, list[dict[str, float]]], workload: str, sizes: Sizes) -> None:
    """Prints seconds, tokens a second, memory, and our speed over each peer's."""
    shown = ("seconds", *(PHASES if workload == "rl" else ()))
    columns = [*shown, *(f"x {name}" for name in shown)]
    columns += ["tokens/s", "GiB", "quiet", "others"]
    print(f"{workload:13}" + "".join(f"{name:>10}" for name in columns))
    for name, xs in runs.items():
        ours = runs.get("rlt_jax", xs)
        fair = all(x[0]["others"] < QUIET for x in map(counting, (xs, ours)))
        cells = [f"{middle(xs, x):.2f}" for x in shown]
        ratios = [middle(xs, x) / middle(ours, x) for x in shown]
        cells += [f"{x:.2f}" if fair else "noisy" for x in ratios]
        speed = tokens_of(workload, sizes) / middle(xs, "seconds")
        cells += [f"{speed:.0f}", f"{max(x['peak_gib'] for x in xs):.2f}"]
        cells.append(f"{sum(x['others'] < QUIET for x in xs)}/{len(xs)}")
        cells.append(f"{statistics.mean(x['others'] for x in xs):.2f}")
        print(f"{name:13}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def model_flops(rows: int, first: int, last: int, head: bool = True) -> float:
    """Those of a forward pass over tokens `first` to `last` of so many rows."""
    D, F, L = (
        SHAPE[x] for x in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    kv = SHAPE["num_key_value_heads"] * HEAD_DIM
    weights = L * (2 * D * D + 2 * D * kv + 3 * D * F)
    weights += SHAPE["vocab_size"] * D if head else 0
    tokens = last - first
    seen = (first + 1 + last) / 2  # keys a query sees, its own included
    return rows * tokens * (2 * weights + 4 * L * D * seen)


def shares(
    runs: list[dict[str, float]], workload: str, sizes: Sizes, rate: float
) -> None:
    """Prints the share of the matmul rate that each phase of ours reaches."""
    if workload == "sft":
        flops = {"seconds": 3 * model_flops(sizes.lines, 0, sizes.length)}
    else:
        rows, end = sizes.prompts * sizes.group, sizes.prompt + sizes.new
        # Logits of the completions alone are needed.
        whole = model_flops(rows, 0, end, head=False)
        whole += rows * sizes.new * 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
        decoded = model_flops(rows, sizes.prompt - 1, end - 1)
        prompts = model_flops(sizes.prompts, 0, sizes.prompt - 1, head=False)
        flops = {"rollout": prompts + decoded, "score": whole, "update": 3 * whole}
        flops["seconds"] = sum(flops.values())
    parts = {name: f / rate / middle(runs, name) for name, f in flops.items()}
    print(
        f"rlt_jax, share of the matmul rate: {parts['seconds']:.0%} of the step", end=""
    )
    print("".join(f", {parts[x]:.0%} of {x}" for x in PHASES if x in parts))


def matmul_rate(size: int = 2048) -> float:
    """Floating-point operations a second of a float32 product in JAX; best of 20."""
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(jnp.matmul)
    x = jax.random.normal(jax.random.key(0), (size, size))
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def report(arguments: argparse.Namespace) -> None:
    """Prints all tables."""
    sizes = TINY if arguments.tiny else SIZES
    wanted = arguments.contenders.split(",")
    pythons = {
        "rlt_jax": sys.executable,
        "trl": arguments.trl_python,
        "transformers": arguments.trl_python,
        "tunix": arguments.tunix_python,
    }
    print(f"python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores")
    print(sizes)
    rate = 0.0
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for workload in arguments.workloads.split(","):
            names = [name for name in CONTENDERS[workload] if name in wanted]
            of_names = {name: pythons[name] for name in names}
            wait_for_quiet()
            rate = max(rate, matmul_rate())
            print(f"matmul rate {rate / 1e9:.0f} GFLOP/s", flush=True)
            runs = measure(of_names, folder, workload, sizes, arguments.repeats)
            table(runs, workload, sizes)
            if "rlt_jax" in runs:
                shares(runs["rlt_jax"], workload, sizes, rate)


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", default="rl,sft")
    parser.add_argument("--contenders", default=",".join(PACKAGES))
    parser.add_argument("--trl_python", default=sys.executable)
    parser.add_argument("--tunix_python", default=sys.executable)
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    report(parser.parse_args())


if __name__ == "__main__":
    main()
