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


def test_completions_are_as_long_as_asked_and_score_as_they_were_drawn(
    model: Transformer, params: Params
) -> None:
    sampling = {"max_new_tokens": [4, 9, 4, 6], "temperature": 0.7}
    written = rlt_jax.generate(model, params, PROMPTS, sampling, seed=3)
    assert [len(one.tokens) for one in written] == [4, 9, 4, 6]
    assert not any(one.finished for one in written)
    for prompt, one in zip(PROMPTS, written, strict=True):
        row = np.array([[*prompt, *one.tokens]], np.int32)
        scored = rlt_jax.token_log_probs(model, params, row, temperature=0.7)
        np.testing.assert_allclose(scored[0, len(prompt) :], one.log_probs, atol=1e-4)
    again = rlt_jax.generate(
        model, params, PROMPTS[:2], sampling | {"max_new_tokens": 4}, seed=3
    )
    np.testing.assert_array_equal(again[0].tokens, written[0].tokens)
    np.testing.assert_array_equal(again[1].tokens, written[1].tokens[:4])


def test_stop_ids_and_stop_texts(
    text_model: Transformer, teacher_params: Params, tokenizer: Tokenizer
) -> None:
    prompts = [tokenizer.encode("1+1=").ids] * 8
    free = SamplingConfig(24)
    written = rlt_jax.generate(text_model, teacher_params, prompts, free)
    token = int(written[0].tokens[5])
    stopped = rlt_jax.generate(
        text_model, teacher_params, prompts, free, stop_ids=[token]
    )[0]
    first = written[0].tokens.tolist().index(token) + 1
    assert stopped.finished and stopped.tokens.tolist() == list(
        written[0].tokens[:first]
    )
    text = tokenizer.decode(written[0].tokens[4:6])
    sampling = {"max_new_tokens": 24, "stop": [text]}
    stopped = rlt_jax.generate(
        text_model, teacher_params, prompts, sampling, tokenizer=tokenizer
    )[0]
    assert stopped.finished and text in tokenizer.decode(stopped.tokens)
    assert text not in tokenizer.decode(stopped.tokens[:-1])


def test_bad_requests_are_refused(model: Transformer, params: Params) -> None:
    assert rlt_jax.generate(model, params, [], {"max_new_tokens": 4}) == []
    with pytest.raises(UserError, match="prompt 1 is empty"):
        rlt_jax.generate(model, params, [[1], []], {"max_new_tokens": 4})
    with pytest.raises(UserError, match="context is 512"):
        rlt_jax.generate(model, params, [[1] * 510], {"max_new_tokens": 4})
    with pytest.raises(UserError, match="need a tokenizer"):
        rlt_jax.generate(model, params, [[1]], {"max_new_tokens": 4, "stop": ["x"]})
    with pytest.raises(UserError, match="top_q"):
        rlt_jax.generate(model, params, [[1]], {"max_new_tokens": 4, "top_q": 1})
