"""Compares the reward with numbers of the reference implementation.

    python tests/golden_check.py FOLDER

FOLDER holds cases.jsonl, arrays.npz and configs.json; the folder above it holds
tokenizer/, teacher/ and student/. Prints the largest difference of every quantity and
each case that is off, and exits with 1 if any is. Cases on which the reference itself
fails (their class is not "numbers") are compared with the numbers for spans that are
computed from character offsets. Names of configurations do not matter; numbers that a
case does not have for a configuration are not compared.
"""

import functools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlt_jax.data import examples, rows
from rlt_jax.data.examples import Example, Renderer
from rlt_jax.data.rows import RowShape
from rlt_jax.data.templates import Template
from rlt_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlt_jax.inference.log_probs import packed_log_probs
from rlt_jax.models.convert import read_config, read_params
from rlt_jax.models.transformer import Transformer
from rlt_jax.records import Problem, Trace
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig, ensemble_reward
from rlt_jax.types import Batch, Reward

TOKEN_ATOL = 5e-4
REWARD_ATOL, REWARD_RTOL = 1e-3, 1e-4


class Differences:
    """Largest difference of each quantity, and the cases that exceed the tolerance."""

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
            self.off.append(
                f"{case}: {what}: shape {ours.shape}, expected {theirs.shape}"
            )
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


def solution_of(inputs: dict[str, str]) -> str:
    """The solution without its tags."""
    opening, closing = inputs["start_solution_tags"], inputs["end_solution_tags"]
    return inputs["solutions"].removeprefix(opening).removesuffix(closing)


def template_of(inputs: dict[str, str]) -> Template:
    """The template that a case was made with."""
    prompt, opening = inputs["prompt"], inputs["start_think_teacher_tags"]
    system = prompt.partition("<|im_start|>system\n")[2]
    # The teacher's turn may have other tags and delimiters around the solution.
    before, _, pad = prompt.rpartition(opening)
    turn = before.rpartition("<|im_start|>assistant\n")[2]
    solution = solution_of(inputs)
    if solution:
        start, _, end = turn.rpartition(solution)
    else:
        start = inputs["start_solution_tags"]
        end = turn.removeprefix(start)
    return Template(
        teacher_system=system.partition("<|im_end|>")[0],
        student_system=inputs["student_system_prompts"],
        explanation_tags=(opening, inputs["end_think_teacher_tags"]),
        thought_tags=(
            inputs["start_think_student_tags"],
            inputs["end_think_student_tags"],
        ),
        solution_tags=(inputs["start_solution_tags"], inputs["end_solution_tags"]),
        pad=pad,
        delimiter=inputs["think_solution_delimiters"],
        teacher_delimiter="",
        teacher_solution_tags=(start, end),
        thought_prefix=inputs["think_prefixes"],
    )


def make_examples(
    tokenizer: Tokenizer, inputs: dict[str, str]
) -> tuple[Example, Example, bool]:
    """Student and teacher sequence, and whether the explanation is closed."""
    template = template_of(inputs)
    problem = Problem(inputs["questions"], solution_of(inputs))
    body, closed = template.parse_completion(inputs["completion"])
    (student,) = examples.student_examples(
        Renderer(tokenizer, template, "student"), [Trace(problem, body)]
    )
    (teacher,) = examples.text_examples(
        Renderer(tokenizer, template, "teacher"), [problem], [inputs["completion"]]
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


def temperatures_of(config: dict[str, Any]) -> tuple[float, float]:
    """Teacher's and student's temperature in a configuration."""
    reward = config["reward"]
    biased = reward["unbias_teacher_log_probs"] is False
    teacher = 1.0 if biased else config["gen_temperature"]
    return teacher, reward_config(reward).student_temperature


def compare_sequences(
    differences: Differences,
    case: dict[str, Any],
    arrays: Mapping[str, np.ndarray],
    student: Example,
    teacher: Example,
) -> None:
    """Token ids and spans."""
    name = case["id"]
    prefix = "intended_" if "intended" in case else ""
    for role, example in (("student", student), ("teacher", teacher)):
        key = f"{name}/{prefix}{role}_ids"
        key = key if key in arrays else f"{name}/{role}_ids"
        ids, ours = arrays[key], example.tokens
        differences.equal(f"{role}_ids", name, ours[: len(ids)], ids[: len(ours)])
    spans = {
        "teacher_thought": teacher.explanation,
        "student_thought": student.explanation,
        "student_solution": student.solution,
    }
    expected = case["span" if case["class"] == "numbers" else "span_by_offsets"]
    for key, span in spans.items():
        differences.equal(f"span.{key}", name, span[:2], expected[key])


def expected_numbers(
    case: dict[str, Any], name: str, teacher_term: bool
) -> dict[str, Any] | None:
    """The reference's numbers for a case in the configuration `name`, None without any.

    Args:
      case: a line of cases.jsonl.
      name: of the configuration.
      teacher_term: whether the configuration has the teacher's log-probs in the KL.
    """
    reliable = case["class"] == "numbers"
    numbers = case["runs" if reliable else "by_offsets"].get(name)
    if numbers is None or "raises" in numbers:
        return None
    if teacher_term:
        return numbers
    if reliable:
        return numbers | {
            key: numbers[f"{key}_without_teacher_lp"]
            for key in ("kl_scores", "kl_reward")
        }
    if case["span_by_offsets"]["student_thought"] == [0, 0]:
        return None  # the reference rewards an empty explanation here
    return {"reward": numbers["reward"]}  # its terms include the teacher's log-probs


def compare_reward(
    differences: Differences, name: str, numbers: dict[str, Any], reward: Reward, n: int
) -> None:
    """Compares reductions, terms and reward of completion n, those that are given."""
    close = functools.partial(differences.close, atol=REWARD_ATOL, rtol=REWARD_RTOL)
    for kind, key in (("solution", "log_prob_scores"), ("kl", "kl_scores")):
        for reduction, value in numbers.get(key, {}).items():
            close(key, name, reward[f"{kind}_{reduction}"][n], value)
    ours = {
        "kl_reward": -reward["explanation_kl"][n],
        "log_prob_reward": reward["solution_score"][n],
    }
    for key, value in ours.items():
        if key in numbers:
            close(key, name, value, numbers[key])
    expected = numbers.get("reward_f64", numbers["reward"])
    close("reward", name, reward["value"][n], expected)


def log_probs_by_temperature(
    model_dir: Path, batch: Batch, temperatures: set[float]
) -> dict[float, jax.Array]:
    """Log-probs of all tokens under a model at several temperatures."""
    model = Transformer(read_config(model_dir))
    params = read_params(model_dir, model.config)
    # Without spans the log-probs of all tokens are computed.
    batch = Batch(
        batch.tokens, batch.positions, batch.segment_ids, batch.num_micro_batches
    )
    return {
        t: jax.jit(functools.partial(packed_log_probs, model, t))(params, batch)
        for t in sorted(temperatures)
    }


def compare_tokens(
    differences: Differences,
    name: str,
    arrays: Mapping[str, np.ndarray],
    log_probs: dict[float, jax.Array],
    start: int,
    length: int,
) -> None:
    """Compares log-probs of a sequence, at each temperature that the arrays have.

    Args:
      differences: of all comparisons.
      name: of the arrays, without the temperature.
      arrays: log-probs of the reference, without the first token of a sequence.
      log_probs: ours, [M, B, T] at each temperature.
      start: index of the sequence's first token in the flattened log-probs.
      length: tokens of the sequence.
    """
    for temperature, values in log_probs.items():
        key = f"{name}/T{temperature:g}"
        if key not in arrays:
            continue
        shared = min(len(arrays[key]) + 1, length)  # one may go on after the turn
        ours = np.asarray(values).reshape(-1)[start + 1 : start + shared]
        what = name.rpartition("/")[2]
        differences.close(what, key, ours, arrays[key][: shared - 1], TOKEN_ATOL, 0.0)


def rewards_by_config(
    configs: dict[str, Any],
    batch: Batch,
    teacher: dict[float, jax.Array],
    student: dict[float, jax.Array],
) -> Iterator[tuple[str, Reward]]:
    """The reward of all cases in every configuration."""
    for name, entry in configs.items():
        config = reward_config(entry["reward"])
        teacher_temperature, student_temperature = temperatures_of(entry)
        of_student = batch.students[0]._replace(log_probs=student[student_temperature])
        filled = batch._replace(
            log_probs=teacher[teacher_temperature], students=(of_student,)
        )
        compute = functools.partial(ensemble_reward, config, EnsembleConfig())
        yield name, jax.device_get(jax.jit(compute)(filled))


def pack_cases(made: Sequence[tuple[Example, Example, bool]]) -> Batch:
    """The teacher's batch of all cases, with that of the student."""
    students, teachers, closed = zip(*made, strict=True)
    longest = max(len(one.tokens) for one in (*students, *teachers))
    shape = RowShape(4, -(-longest // 512) * 512)
    return rows.pack_examples(shape, teachers, [students], np.array(closed))


def check(folder: Path) -> Differences:
    """Runs every comparison of a folder."""
    with (folder / "cases.jsonl").open(encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    configs = json.loads((folder / "configs.json").read_text(encoding="utf-8"))
    with np.load(folder / "arrays.npz") as stored:
        arrays = dict(stored)
    tokenizer = load_tokenizer(folder.parent / "tokenizer")
    differences = Differences()
    made = [make_examples(tokenizer, case["inputs"]) for case in cases]
    batch = pack_cases(made)
    of_student = batch.students[0]
    temperatures = {t for config in configs.values() for t in temperatures_of(config)}
    student, teacher = (
        log_probs_by_temperature(folder.parent / role, one, temperatures)
        for role, one in (("student", of_student), ("teacher", batch))
    )
    for n, (case, (in_student, in_teacher, _)) in enumerate(
        zip(cases, made, strict=True)
    ):
        compare_sequences(differences, case, arrays, in_student, in_teacher)
        if case["class"] != "numbers":
            continue
        for role, example, log_probs, spans in (
            ("student", in_student, student, of_student.explanation),
            ("teacher", in_teacher, teacher, of_student.policy_explanation),
        ):
            start = int(spans.start[n]) - example.explanation.start
            name, length = f"{case['id']}/{role}_lp", len(example.tokens)
            compare_tokens(differences, name, arrays, log_probs, start, length)
    for name, reward in rewards_by_config(configs, batch, teacher, student):
        teacher_term = configs[name]["reward"]["include_teacher_think_entropy"]
        for n, case in enumerate(cases):
            numbers = expected_numbers(case, name, teacher_term)
            if numbers is not None:
                compare_reward(differences, f"{case['id']}/{name}", numbers, reward, n)
    return differences


def main(argv: list[str]) -> int:
    """Prints the comparison; 1 if anything is off."""
    if len(argv) != 2:
        print(__doc__)
        return 2
    differences = check(Path(argv[1]))
    for what, worst in differences.worst.items():
        print(f"{what:24} {differences.count[what]:6} compared, worst {worst:.3g}")
    for line in differences.off:
        print(f"OFF {line}")
    print(f"{len(differences.off)} off")
    return 1 if differences.off else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
