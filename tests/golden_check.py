"""Compares the reward with numbers of the reference implementation.

    python tests/golden_check.py FOLDER

FOLDER holds cases.jsonl, arrays.npz and configs.json; the folder above it holds
tokenizer/, teacher/ and student/. Prints the worst difference of every quantity and each
case that is off, and exits with 1 if any is. Cases on which the reference itself fails
(their class is not "numbers") are compared with what sound spans give.
"""

import functools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rlt_jax.inference.scoring import score_rows

from rlt_jax.data import examples, scoring
from rlt_jax.data.templates import Problem, Template, Trace
from rlt_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlt_jax.models.convert import read_config, read_params
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl.rlt_reward import RLTRewardConfig, reward_tokens, rlt_reward
from rlt_jax.types import Reward, ScoringBatch

TOKEN_ATOL = 5e-4
REWARD_ATOL, REWARD_RTOL = 1e-3, 1e-4


class Differences:
    """Worst difference per quantity, and the cases that exceed their tolerance."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = defaultdict(float)
        self.count: dict[str, int] = defaultdict(int)
        self.off: list[str] = []

    def close(
        self, what: str, case: str, ours: Any, theirs: Any, atol: float, rtol: float
    ) -> None:
        """Records one comparison."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        self.count[what] += 1
        if ours.shape != theirs.shape:
            self.off.append(f"{case}: {what}: shape {ours.shape}, want {theirs.shape}")
            return
        gap = np.abs(ours - theirs)
        self.worst[what] = max(self.worst[what], float(gap.max(initial=0.0)))
        excess = (gap - rtol * np.abs(theirs)).reshape(-1)
        if not np.all(excess <= atol):
            i = int(excess.argmax())
            pair = f"{ours.reshape(-1)[i]} instead of {theirs.reshape(-1)[i]}"
            self.off.append(f"{case}: {what}: {pair} (entry {i})")

    def equal(self, what: str, case: str, ours: Any, theirs: Any) -> None:
        """Records a comparison that has to be exact."""
        self.close(what, case, ours, theirs, 0.0, 0.0)


def template_of(inputs: dict[str, str]) -> Template:
    """The template that a case was made with."""
    system = inputs["prompt"].partition("<|im_start|>system\n")[2]
    opening = inputs["start_think_teacher_tags"]
    return Template(
        teacher_system=system.partition("<|im_end|>")[0],
        student_system=inputs["student_system_prompts"],
        explanation_tags=(opening, inputs["end_think_teacher_tags"]),
        thought_tags=(
            inputs["start_think_student_tags"],
            inputs["end_think_student_tags"],
        ),
        solution_tags=(inputs["start_solution_tags"], inputs["end_solution_tags"]),
        pad=inputs["masked_out_think_prefix"][len(opening) :],
        delimiter=inputs["think_solution_delimiters"],
    )


def rows_of(
    tokenizer: Tokenizer, inputs: dict[str, str]
) -> tuple[examples.Row, examples.Row, bool]:
    """Student row, teacher row, and whether the explanation is closed."""
    template = template_of(inputs)
    opening, closing = template.solution_tags
    solution = inputs["solutions"].removeprefix(opening).removesuffix(closing)
    problem = Problem(inputs["questions"], solution)
    body, closed = template.explanation_of(inputs["completion"])
    student = examples.student_row(tokenizer, template, Trace(problem, body))
    teacher = examples.written_teacher_row(
        tokenizer, template, problem, inputs["completion"]
    )
    return student, teacher, closed


def reward_config(reward: dict[str, Any]) -> RLTRewardConfig:
    """Our settings for those of the reference."""

    def weights(names: Any, coefs: Any) -> dict[str, float]:
        names = [names] if isinstance(names, str) else names
        coefs = coefs if isinstance(coefs, list) else [coefs] * len(names)
        return dict(zip(names, coefs, strict=True))

    return RLTRewardConfig(
        student_temperature=reward["unbias_student_log_probs_temp"] or 1.0,
        solution_reductions=weights(
            reward["reduction_log_prob_fn"], reward["answer_log_prob_coeff"]
        ),
        solution_map=reward["normalize_log_prob_fn"] or "none",
        solution_clip=reward["clip_log_prob"],
        explanation_kl_coef=1.0,
        kl_reductions=weights(
            reward["reduction_kl_fn"], reward["kl_penalty_reward_coeff"]
        ),
        kl_map=reward["normalize_kl_fn"] or "none",
        kl_clip=reward["clip_kl"],
        kl_estimator="k3" if reward["use_schulman_kl_estimation"] else "k1",
        kl_teacher_term=reward["include_teacher_think_entropy"],
        empty_penalty=-reward["not_matched_penalty"],
    )


def compare_rows(
    found: Differences,
    case: dict[str, Any],
    arrays: Any,
    student: examples.Row,
    teacher: examples.Row,
) -> None:
    """Token ids and spans."""
    name = case["id"]
    prefix = "intended_" if "intended" in case else ""
    for role, row in (("student", student), ("teacher", teacher)):
        key = f"{name}/{prefix}{role}_ids"
        key = key if key in arrays else f"{name}/{role}_ids"
        ids = arrays[key]
        found.equal(f"{role}_ids", name, row.tokens[: len(ids)], ids[: len(row.tokens)])
    spans = {
        "teacher_thought": teacher.explanation,
        "student_thought": student.explanation,
        "student_solution": student.solution,
    }
    wanted = case["span" if case["class"] == "numbers" else "span_by_offsets"]
    for key, span in spans.items():
        found.equal(f"span.{key}", name, span[:2], wanted[key])


def compare_reward(
    found: Differences, case: dict[str, Any], config: str, reward: Reward, n: int
) -> None:
    """Every reduction, both terms and the reward of one completion."""
    numbers = case["class"] == "numbers"
    wanted = case["runs" if numbers else "by_offsets"].get(config)
    if wanted is None or "raises" in wanted:
        return
    if not numbers and not teacher_term_fill_is_sound(case, config):
        return
    name = f"{case['id']}/{config}"
    if config == "no_entropy":
        if not numbers:  # the terms given there are those with the teacher's
            close = functools.partial(found.close, atol=REWARD_ATOL, rtol=REWARD_RTOL)
            close("reward", name, reward.value[n], wanted["reward"])
            return
        for key in ("kl_scores", "kl_reward"):
            wanted = wanted | {key: wanted[f"{key}_without_teacher_lp"]}
    close = functools.partial(found.close, atol=REWARD_ATOL, rtol=REWARD_RTOL)
    for kind, key in (("solution", "log_prob_scores"), ("kl", "kl_scores")):
        for reduction, value in wanted[key].items():
            close(key, name, reward.terms[f"{kind}_{reduction}"][n], value)
    close("kl_reward", name, -reward.terms["explanation_kl"][n], wanted["kl_reward"])
    score = reward.terms["solution_score"][n]
    close("log_prob_reward", name, score, wanted["log_prob_reward"])
    truth = wanted.get("reward_f64", wanted["reward"])
    close("reward", name, reward.value[n], truth)


def teacher_term_fill_is_sound(case: dict[str, Any], config: str) -> bool:
    """The reference rewards an empty explanation when the teacher term is off."""
    return config != "no_entropy" or case["span_by_offsets"]["student_thought"] != [
        0,
        0,
    ]


def log_probs_by_temperature(
    model_dir: Path, batch: Any, temperatures: set[float]
) -> dict[float, jax.Array]:
    """Per-token log-probs of packed rows under a model at several temperatures."""
    model = Transformer(read_config(model_dir))
    params = read_params(model_dir, model.config)
    return {
        t: jax.jit(functools.partial(score_rows, model, t))(params, batch)
        for t in sorted(temperatures)
    }


def compare_tokens(
    found: Differences,
    case: dict[str, Any],
    arrays: Any,
    role: str,
    log_probs: dict[float, jax.Array],
    start: int,
    length: int,
) -> None:
    """Log-probs of every token of a row, at each temperature given."""
    if case["class"] != "numbers":
        return
    for temperature, values in log_probs.items():
        key = f"{case['id']}/{role}_lp/T{temperature:g}"
        if key not in arrays:
            continue
        shared = min(len(arrays[key]) + 1, length)  # one may go on after the turn
        ours = np.asarray(values).reshape(-1)[start + 1 : start + shared]
        wanted = arrays[key][: shared - 1]
        found.close(f"{role}_lp", key, ours, wanted, TOKEN_ATOL, 0.0)


def reward_of_config(
    configs: dict[str, Any],
    student: dict[float, jax.Array],
    teacher: dict[float, jax.Array],
    batch: ScoringBatch,
) -> Iterator[tuple[str, Reward]]:
    """The reward of all cases in every configuration."""
    for name, entry in configs.items():
        config = reward_config(entry["reward"])
        biased = entry["reward"]["unbias_teacher_log_probs"] is False
        teacher_temperature = 1.0 if biased else entry["gen_temperature"]
        tokens = reward_tokens(
            config,
            student[config.student_temperature],
            teacher[teacher_temperature],
            batch,
        )
        yield name, jax.jit(functools.partial(rlt_reward, config))(tokens, batch.closed)


def check(folder: Path) -> Differences:
    """Runs every comparison of a folder."""
    with (folder / "cases.jsonl").open(encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    configs = json.loads((folder / "configs.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(folder.parent / "tokenizer")
    found = Differences()
    with np.load(folder / "arrays.npz") as arrays:
        rows = [rows_of(tokenizer, case["inputs"]) for case in cases]
        for case, (student, teacher, _) in zip(cases, rows, strict=True):
            compare_rows(found, case, arrays, student, teacher)
        longest = max(len(row.tokens) for pair in rows for row in pair[:2])
        batch = scoring.batch_of_rows(
            scoring.RowShape(4, -(-longest // 512) * 512),
            [student for student, _, _ in rows],
            [teacher for _, teacher, _ in rows],
            np.array([closed for _, _, closed in rows]),
        )
        temperatures = {0.7, 1.0} | {c["gen_temperature"] for c in configs.values()}
        student = log_probs_by_temperature(
            folder.parent / "student", batch.student, temperatures
        )
        teacher = log_probs_by_temperature(
            folder.parent / "teacher", batch.teacher, temperatures
        )
        for n, (case, pair) in enumerate(zip(cases, rows, strict=True)):
            for role, row, log_probs in zip(
                ("student", "teacher"), pair[:2], (student, teacher), strict=True
            ):
                packed = getattr(batch, f"{role}_explanation")
                start = int(packed.index[n, 0]) - row.explanation.start
                length = len(row.tokens)
                compare_tokens(found, case, arrays, role, log_probs, start, length)
        for name, reward in reward_of_config(configs, student, teacher, batch):
            for n, case in enumerate(cases):
                compare_reward(found, case, name, reward, n)
    return found


def main(argv: list[str]) -> int:
    """Prints the comparison; 1 if anything is off."""
    if len(argv) != 2:
        print(__doc__)
        return 2
    found = check(Path(argv[1]))
    for what, worst in found.worst.items():
        print(f"{what:24} {found.count[what]:6} compared, worst {worst:.3g}")
    for line in found.off:
        print(f"OFF {line}")
    print(f"{len(found.off)} off")
    return 1 if found.off else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
