"""The RLT reward: by hand, and from packed sequences against plain NumPy."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import pytest

from rlt_jax.data.examples import Renderer
from rlt_jax.data.rows import RowShape, make_spans, pack
from rlt_jax.data.templates import Template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.inference.log_probs import packed_log_probs
from rlt_jax.inference.sampler import decode
from rlt_jax.inference.spans import mask
from rlt_jax.models.transformer import Transformer
from rlt_jax.records import Problem
from rlt_jax.rl.rlt_reward import (
    MAPS,
    REDUCTIONS,
    EnsembleConfig,
    RLTRewardConfig,
    balanced_kl_coef,
    combine,
    ensemble_reward,
)
from rlt_jax.types import Batch, Params, Request, Reward, Rollout, Spans

WIDTH = 6
SOLUTION = [-4.0, -1.0, -3.0, -2.0]
# Of SOLUTION, each by hand.
REDUCED = {
    "mean": -2.5,
    "min": -4.0,
    "max": -1.0,
    "median": -3.0,  # the lower of -3 and -2
    "first_quartile": -3.25,
    "last_quartile": -1.75,
    "sum": -10.0,
}


def spans_of(examples: list[tuple[int, list[int]]]) -> Spans:
    """Spans from the index of the first token and the segments of each completion."""
    starts = np.array([start for start, _ in examples])
    return make_spans(starts, [np.array(ids, int) for _, ids in examples], WIDTH)


class Case:
    """Completions made of the log-probs of their tokens, one after the other."""

    def __init__(self) -> None:
        self.student: list[float] = []
        self.teacher: list[float] = []
        self.spans: dict[str, list] = {"student": [], "teacher": [], "solution": []}
        self.closed: list[bool] = []

    def add(
        self,
        student: list[float],
        teacher: list[float],
        solution: list[float],
        closed: bool = True,
        student_segments: list[int] | None = None,
        teacher_segments: list[int] | None = None,
    ) -> "Case":
        if student_segments is None:
            student_segments = list(range(len(student)))
        if teacher_segments is None:
            teacher_segments = list(range(len(teacher)))
        self.spans["student"].append((len(self.student), student_segments))
        self.spans["teacher"].append((len(self.teacher), teacher_segments))
        self.student += student
        self.spans["solution"].append((len(self.student), list(range(len(solution)))))
        self.student += solution
        self.teacher += teacher
        self.closed.append(closed)
        return self

    def reward(self, **settings: object) -> Reward:
        spans = {name: spans_of(examples) for name, examples in self.spans.items()}

        def packed(values: list[float]) -> np.ndarray:
            # Something to hit for indices outside of the spans.
            return np.array([99.0, *values, 99.0], np.float32)[None, None]

        def shifted(one: Spans) -> Spans:
            return one._replace(start=one.start + 1)

        no_rows = Batch(None, None, None, None)
        student = no_rows._replace(
            explanation=shifted(spans["student"]),
            policy_explanation=shifted(spans["teacher"]),
            solution=shifted(spans["solution"]),
            log_probs=packed(self.student),
        )
        batch = no_rows._replace(
            students=(student,),
            closed=np.array(self.closed),
            log_probs=packed(self.teacher),
        )
        config = RLTRewardConfig(**settings)
        compute = functools.partial(ensemble_reward, config, EnsembleConfig())
        return jax.device_get(jax.jit(compute)(batch))


def close(ours: object, theirs: object) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_published_reward_by_hand() -> None:
    # r_SS = -3.5 + 0.01 * -4; k = 0.5, 1.5 and r_KL = 1 + 0.01 * 1.5.
    case = Case().add([-1.0, -2.0], [-0.5, -0.5], [-3.0, -4.0])
    # The same, not closed. And one of other numbers: k = -0.2, so r_KL = -0.202.
    case.add([-1.0, -2.0], [-0.5, -0.5], [-3.0, -4.0], closed=False)
    case.add([-0.1], [-0.3], [-0.5])
    reward = case.reward()
    close(reward["solution_score"], [-3.54, -3.54, -0.505])
    close(reward["explanation_kl"], [1.015, 1.015, -0.202])
    close(reward["format_penalty"], [0, -1, 0])
    close(reward["value"], [-3.54 - 3.045, -3.54 - 3.045 - 1, -0.505 + 0.606])
    close(reward["solution_mean"], [-3.5, -3.5, -0.5])
    close(reward["solution_min"], [-4, -4, -0.5])
    close(reward["kl_mean"], [1, 1, -0.2])
    close(reward["kl_max"], [1.5, 1.5, -0.2])
    assert not reward["empty_explanation"].any()
    assert not reward["empty_solution"].any()
    assert {term.dtype for term in reward.values()} == {np.dtype(np.float32)}


def test_coefficients_by_hand() -> None:
    case = Case().add([-1.0, -2.0], [-0.5, -0.5], [-3.0, -4.0], closed=False)
    reward = case.reward(
        solution_coef=2.0,
        solution_reductions={"mean": 1.0, "max": 0.5},
        explanation_kl_coef=0.1,
        kl_reductions={"sum": 2.0},
        format_penalty=-7.0,
    )
    close(reward["solution_score"], -3.5 - 1.5)
    close(reward["explanation_kl"], 4.0)
    close(reward["value"], 2 * -5.0 - 0.1 * 4.0 - 7.0)
    used = {"solution_mean", "solution_max", "kl_sum"}
    assert used < set(reward) and "kl_mean" not in reward


@pytest.mark.parametrize("name", REDUCED)
def test_reductions_by_hand(name: str) -> None:
    case = Case().add([0.0] * 4, SOLUTION, SOLUTION)
    reward = case.reward(solution_reductions={name: 1.0}, kl_reductions={name: 1.0})
    close(reward["solution_score"], REDUCED[name])
    close(reward["explanation_kl"], REDUCED[name])


def test_every_reduction_has_its_number_here() -> None:
    assert REDUCED.keys() == REDUCTIONS.keys()


def test_terms_may_be_left_out_altogether() -> None:
    case = Case().add([-1.0], [-0.5], [-3.0], closed=False)
    close(case.reward(solution_reductions={}, kl_reductions={})["value"], -1.0)


@pytest.mark.parametrize(
    ("name", "value"), [("none", -2.0), ("exp", np.exp(-2)), ("exp_norm", 1 - np.e**2)]
)
def test_maps_by_hand(name: str, value: float) -> None:
    assert set(MAPS) == {"none", "exp", "exp_norm"}
    case = Case().add([0.0], [-2.0], [-2.0])
    reward = case.reward(solution_map=name, kl_map=name)
    close(reward["solution_mean"], value)
    close(reward["kl_mean"], value)


def test_clips_act_after_the_map_and_on_one_side() -> None:
    case = Case().add([0.0, 0.0], [-5.0, -1.0], [-5.0, -1.0])
    reward = case.reward(solution_clip=2.0)
    close(reward["solution_mean"], (-2 - 1) / 2)
    close(reward["kl_mean"], -3)
    reward = case.reward(kl_clip=-2.0)
    close(reward["solution_mean"], -3)
    close(reward["kl_mean"], (-5 - 2) / 2)
    # exp(-5) and exp(-1) are in (0, 1): the lower clip is far, the upper one bites.
    reward = case.reward(
        solution_map="exp", solution_clip=2.0, kl_map="exp", kl_clip=0.1
    )
    close(reward["solution_mean"], (np.exp(-5) + np.exp(-1)) / 2)
    close(reward["kl_mean"], (np.exp(-5) + 0.1) / 2)


def test_estimators_by_hand() -> None:
    case = Case().add([-1.0, -1.0], [-1.5, 0.0], [-1.0])
    close(case.reward()["kl_mean"], (-0.5 + 1.0) / 2)
    k3 = [np.exp(0.5) - 1 - 0.5, np.exp(-1.0) - 1 + 1.0]
    close(case.reward(kl_estimator="k3")["kl_mean"], np.mean(k3))


def test_without_the_teacher_the_divergence_is_the_surprise() -> None:
    case = Case().add([-1.0, -3.0], [-0.5, -0.5], [-1.0])
    for estimator in ("k1", "k3"):
        reward = case.reward(kl_teacher_term=False, kl_estimator=estimator)
        close(reward["kl_mean"], 2.0)
        close(reward["kl_max"], 3.0)


def test_a_segment_counts_as_one_token() -> None:
    # Student `ab` `c` `d`, teacher `a` `bc` `d`: segments `abc` and `d`.
    case = Case().add(
        [-1.0, -2.0, -4.0],
        [-0.5, -0.25, -1.0],
        [-1.0],
        student_segments=[0, 0, 1],
        teacher_segments=[0, 0, 1],
    )
    # The student's one token is the teacher's three.
    case.add([-1.0], [-0.5, -0.25, -1.0], [-1.0], teacher_segments=[0, 0, 0])
    reward = case.reward()
    close(reward["kl_mean"], [(2.25 + 3.0) / 2, -0.75])
    close(reward["kl_max"], [3.0, -0.75])


def test_empty_texts_have_a_finite_penalty() -> None:
    full = ([-1.0], [-1.0], [-2.0])
    case = Case().add([], [], [-2.0]).add([-1.0], [-1.0], []).add(*full)
    reward = case.reward()
    close(reward["empty_explanation"], [1, 0, 0])
    close(reward["empty_solution"], [0, 1, 0])
    # Every reduction counts as 1, and as -1 for the solution.
    close(reward["explanation_kl"], [1.01, 0, 0])
    close(reward["solution_score"], [-2.02, -1.01, -2.02])
    close(reward["value"], [-2.02 - 3.03, -1.01, -2.02])
    reward = case.reward(empty_penalty=5.0)
    close(reward["explanation_kl"], [5.05, 0, 0])
    close(reward["solution_score"], [-2.02, -5.05, -2.02])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_no_reduction_of_an_empty_text_is_large(name: str) -> None:
    reward = (
        Case()
        .add([], [], [], closed=False)
        .reward(solution_reductions={name: 1.0}, kl_reductions={name: 1.0})
    )
    empty = 0.0 if name == "sum" else 1.0
    close(reward["solution_score"], -empty)
    close(reward["explanation_kl"], empty)
    close(reward["value"], -empty - 3 * empty - 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"solution_reductions": {"average": 1.0}},
            "'average': 1.0}: keys and values, each one of mean",
        ),
        (
            {"kl_reductions": {"average": 1.0}},
            "'average': 1.0}: keys and values, each one of mean",
        ),
        ({"solution_map": "log"}, "solution_map='log': one of none"),
        ({"kl_map": "log"}, "kl_map='log': one of none"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4': one of k1, k2, k3"),
    ],
)
def test_unknown_names_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RLTRewardConfig(**setting)


def test_students_combined_by_hand() -> None:
    rewards = [
        {"value": np.array([1.0, 4.0]), "kl_mean": np.array([2.0, 0.0])},
        {"value": np.array([3.0, -4.0]), "kl_mean": np.array([8.0, 1.0])},
    ]
    expected = {
        EnsembleConfig(): {"value": [2, 0], "kl_mean": [5, 0.5]},
        EnsembleConfig("min"): {"value": [1, -4], "kl_mean": [2, 0]},
        EnsembleConfig("weights", (3.0, 1.0)): {
            "value": [1.5, 2],
            "kl_mean": [3.5, 0.25],
        },
    }
    for config, values in expected.items():
        combined = combine(config, rewards)
        assert set(combined) == {"value", "kl_mean", "student_0", "student_1"}
        for name, value in values.items():
            close(combined[name], value)
        for i, reward in enumerate(rewards):
            close(combined[f"student_{i}"], reward["value"])
        assert combine(config, rewards[:1]) is rewards[0]


def test_bad_ensembles_are_refused() -> None:
    with pytest.raises(
        UserError, match="EnsembleConfig.combine='sum': one of mean, min"
    ):
        EnsembleConfig("sum")
    with pytest.raises(UserError, match="weights=.*each at least 0"):
        EnsembleConfig("weights", (1.0, -1.0))
    with pytest.raises(UserError, match="weights=.*: not all 0"):
        EnsembleConfig("weights", (0.0, 0))
    with pytest.raises(UserError, match="1 numbers for 2 students"):
        EnsembleConfig("weights", (1.0,)).check(2)


def test_the_balanced_weight() -> None:
    assert balanced_kl_coef([-2.0, -4.0], [0.5, -1.0]) == pytest.approx(4.0)
    with pytest.raises(UserError, match="give a number instead"):
        balanced_kl_coef([-2.0], [0.0])


# Packed sequences: text in, reward out, against NumPy without packing and spans.

LENGTH = 64
TEACHER_TEMPERATURE = 0.9
PROBLEMS = [Problem(f"{n}+1?", f"so {n + 1}") for n in range(6)]
BODIES = ["0+1=1", "it is 2", "", "3+1=4", "plain, it is", "5+1=6 5+1=6"]


class Run(NamedTuple):
    """What `pack` reads of a run."""

    row_shape: RowShape
    renderer: Renderer
    student_renderers: Sequence[Renderer]
    student_limit: int = LENGTH


def rollout_of(tokenizer: Tokenizer, template: Template) -> Rollout:
    closing = template.explanation_tags[1] + tokenizer.end_of_turn
    tokens = [tokenizer.encode(body + closing).ids for body in BODIES]
    tokens[3] = tokenizer.encode(BODIES[3]).ids  # cut off
    spelt = [tokenizer.encode(char).ids for char in BODIES[4]]
    tokens[4] = np.concatenate([*spelt, tokenizer.encode(closing).ids])
    rollout = Rollout(
        requests=[
            Request(np.zeros(1, np.int32), n, LENGTH, problem)
            for n, problem in enumerate(PROBLEMS)
        ],
        tokens=tokens,
        log_probs=[np.zeros(len(ids), np.float32) for ids in tokens],
        finished=np.arange(len(tokens)) != 3,
    )
    return decode(rollout, tokenizer)


def ends_and_sums(
    ids: np.ndarray, log_probs: np.ndarray, tokenizer: Tokenizer, start: int, end: int
) -> dict[int, float]:
    """Character -> log-prob of the text from `start` up to it, where a token ends."""
    result, place, total = {start: 0.0}, 0, 0.0
    for token, log_prob in zip(ids, log_probs, strict=False):
        place += len(tokenizer.decode([token]))
        if start < place <= end:
            total += log_prob
            result[place] = total
    return {place - start: value for place, value in result.items()}


def test_packed_sequences_against_plain_numpy(
    tokenizer: Tokenizer,
    tiny: Template,
    text_model: Transformer,
    teacher_params: Params,
    student_params: Params,
    naive_log_probs: Callable[..., np.ndarray],
) -> None:
    config = RLTRewardConfig()
    rollout = rollout_of(tokenizer, tiny)
    run = Run(
        RowShape(2, LENGTH),
        Renderer(tokenizer, tiny, "teacher"),
        [Renderer(tokenizer, tiny, "student")],
    )
    batch = pack(rollout, run)

    def filled(params: Params, batch: Batch, temperature: float) -> Batch:
        compute = jax.jit(functools.partial(packed_log_probs, text_model, temperature))
        return batch._replace(log_probs=compute(params, batch))

    student = filled(student_params, batch.students[0], config.student_temperature)
    batch = filled(teacher_params, batch, TEACHER_TEMPERATURE)
    batch = batch._replace(students=(student,))
    ours = ensemble_reward(config, EnsembleConfig(), batch)

    def log_probs(params: Params, ids: np.ndarray, temperature: float) -> np.ndarray:
        row = np.pad(ids, (0, LENGTH - len(ids))).astype(np.int32)[None]
        return naive_log_probs(text_model, params, row, temperature)[0]

    for n, (problem, body) in enumerate(zip(PROBLEMS, BODIES, strict=True)):
        opening = f"<|system|>Solve.<|end|><|user|>{problem.question}<|end|>"
        opening += "<|assistant|><|begin_of_thought|>"
        middle = "<|end_of_thought|><|begin_of_solution|>"
        text = f"{opening}{body}{middle}{problem.solution}"
        ids = tokenizer.encode(text + "<|end_of_solution|><|end|>").ids
        values = log_probs(student_params, ids, config.student_temperature)
        start = len(opening)
        by_student = ends_and_sums(ids, values, tokenizer, start, start + len(body))
        start += len(body) + len(middle)
        scores = ends_and_sums(ids, values, tokenizer, start, len(text))
        scores = np.diff([scores[place] for place in sorted(scores)])

        prompt = f"<|system|>Explain.<|end|><|user|>{problem.question}<|end|>"
        prompt += f"<|assistant|><|begin_of_solution|>{problem.solution}"
        prompt += "<|end_of_solution|><|begin_of_explanation|>"
        ids = np.append(tokenizer.encode(prompt).ids, rollout.tokens[n])
        values = log_probs(teacher_params, ids, TEACHER_TEMPERATURE)
        start = len(prompt)
        by_teacher = ends_and_sums(ids, values, tokenizer, start, start + len(body))

        common = sorted(by_student.keys() & by_teacher.keys())
        divergence = np.diff([by_teacher[p] - by_student[p] for p in common])
        kl = divergence.mean() + 0.01 * divergence.max() if body else 1.01
        score = scores.mean() + 0.01 * scores.min()
        closed = n != 3
        np.testing.assert_allclose(ours["solution_score"][n], score, rtol=1e-4)
        np.testing.assert_allclose(ours["explanation_kl"][n], kl, rtol=1e-4, atol=1e-4)
        expected = score - 3 * kl - (not closed)
        np.testing.assert_allclose(ours["value"][n], expected, rtol=1e-4, atol=1e-4)
    # The completion that was spelt out has more tokens, and is aligned up to its end.
    spans = (student.explanation, student.policy_explanation)
    assert mask(spans[0])[4].sum() < mask(spans[1])[4].sum()
    assert spans[0].segment[4].max() == spans[1].segment[4].max() > 0
