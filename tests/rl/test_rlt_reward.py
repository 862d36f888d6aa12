"""The reward: by hand, and from real rows against plain NumPy."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from rlt_jax.data.scoring import RowShape, scoring_batch
from rlt_jax.inference.scoring import score_rows

from rlt_jax.data.templates import Problem, Template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl.rlt_reward import (
    MAPS,
    REDUCTIONS,
    RLTRewardConfig,
    reward_tokens,
    rlt_reward,
)
from rlt_jax.types import Params, Reward, ScoringBatch, TokenSpans

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


def spans_of(rows: list[tuple[int, list[int]]]) -> TokenSpans:
    """First index and segments of the span of each completion."""
    shape = (len(rows), WIDTH)
    index, segment = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, bool)
    for n, (start, segments) in enumerate(rows):
        index[n, : len(segments)] = start + np.arange(len(segments))
        segment[n, : len(segments)] = segments
        mask[n, : len(segments)] = True
    return TokenSpans(index, segment, mask)


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
        spans = {name: spans_of(rows) for name, rows in self.spans.items()}
        batch = ScoringBatch(
            student=None,
            teacher=None,
            student_explanation=spans["student"],
            teacher_explanation=spans["teacher"],
            student_solution=spans["solution"],
            completion=None,
            closed=np.array(self.closed),
        )

        def packed(values: list[float]) -> np.ndarray:
            # Something to hit for indices outside of the masks.
            return np.array([*values, 99.0], np.float32)[None, None]

        config = RLTRewardConfig(**settings)
        reward = jax.jit(
            lambda s, t, b: rlt_reward(config, reward_tokens(config, s, t, b), b.closed)
        )
        return jax.device_get(reward(packed(self.student), packed(self.teacher), batch))


def close(ours: object, theirs: object) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_published_reward_by_hand() -> None:
    # r_SS = -3.5 + 0.01 * -4; k = 0.5, 1.5 and r_KL = 1 + 0.01 * 1.5.
    case = Case().add([-1.0, -2.0], [-0.5, -0.5], [-3.0, -4.0])
    # The same, not closed. And one of other numbers: k = -0.2, so r_KL = -0.202.
    case.add([-1.0, -2.0], [-0.5, -0.5], [-3.0, -4.0], closed=False)
    case.add([-0.1], [-0.3], [-0.5])
    reward = case.reward()
    close(reward.terms["solution_score"], [-3.54, -3.54, -0.505])
    close(reward.terms["explanation_kl"], [1.015, 1.015, -0.202])
    close(reward.terms["format_penalty"], [0, -1, 0])
    close(reward.value, [-3.54 - 3.045, -3.54 - 3.045 - 1, -0.505 + 0.606])
    close(reward.terms["solution_mean"], [-3.5, -3.5, -0.5])
    close(reward.terms["solution_min"], [-4, -4, -0.5])
    close(reward.terms["kl_mean"], [1, 1, -0.2])
    close(reward.terms["kl_max"], [1.5, 1.5, -0.2])
    assert not reward.terms["empty_explanation"].any()
    assert not reward.terms["empty_solution"].any()
    assert {term.dtype for term in reward.terms.values()} == {np.dtype(np.float32)}


def test_coefficients_by_hand() -> None:
    case = Case().add([-1.0, -2.0], [-0.5, -0.5], [-3.0, -4.0], closed=False)
    reward = case.reward(
        solution_coef=2.0,
        solution_reductions={"mean": 1.0, "max": 0.5},
        explanation_kl_coef=0.1,
        kl_reductions={"sum": 2.0},
        format_penalty=-7.0,
    )
    close(reward.terms["solution_score"], -3.5 - 1.5)
    close(reward.terms["explanation_kl"], 4.0)
    close(reward.value, 2 * -5.0 - 0.1 * 4.0 - 7.0)
    used = {"solution_mean", "solution_max", "kl_sum"}
    assert used < set(reward.terms) and "kl_mean" not in reward.terms


@pytest.mark.parametrize("name", REDUCED)
def test_reductions_by_hand(name: str) -> None:
    case = Case().add([0.0] * 4, SOLUTION, SOLUTION)
    reward = case.reward(solution_reductions={name: 1.0}, kl_reductions={name: 1.0})
    close(reward.terms["solution_score"], REDUCED[name])
    close(reward.terms["explanation_kl"], REDUCED[name])


def test_every_reduction_has_its_number_here() -> None:
    assert REDUCED.keys() == REDUCTIONS.keys()


def test_terms_may_be_left_out_altogether() -> None:
    case = Case().add([-1.0], [-0.5], [-3.0], closed=False)
    close(case.reward(solution_reductions={}, kl_reductions={}).value, -1.0)


@pytest.mark.parametrize(
    ("name", "value"), [("none", -2.0), ("exp", np.exp(-2)), ("exp_norm", 1 - np.e**2)]
)
def test_maps_by_hand(name: str, value: float) -> None:
    assert set(MAPS) == {"none", "exp", "exp_norm"}
    case = Case().add([0.0], [-2.0], [-2.0])
    reward = case.reward(solution_map=name, kl_map=name)
    close(reward.terms["solution_mean"], value)
    close(reward.terms["kl_mean"], value)


def test_clips_act_after_the_map_and_on_one_side() -> None:
    case = Case().add([0.0, 0.0], [-5.0, -1.0], [-5.0, -1.0])
    reward = case.reward(solution_clip=2.0)
    close(reward.terms["solution_mean"], (-2 - 1) / 2)
    close(reward.terms["kl_mean"], -3)
    reward = case.reward(kl_clip=-2.0)
    close(reward.terms["solution_mean"], -3)
    close(reward.terms["kl_mean"], (-5 - 2) / 2)
    # exp(-5) and exp(-1) are in (0, 1): the lower clip is far, the upper one bites.
    reward = case.reward(
        solution_map="exp", solution_clip=2.0, kl_map="exp", kl_clip=0.1
    )
    close(reward.terms["solution_mean"], (np.exp(-5) + np.exp(-1)) / 2)
    close(reward.terms["kl_mean"], (np.exp(-5) + 0.1) / 2)


def test_estimators_by_hand() -> None:
    case = Case().add([-1.0, -1.0], [-1.5, 0.0], [-1.0])
    close(case.reward().terms["kl_mean"], (-0.5 + 1.0) / 2)
    k3 = [np.exp(0.5) - 1 - 0.5, np.exp(-1.0) - 1 + 1.0]
    close(case.reward(kl_estimator="k3").terms["kl_mean"], np.mean(k3))


def test_without_the_teacher_the_divergence_is_the_surprise() -> None:
    case = Case().add([-1.0, -3.0], [-0.5, -0.5], [-1.0])
    for estimator in ("k1", "k3"):
        reward = case.reward(kl_teacher_term=False, kl_estimator=estimator)
        close(reward.terms["kl_mean"], 2.0)
        close(reward.terms["kl_max"], 3.0)


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
    close(reward.terms["kl_mean"], [(2.25 + 3.0) / 2, -0.75])
    close(reward.terms["kl_max"], [3.0, -0.75])


def test_empty_texts_have_a_finite_penalty() -> None:
    full = ([-1.0], [-1.0], [-2.0])
    case = Case().add([], [], [-2.0]).add([-1.0], [-1.0], []).add(*full)
    reward = case.reward()
    close(reward.terms["empty_explanation"], [1, 0, 0])
    close(reward.terms["empty_solution"], [0, 1, 0])
    # Every reduction counts as 1, and as -1 for the solution.
    close(reward.terms["explanation_kl"], [1.01, 0, 0])
    close(reward.terms["solution_score"], [-2.02, -1.01, -2.02])
    close(reward.value, [-2.02 - 3.03, -1.01, -2.02])
    reward = case.reward(empty_penalty=5.0)
    close(reward.terms["explanation_kl"], [5.05, 0, 0])
    close(reward.terms["solution_score"], [-2.02, -5.05, -2.02])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_no_reduction_of_an_empty_text_is_large(name: str) -> None:
    reward = (
        Case()
        .add([], [], [], closed=False)
        .reward(solution_reductions={name: 1.0}, kl_reductions={name: 1.0})
    )
    empty = 0.0 if name == "sum" else 1.0
    close(reward.terms["solution_score"], -empty)
    close(reward.terms["explanation_kl"], empty)
    close(reward.value, -empty - 3 * empty - 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"solution_reductions": {"average": 1.0}}, "'average': one of mean"),
        ({"kl_reductions": {"average": 1.0}}, "'average': one of mean"),
        ({"solution_map": "log"}, "solution_map='log': one of none"),
        ({"kl_map": "log"}, "kl_map='log': one of none"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4': one of k1, k2, k3"),
    ],
)
def test_unknown_names_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RLTRewardConfig(**setting)


# Real rows: text in, reward out, against NumPy that knows neither packing nor spans.

LENGTH = 64
TEACHER_TEMPERATURE = 0.9
PROBLEMS = [Problem(f"{n}+1?", f"so {n + 1}") for n in range(6)]
BODIES = ["0+1=1", "it is 2", "", "3+1=4", "plain, it is", "5+1=6 5+1=6"]


def completions_of(tokenizer: Tokenizer, template: Template) -> list[np.ndarray]:
    closing = template.explanation_tags[1] + tokenizer.eos
    completions = [tokenizer.encode(body + closing).ids for body in BODIES]
    completions[3] = tokenizer.encode(BODIES[3]).ids  # cut off
    spelt = [tokenizer.encode(char).ids for char in BODIES[4]]
    completions[4] = np.concatenate([*spelt, tokenizer.encode(closing).ids])
    return completions


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


def test_real_rows_against_plain_numpy(
    tokenizer: Tokenizer,
    tiny: Template,
    text_model: Transformer,
    teacher_params: Params,
    student_params: Params,
    naive_log_probs: Callable[..., np.ndarray],
) -> None:
    config = RLTRewardConfig()
    completions = completions_of(tokenizer, tiny)
    batch, _ = scoring_batch(
        tokenizer, tokenizer, tiny, RowShape(2, LENGTH), PROBLEMS, completions
    )
    temperatures = (config.student_temperature, TEACHER_TEMPERATURE)
    student, teacher = (
        jax.jit(lambda p, rows, t=t: score_rows(text_model, t, p, rows))(params, rows)
        for t, params, rows in zip(
            temperatures,
            (student_params, teacher_params),
            (batch.student, batch.teacher),
            strict=True,
        )
    )
    ours = rlt_reward(
        config, reward_tokens(config, student, teacher, batch), batch.closed
    )

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
        ids = np.append(tokenizer.encode(prompt).ids, completions[n])
        values = log_probs(teacher_params, ids, TEACHER_TEMPERATURE)
        start = len(prompt)
        by_teacher = ends_and_sums(ids, values, tokenizer, start, start + len(body))

        common = sorted(by_student.keys() & by_teacher.keys())
        divergence = np.diff([by_teacher[p] - by_student[p] for p in common])
        kl = divergence.mean() + 0.01 * divergence.max() if body else 1.01
        score = scores.mean() + 0.01 * scores.min()
        closed = n != 3
        np.testing.assert_allclose(ours.terms["solution_score"][n], score, rtol=1e-4)
        np.testing.assert_allclose(
            ours.terms["explanation_kl"][n], kl, rtol=1e-4, atol=1e-4
        )
        expected = score - 3 * kl - (not closed)
        np.testing.assert_allclose(ours.value[n], expected, rtol=1e-4, atol=1e-4)
    # The spelt-out completion is longer in tokens, and still aligned to the end.
    spans = (batch.student_explanation, batch.teacher_explanation)
    assert spans[0].mask[4].sum() < spans[1].mask[4].sum()
    assert spans[0].segment[4].max() == spans[1].segment[4].max() > 0
