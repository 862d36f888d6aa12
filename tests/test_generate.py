"""`rlt_jax.generate`, as a program calls it."""

import numpy as np
import pytest

import rlt_jax
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.inference.sampling import SamplingConfig
from rlt_jax.models.transformer import Transformer
from rlt_jax.types import Params

PROMPTS = [[5, 9, 7], [11] * 40, [5, 9, 7], [3]]


def test_completions_have_their_lengths_and_the_log_probs_of_a_forward_pass(
    model: Transformer, params: Params
) -> None:
    sampling = {"max_new_tokens": [4, 9, 4, 6], "temperature": 0.7}
    rollout = rlt_jax.generate(model, params, PROMPTS, sampling, seed=3)
    assert [len(tokens) for tokens in rollout.tokens] == [4, 9, 4, 6]
    assert not rollout.finished.any()
    assert not rollout.texts
    for prompt, tokens, log_probs in zip(
        PROMPTS, rollout.tokens, rollout.log_probs, strict=True
    ):
        row = np.array([[*prompt, *tokens]], np.int32)
        scored = rlt_jax.token_log_probs(model, params, row, temperature=0.7)
        np.testing.assert_allclose(scored[0, len(prompt) :], log_probs, atol=1e-4)
    again = rlt_jax.generate(
        model, params, PROMPTS[:2], sampling | {"max_new_tokens": 4}, seed=3
    )
    np.testing.assert_array_equal(again.tokens[0], rollout.tokens[0])
    np.testing.assert_array_equal(again.tokens[1], rollout.tokens[1][:4])


def test_stop_ids_and_stop_texts(
    text_model: Transformer, teacher_params: Params, tokenizer: Tokenizer
) -> None:
    prompts = [tokenizer.encode("1+1=").ids] * 8
    free = rlt_jax.generate(text_model, teacher_params, prompts, SamplingConfig(24))
    (first, *_) = free.tokens
    token = int(first[5])
    sampling = SamplingConfig(24, stop_ids=(token,))
    stopped = rlt_jax.generate(text_model, teacher_params, prompts, sampling)
    end = first.tolist().index(token) + 1
    assert stopped.finished[0]
    np.testing.assert_array_equal(stopped.tokens[0], first[:end])
    text = tokenizer.decode(first[4:6])
    sampling = {"max_new_tokens": 24, "stop": [text]}
    stopped = rlt_jax.generate(
        text_model, teacher_params, prompts, sampling, tokenizer=tokenizer
    )
    assert stopped.finished[0] and text in tokenizer.decode(stopped.tokens[0])
    assert text not in tokenizer.decode(stopped.tokens[0][:-1])
    assert len(stopped.texts) == len(prompts) and text in stopped.texts[0]


def test_bad_requests_are_refused(model: Transformer, params: Params) -> None:
    nothing = rlt_jax.generate(model, params, [], {"max_new_tokens": 4})
    assert not len(nothing.tokens) and nothing.finished.shape == (0,)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        rlt_jax.generate(model, params, [[1], []], {"max_new_tokens": 4})
    with pytest.raises(UserError, match="context is 512"):
        rlt_jax.generate(model, params, [[1] * 510], {"max_new_tokens": 4})
    with pytest.raises(UserError, match="need a tokenizer"):
        rlt_jax.generate(model, params, [[1]], {"max_new_tokens": 4, "stop": ["x"]})
    for limits in ([4, 9, 4], [], None, "4", [[4]], [4, 0], [4, 1.5]):
        with pytest.raises(UserError, match="sampling.max_new_tokens"):
            rlt_jax.generate(model, params, [[1], [2]], {"max_new_tokens": limits})
    for prompts in (["1+1"], [[1.7]], [[[1]]], [["a"]], [[2**70]], [[None]], [5]):
        with pytest.raises(UserError, match="^prompt"):
            rlt_jax.generate(model, params, prompts, {"max_new_tokens": 4})
    with pytest.raises(UserError, match="the model those from 0 to 39"):
        rlt_jax.generate(model, params, [[2**40]], {"max_new_tokens": 4})
    with pytest.raises(UserError, match="sampling=None"):
        rlt_jax.generate(model, params, [[1]], None)
    with pytest.raises(UserError, match="seed=-1"):
        rlt_jax.generate(model, params, [[1]], {"max_new_tokens": 4}, seed=-1)
    with pytest.raises(UserError, match="top_q"):
        rlt_jax.generate(model, params, [[1]], {"max_new_tokens": 4, "top_q": 1})
