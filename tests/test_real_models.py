"""Real pretrained models with their own tokenizers, against transformers.

Both models come from wheels on the package index, see real_model.py in the folder next to
the repository; they are SmolLM2-135M-Instruct and Gemma 3 270M, a base model without a chat
template. REAL_MODELS names a folder with `smollm2` and `gemma3` that were made before.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import rlt_jax
from rlt_jax.data.chat import ASSETS
from rlt_jax.data.examples import Renderer, student_examples
from rlt_jax.data.tasks import gsm8k
from rlt_jax.data.templates import Template
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.models.transformer import Transformer
from rlt_jax.records import Trace
from rlt_jax.training.checkpoint import ModelSource, load_params, open_model
from rlt_jax.training.sharding import MeshConfig, make_mesh
from rlt_jax.types import Params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

PROBLEMS = 200
SCORED = 60
GENERATED = 20
NEW_TOKENS = 64


class Real(NamedTuple):
    """A model here and in transformers."""

    name: str
    model: Transformer
    params: Params
    tokenizer: Tokenizer
    theirs: Any
    their_tokenizer: Any


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(
    request: pytest.FixtureRequest,
    shared: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Real:
    name = request.param
    if "REAL_MODELS" in os.environ:
        folder = Path(os.environ["REAL_MODELS"]) / name
    else:
        pytest.importorskip("gguf")
        folder = tmp_path_factory.mktemp(name)
        make = [sys.executable, str(shared / "tools" / "real_model.py"), name]
        subprocess.run([*make, str(folder)], check=True)
    chat_template = "chatml" if name == "gemma3" else ""
    source = ModelSource(str(folder), chat_template=chat_template)
    model, _, tokenizer = open_model(source)
    params = load_params(source, model, make_mesh(MeshConfig()), jax.random.key(0))
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if chat_template:
        chatml = (ASSETS / "chatml.jinja").read_text(encoding="utf-8")
        their_tokenizer.chat_template = chatml
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    return Real(name, model, params, tokenizer, theirs, their_tokenizer)


@pytest.fixture(scope="module")
def traces(shared: Path) -> list[Trace]:
    path = shared / "data" / "gsm8k" / "train.jsonl"
    return gsm8k.traces(str(path), limit=PROBLEMS)


def test_prompts_have_the_ids_of_transformers(
    real: Real, rlt: Template, traces: list[Trace]
) -> None:
    for role in ("teacher", "student"):
        renderer = Renderer(real.tokenizer, rlt, role)
        for problem, _ in traces:
            messages = rlt.messages(role, problem, as_system=True)
            text = real.their_tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            text += rlt.teacher_prefix(problem) if role == "teacher" else ""
            ids = real.their_tokenizer(text, add_special_tokens=False)["input_ids"]
            ours, (tokens, offsets) = renderer.prompt(problem)
            assert ours == text
            assert tokens.tolist() == ids
            assert real.tokenizer.decode(tokens) == text
            assert (offsets[:, 1] > offsets[:, 0]).all()


def test_texts_survive_the_tokenizer(real: Real, traces: list[Trace]) -> None:
    for problem, explanation in traces:
        for text in (problem.question, problem.solution, explanation):
            ids = real.tokenizer.encode(text).ids
            assert real.tokenizer.decode(ids) == text
            theirs = real.their_tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids.tolist() == theirs
            assert real.their_tokenizer.decode(theirs) == text


def test_log_probs_agree(real: Real, rlt: Template, traces: list[Trace]) -> None:
    renderer = Renderer(real.tokenizer, rlt, "student")
    worst = 0.0
    score = jax.jit(
        lambda params, tokens: rlt_jax.token_log_probs(real.model, params, tokens)
    )
    for example in student_examples(renderer, traces[:SCORED]):
        tokens, length = example.tokens, len(example.tokens)
        padded = np.pad(tokens, (0, -length % 256))[None]
        ours = np.asarray(score(real.params, padded))[0, 1:length]
        with torch.no_grad():
            logits = real.theirs(torch.tensor(tokens[None].astype(np.int64))).logits
            log_probs = torch.log_softmax(logits[0, :-1], -1).numpy()
        theirs = log_probs[np.arange(length - 1), tokens[1:]]
        worst = max(worst, float(np.abs(ours - theirs).max()))
    print(f"{real.name}: largest difference of {SCORED} sequences {worst:.2g}")
    assert worst < 2e-4


def test_greedy_completions_are_equal(
    real: Real, rlt: Template, traces: list[Trace]
) -> None:
    renderer = Renderer(real.tokenizer, rlt, "student")
    problems = [problem for problem, _ in traces[:GENERATED]]
    prompts = [renderer.prompt(problem)[1].ids for problem in problems]
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0}
    rollout = rlt_jax.generate(
        real.model, real.params, prompts, sampling, tokenizer=real.tokenizer
    )
    differing = {}
    for n, prompt in enumerate(prompts):
        with torch.no_grad():
            output = real.theirs.generate(
                torch.tensor(prompt[None].astype(np.int64)),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=list(real.tokenizer.stop_ids),
            )
        theirs, ours = output[0, len(prompt) :].tolist(), rollout.tokens[n].tolist()
        if theirs != ours:
            pairs = enumerate(zip(ours, theirs, strict=False))
            place = next(
                (t for t, (a, b) in pairs if a != b), min(len(ours), len(theirs))
            )
            differing[n] = place, near_tie(real, prompt, ours[:place])
    print(f"{real.name}: prompts with another completion: {json.dumps(differing)}")
    assert len(differing) <= GENERATED // 20


def near_tie(real: Real, prompt: np.ndarray, completion: list[int]) -> float:
    """Difference of the two largest logits after a completion, in transformers."""
    tokens = torch.tensor([[*prompt.tolist(), *completion]])
    with torch.no_grad():
        best = torch.topk(real.theirs(tokens).logits[0, -1], 2).values
    return float(best[0] - best[1])
