"""Advantages and loss weights of the tokens of a batch, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlt_jax.data.rows import make_spans
from rlt_jax.rl.advantages import completion_mask, fill
from rlt_jax.rl.losses import LOSSES, ObjectiveConfig
from rlt_jax.types import Batch


def batch_of(
    shape: tuple[int, int, int], starts: list[int], lengths: list[int]
) -> Batch:
    """A batch of finished completions, with nothing but what `fill` reads."""
    spans = make_spans(np.array(starts), [np.arange(n) for n in lengths], max(lengths))
    return Batch(
        tokens=jnp.zeros(shape, jnp.int32),
        positions=None,
        segment_ids=None,
        num_micro_batches=None,
        completion=spans,
        finished=jnp.ones(len(lengths), bool),
    )


# Completions of 2, 1 and 0 tokens in one row of 6.
SMALL = batch_of((1, 1, 6), [1, 4, 0], [2, 1, 0])
REWARDS = jnp.array([1.0, 2.0, 6.0])


@pytest.mark.parametrize(
    ("loss", "two", "one"),
    [
        ("grpo", 1 / 6, 1 / 3),  # mean over tokens, over 3 completions
        ("gspo", 1 / 6, 1 / 3),
        ("dapo", 1 / 3, 1 / 3),  # 3 tokens in all
        ("dr_grpo", 1 / 30, 1 / 30),  # 3 completions of at most 10 tokens
    ],
)
def test_weights_by_hand(loss: str, two: float, one: float) -> None:
    filled = fill(ObjectiveConfig(loss=loss), 3, 10, SMALL, REWARDS)
    expected = [[[0, two, two, 0, one, 0]]]
    np.testing.assert_allclose(filled.loss_weights, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "two"),
    # DAPO's mean is over the tokens that are left; the others divide as before.
    [("grpo", 1 / 6), ("gspo", 1 / 6), ("dapo", 1 / 2), ("dr_grpo", 1 / 30)],
)
def test_masked_completions_weigh_nothing(loss: str, two: float) -> None:
    batch = SMALL._replace(finished=jnp.array([True, False, True]))
    objective = ObjectiveConfig(loss=loss, truncated="mask")
    filled = fill(objective, 3, 10, batch, REWARDS)
    expected = [[[0, two, two, 0, 0, 0]]]
    np.testing.assert_allclose(filled.loss_weights, expected, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_are_finite_where_everything_is_masked(loss: str) -> None:
    batch = SMALL._replace(finished=jnp.zeros(3, bool))
    objective = ObjectiveConfig(loss=loss, truncated="mask")
    filled = fill(objective, 3, 10, batch, REWARDS)
    np.testing.assert_array_equal(filled.loss_weights, 0.0)
    assert np.isfinite(filled.advantages).all()


# Three groups of two in two micro-batches of one row each:
#   prompt, 2 tokens, prompt, 1 token, prompt, 3 tokens
#   prompt, 2 tokens, prompt, 1 token, prompt, 4 tokens
# The rewards of the second group are equal, the last completion was cut off.
LENGTHS = [2, 1, 3, 2, 1, 4]
STARTS = [1, 4, 6, 11, 14, 16]
GROUPS = batch_of((2, 1, 10), STARTS, LENGTHS)._replace(
    finished=jnp.array([True, True, True, True, True, False])
)
GROUP_REWARDS = jnp.array([1.0, 3.0, 2.0, 2.0, 0.0, 4.0])


def on_tokens(values: list[float]) -> np.ndarray:
    """The value of each completion on its tokens."""
    flat = np.zeros(20)
    for start, length, value in zip(STARTS, LENGTHS, values, strict=True):
        flat[start : start + length] = value
    return flat.reshape(2, 1, 10)


# Means 2, 2 and 2. Stds sqrt(2), 0 and sqrt(8), to which 1e-4 is added.
GROUP = [-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), 0.0, 0.0]
GROUP += [-2 / (8**0.5 + 1e-4), 2 / (8**0.5 + 1e-4)]
CENTRED = [-1.0, 1.0, 0.0, 0.0, -2.0, 2.0]


@pytest.mark.parametrize(
    ("loss", "advantage", "advantages", "weights"),
    [
        # 1 / (length * 6 completions)
        ("grpo", "group", GROUP, [1 / 12, 1 / 6, 0, 0, 1 / 6, 0]),
        ("gspo", "group", GROUP, [1 / 12, 1 / 6, 0, 0, 1 / 6, 0]),
        # 1 / (8 tokens * 6 completions)
        ("dr_grpo", "centred", CENTRED, [1 / 48, 1 / 48, 0, 0, 1 / 48, 0]),
        # 4 tokens are left: 2 + 1 + 1
        ("dapo", "group", GROUP, [1 / 4, 1 / 4, 0, 0, 1 / 4, 0]),
    ],
)
def test_cut_off_completions_and_equal_groups_by_hand(
    loss: str, advantage: str, advantages: list[float], weights: list[float]
) -> None:
    objective = ObjectiveConfig(
        loss=loss, advantage=advantage, truncated="mask", skip_equal_groups=True
    )
    filled = fill(objective, 2, 8, GROUPS, GROUP_REWARDS)
    # The completion that was cut off is in the baseline of its group all the same.
    expected = {
        "advantages": on_tokens(advantages),
        "inverse_length": on_tokens([1 / n for n in LENGTHS]),
        "loss_weights": on_tokens(weights),
    }
    for name, values in expected.items():
        ours = getattr(filled, name)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, values, rtol=1e-6, err_msg=name)
    # Everything else is as it was.
    assert filled._replace(**dict.fromkeys(expected)) == GROUPS


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"truncated": "mask"}, [1, 0, 1, 0]),
        ({"skip_equal_groups": True}, [0, 0, 1, 1]),
        ({"truncated": "mask", "skip_equal_groups": True}, [0, 0, 1, 0]),
    ],
)
def test_which_completions_have_a_gradient(settings: dict, expected: list[int]) -> None:
    rewards = jnp.array([0.5, 0.5, 0.5, 0.6])
    finished = jnp.array([True, False, True, False])
    kept = completion_mask(ObjectiveConfig(**settings), rewards, finished, 2)
    np.testing.assert_array_equal(kept, np.array(expected, bool))
