"""Advantages of a teacher, by hand and against the definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.data.rows import make_spans
from rlt_jax.errors import UserError
from rlt_jax.rl.teaching import TeachingConfig, mix_advantages, token_advantages
from rlt_jax.settings import build
from rlt_jax.types import Batch

WIDTH = 8


def batches(
    student: list[list[float]],
    teacher: list[list[float]],
    segments: tuple[list[list[int]], list[list[int]]] | None = None,
) -> tuple[Batch, Batch]:
    """One attempt a row after a prompt of a token; segments of student and teacher."""

    def rows(values: list[list[float]], first: int) -> np.ndarray:
        made = np.zeros((1, len(values), WIDTH), np.float32)
        for n, row in enumerate(values):
            made[0, n, first : first + len(row)] = row
        return made

    def spans(values: list[list[float]], ids: list[list[int]], first: int) -> Any:
        starts = np.arange(len(values)) * WIDTH + first
        return make_spans(starts, [np.array(one, int) for one in ids], WIDTH)

    own, told = segments or [[list(range(len(x))) for x in y] for y in (student,) * 2]
    log_probs, others = rows(student, 1), rows(teacher, 2)
    tokens = np.zeros(log_probs.shape, np.int32)
    batch = Batch(tokens, tokens, tokens, np.int32(1), log_probs=log_probs)
    return batch, batch._replace(
        log_probs=others,
        explanation=spans(teacher, told, 2),
        policy_explanation=spans(student, own, 1),
    )


def taught(config: TeachingConfig, group_size: int, *args: Any) -> tuple[Any, Any]:
    """Advantages of the tokens after each prompt, and terms."""
    found, terms = token_advantages(config, group_size, *batches(*args))
    assert not found[0, :, 0].any()
    return found[0, :, 1:], {name: list(map(float, x)) for name, x in terms.items()}


def test_the_log_ratio_of_each_token() -> None:
    student, teacher = [[-1.0, -2.0, -3.0]], [[-0.5, -2.5, -1.0]]
    found, terms = taught(TeachingConfig(), 1, student, teacher)
    np.testing.assert_allclose(found[0], [0.5, -0.5, 2.0, 0, 0, 0, 0])
    assert terms["teacher_log_ratio"] == pytest.approx([2 / 3])
    assert terms["taught_fraction"] == [1.0] and terms["clipped_fraction"] == [0.0]


def test_clip_and_mask() -> None:
    student, teacher = [[-1.0, -2.0, -3.0]], [[-0.5, -2.5, -1.0]]
    found, terms = taught(TeachingConfig(clip=0.4), 1, student, teacher)
    np.testing.assert_allclose(found[0, :3], [0.4, -0.4, 0.4])
    assert terms["clipped_fraction"] == [1.0]
    found, terms = taught(TeachingConfig(mask_above=1.0), 1, student, teacher)
    np.testing.assert_allclose(found[0, :3], [0.5, -0.5, 0.0])
    assert terms["taught_fraction"] == pytest.approx([2 / 3])


def test_the_mean_of_the_group_is_the_baseline() -> None:
    student = [[-1.0, -1.0], [-1.0], [-1.0], [-1.0]]
    teacher = [[-0.5, -0.1], [-1.2], [-3.0], [-2.0]]
    found, _ = taught(TeachingConfig(baseline="group"), 2, student, teacher)
    mean = (0.5 + 0.9 - 0.2) / 3
    np.testing.assert_allclose(found[0, :2], [0.5 - mean, 0.9 - mean], rtol=1e-6)
    np.testing.assert_allclose(found[1, :1], [-0.2 - mean], rtol=1e-5)
    np.testing.assert_allclose(found[2:, 0], [-0.5, 0.5])
    assert not found[1:, 1:].any()


def test_tokens_of_a_segment_share_its_log_ratio() -> None:
    """The student has |3|+4|, the teacher |3+|4|, and both |=|."""
    student, teacher = [[-1.0, -2.0, -0.5]], [[-0.25, -0.5, -0.75]]
    segments = [[0, 0, 1]], [[0, 0, 1]]
    found, terms = taught(TeachingConfig(), 1, student, teacher, segments)
    np.testing.assert_allclose(found[0, :4], [2.25, 2.25, -0.25, 0])
    assert terms["teacher_log_ratio"] == pytest.approx([1.0])


def test_another_tokenizer_that_splits_alike_changes_nothing() -> None:
    student, teacher = [[-1.0, -2.0, -3.0]], [[-0.5, -2.5, -1.0]]
    plain, _ = taught(TeachingConfig(), 1, student, teacher)
    segments = [[0, 1, 2]], [[0, 1, 2]]
    found, _ = taught(TeachingConfig(), 1, student, teacher, segments)
    np.testing.assert_array_equal(found, plain)


def test_a_teacher_like_the_student_teaches_nothing() -> None:
    student = [[-1.0, -2.0], [-3.0]]
    found, terms = taught(TeachingConfig(baseline="group"), 2, student, student)
    assert not found.any()
    assert terms["teacher_log_ratio"] == [0.0, 0.0]


def test_an_attempt_that_the_teacher_cannot_judge_is_not_taught() -> None:
    student, teacher = [[-1.0, -2.0], [-1.0]], [[-0.5, -1.0], []]
    segments = [[0, 1], []], [[0, 1], []]
    found, terms = taught(TeachingConfig(), 2, student, teacher, segments)
    assert not found[1].any()
    assert terms["teacher_log_ratio"][0] == 0.75


def test_the_expected_gradient_is_that_of_the_reverse_kl() -> None:
    """Over all tokens, p_S (log p_T - log p_S) d log p_S is -d KL(S || T), in float64."""
    rng = np.random.default_rng(0)
    scores, teacher = rng.normal(size=(2, 9))
    with jax.enable_x64(True):
        log_t = jax.nn.log_softmax(jnp.asarray(teacher))

        def reverse_kl(scores: Any) -> Any:
            log_s = jax.nn.log_softmax(scores)
            return (jnp.exp(log_s) * (log_s - log_t)).sum()

        log_s, pull = jax.vjp(jax.nn.log_softmax, jnp.asarray(scores))
        sampled = [[float(x)] for x in log_s]
        told = [[float(x)] for x in log_t]
        found, _ = taught(TeachingConfig(), 1, sampled, told)
        (gradient,) = pull(jnp.exp(log_s) * jnp.asarray(found[:, 0], jnp.float64))
        expected = -jax.grad(reverse_kl)(jnp.asarray(scores))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_rewards_and_teaching_are_mixed_by_their_weights() -> None:
    batch, _ = batches([[-1.0]], [[-1.0]])
    ones = jnp.ones(batch.tokens.shape)
    batch = batch._replace(advantages=2 * ones, taught=3 * ones)
    config = TeachingConfig(weight=0.5, reward_weight=0.25)
    np.testing.assert_allclose(mix_advantages(config, batch).advantages, 2.0)
    config = TeachingConfig(kind="forward", reward_weight=0.25)
    np.testing.assert_allclose(mix_advantages(config, batch).advantages, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "teaching.weight=0.0: at least 1e-06, at most 1000000"),
        ({"weight": None}, "teaching.weight=None: a number, at least 1e-06"),
        ({"weight": float("nan")}, "teaching.weight=nan: at least 1e-06"),
        ({"reward_weight": -1.0}, "teaching.reward_weight=-1.0: at least 0"),
        ({"sync_alpha": 0.0}, "teaching.sync_alpha=0.0: at least 1e-06, at most 1"),
        ({"sync_every": 1.5}, "teaching.sync_every=1.5: a whole number, at least 0"),
        (
            {"own_samples": 2.0, "traces": "x"},
            "teaching.own_samples=2.0: at least 0, at most 1",
        ),
        ({"own_samples": 0.5}, "a fraction below 1 needs traces"),
        ({"traces": "x"}, "a fraction below 1 needs traces"),
        ({"own_samples": 0.5, "traces": "x"}, "a divergence as teaching.kind"),
        ({"clip": "abc"}, "teaching.clip='abc': a number, at least 1e-06"),
        (
            {"clip": -1.0},
            "teaching.clip=-1.0: at least 1e-06, at most 1000000, or None",
        ),
        ({"mask_above": 0.0}, "teaching.mask_above=0.0: at least 1e-06"),
        ({"mixture": 1.0}, "teaching.mixture=1.0: at least 1e-06, at most 0.99"),
        ({"top_k": 0}, "teaching.top_k=0: at least 1, or None"),
        ({"top_k": 2.5}, "teaching.top_k=2.5: a whole number, at least 1"),
        ({"kind": "backward"}, "teaching.kind='backward'"),
        (
            {"prompt": "teacher", "sees": "nothing"},
            "is for teaching.prompt='privileged'",
        ),
        ({"sees": "explanation"}, "needs a file of them"),
        ({"explanations": "x.jsonl"}, "needs a file of them, and only it"),
        ({"kind": "reverse", "baseline": "group"}, "are for 'advantage'"),
        ({"kind": "reverse", "mask_above": 1.0}, "are for 'advantage'"),
        ({"sees": "answer"}, "teaching.sees"),
        ({"prompt": "chat"}, "teaching.prompt"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(TeachingConfig, settings, "teaching")
