"""One GRPO step against numbers of the reference implementation."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from rlt_jax.data.rows import RowShape, make_spans, pack_sequences
from rlt_jax.inference.head import token_log_probs
from rlt_jax.inference.log_probs import packed_log_probs
from rlt_jax.inference.spans import gather
from rlt_jax.models.convert import read_config, read_params, write_model
from rlt_jax.models.transformer import Transformer
from rlt_jax.rl import advantages
from rlt_jax.rl.baselines import group_advantages
from rlt_jax.rl.losses import ObjectiveConfig, policy_loss
from rlt_jax.training import learner
from rlt_jax.types import Batch, Params, TrainState

TX = optax.trace(decay=0.0)  # keeps the gradient
TOKEN_ATOL = 5e-4


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="module")
def numbers(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "public" / "grpo.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "public" / "grpo.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def model(golden: Path) -> Transformer:
    return Transformer(read_config(golden / "teacher"))


@pytest.fixture(scope="module")
def policy(golden: Path, model: Transformer) -> Params:
    return read_params(golden / "teacher", model.config)


@pytest.fixture(scope="module")
def reference(golden: Path, model: Transformer) -> Params:
    return read_params(golden / "reference", model.config)


Step = Callable[..., tuple[Batch, TrainState, dict[str, Any]]]


@pytest.fixture(scope="module")
def step(
    model: Transformer,
    policy: Params,
    reference: Params,
    numbers: dict[str, Any],
    arrays: dict[str, np.ndarray],
) -> Step:
    def step(name: str, lengths: np.ndarray) -> Any:
        """Our step on a set, with the first so many tokens of each completion."""
        expected = numbers["loss_sets"][name]
        of = {key: arrays[f"{name}/{key}"] for key in ("prompt_ids", "completion_ids")}
        prompts = [
            ids[mask > 0]
            for ids, mask in zip(
                of["prompt_ids"], arrays[f"{name}/prompt_mask"], strict=True
            )
        ]
        sequences = [
            np.concatenate([prompt, ids[:n]])
            for prompt, ids, n in zip(
                prompts, of["completion_ids"], lengths, strict=True
            )
        ]
        batch, starts = pack_sequences(sequences, RowShape(2, 512))
        spans = make_spans(
            starts + np.array([len(prompt) for prompt in prompts]),
            [np.arange(n) for n in lengths],
            max(lengths),
        )
        batch = batch._replace(completion=spans, finished=np.ones(len(lengths), bool))
        temperature = expected["temperature"]
        log_probs = jax.jit(functools.partial(packed_log_probs, model, temperature))
        batch = batch._replace(
            log_probs=log_probs(policy, batch),
            ref_log_probs=log_probs(reference, batch),
        )
        objective = ObjectiveConfig(beta=expected["beta"])
        rewards = jnp.array(expected["rewards"], jnp.float32)
        group_size, longest = expected["num_generations"], int(max(lengths))
        batch = advantages.fill(objective, group_size, longest, batch, rewards)
        loss = policy_loss(objective, temperature, len(lengths))
        update = functools.partial(learner.update, loss, model, TX, None)
        state = TrainState(jnp.int32(0), policy, TX.init(policy), jnp.int32(0))
        return batch, *jax.jit(update)(state, batch)

    return step


@pytest.mark.parametrize("name", ["A", "B_T1_pad_without_eos", "C_micro2"])
def test_log_probs_loss_and_gradient(
    step: Step,
    model: Transformer,
    numbers: dict[str, Any],
    arrays: dict[str, np.ndarray],
    tmp_path: Path,
    name: str,
) -> None:
    # Here a completion is as long as the reference counts it, padding and all.
    expected, mask = numbers["loss_sets"][name], arrays[f"{name}/completion_mask"] > 0
    batch, state, metrics = step(name, mask.sum(-1))
    # The advantage of a completion is on each of its tokens, so on the first too.
    of_tokens = gather(batch.advantages, batch.completion)
    np.testing.assert_allclose(of_tokens[:, 0], expected["advantages"], atol=1e-6)
    for ours, key in (
        (batch.log_probs, "policy"),
        (batch.ref_log_probs, "ref"),
    ):
        log_probs = gather(ours, batch.completion)
        theirs = np.where(mask, arrays[f"{name}/{key}_logps"], 0)[
            :, : mask.sum(-1).max()
        ]
        np.testing.assert_allclose(log_probs, theirs, atol=TOKEN_ATOL)
    np.testing.assert_allclose(metrics["policy/loss"], expected["loss"], atol=1e-6)
    write_model(tmp_path / "gradient", model.config, state.opt_state.trace, "qwen2")
    gradient = load_file(tmp_path / "gradient" / "model.safetensors")
    # torch's embedding has no gradient for the padding token, where it is counted.
    gradient["model.embed_tokens.weight"][expected["pad_token_id"]] = 0.0
    norm = np.linalg.norm([np.linalg.norm(x) for x in gradient.values()])
    np.testing.assert_allclose(norm, expected["grad_norm"], rtol=1e-4)
    assert set(gradient) == set(expected["grad_norms"])
    for tensor, length in expected["grad_norms"].items():
        norm = np.linalg.norm(gradient[tensor])
        np.testing.assert_allclose(norm, length, rtol=1e-4, err_msg=tensor)
    full = [key for key in arrays if key.startswith(f"{name}/grad/")]
    assert len(full) >= 6
    for key in full:
        ours, theirs = gradient[key.removeprefix(f"{name}/grad/")], arrays[key]
        atol = 1e-4 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=atol, err_msg=key)


@pytest.mark.parametrize(("name", "padded"), [("A", 2), ("B_T1_pad_without_eos", 1)])
def test_padding_is_no_part_of_a_completion(
    step: Step,
    numbers: dict[str, Any],
    arrays: dict[str, np.ndarray],
    name: str,
    padded: int,
) -> None:
    expected = numbers["loss_sets"][name]
    lengths = np.array(expected["completion_lengths_given"])
    counted = arrays[f"{name}/completion_mask"].sum(-1)
    assert np.flatnonzero(lengths != counted) == [padded]
    _, _, metrics = step(name, lengths)
    # The completion that the reference counts too long, over its true tokens.
    sampled = padded, slice(lengths[padded])
    policy, reference = (arrays[f"{name}/{key}_logps"] for key in ("policy", "ref"))
    drift = reference[sampled] - policy[sampled]
    divergence = (np.exp(drift) - drift - 1).mean()
    losses = np.array(expected["per_sequence_loss"])
    losses[padded] = expected["beta"] * divergence - expected["advantages"][padded]
    np.testing.assert_allclose(metrics["policy/loss"], losses.mean(), atol=1e-6)
    assert abs(losses.mean() - expected["loss"]) > 5e-6


def test_advantages(numbers: dict[str, Any]) -> None:
    for expected in numbers["advantages"]:
        rewards = jnp.array(expected["rewards"], jnp.float32)
        ours = group_advantages(rewards, expected["num_generations"])
        np.testing.assert_allclose(ours, expected["advantages"], rtol=1e-5, atol=2e-6)


def test_mixing(
    model: Transformer,
    policy: Params,
    reference: Params,
    numbers: dict[str, Any],
    arrays: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    expected = numbers["reference_sync"]
    mix = functools.partial(learner.mix, alpha=expected["alpha"])
    for name in ("sync1", "sync2"):
        reference = jax.jit(mix)(reference, policy)
        write_model(tmp_path / name, model.config, reference, "qwen2")
        mixed = load_file(tmp_path / name / "model.safetensors")
        for tensor, length in expected[name]["param_l2"].items():
            norm = np.linalg.norm(mixed[tensor].astype(np.float64))
            np.testing.assert_allclose(norm, length, rtol=1e-6, err_msg=tensor)
        for key in (key for key in arrays if key.startswith(f"{name}/param/")):
            ours = mixed[key.removeprefix(f"{name}/param/")]
            np.testing.assert_allclose(ours, arrays[key], atol=1e-6, err_msg=key)
        tokens = arrays["sync_ids"][None]
        log_probs = jax.jit(functools.partial(token_log_probs, model))(
            reference, tokens
        )
        theirs = arrays[f"{name}/token_lp"]
        np.testing.assert_allclose(log_probs[0, 1:], theirs, atol=TOKEN_ATOL)
