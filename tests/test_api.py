"""Scoring through the public function: students, estimators, packing, tokenizers."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import rlt_jax
import rlt_jax.scoring
from rlt_jax.data.examples import Example, Renderer, student_examples
from rlt_jax.data.rows import RowShape
from rlt_jax.data.templates import Template, load_template
from rlt_jax.data.tokenizer import Encoding, Tokenizer, load_tokenizer
from rlt_jax.errors import UserError
from rlt_jax.inference import log_probs
from rlt_jax.models.config import ModelConfig
from rlt_jax.models.convert import write_model
from rlt_jax.models.transformer import Transformer, init_params
from rlt_jax.records import Problem, Trace
from rlt_jax.rl.rlt_reward import EnsembleConfig, RLTRewardConfig
from rlt_jax.scoring import ScoringConfig, text_completion
from rlt_jax.training.checkpoint import LoadedModel
from rlt_jax.training.sharding import MeshConfig, make_mesh
from rlt_jax.types import Batch, Params

PROBLEMS = [
    {"question": "3+4?", "solution": "7"},
    {"question": "Start at 2: *3 +9. Last digit?", "solution": "It is 5."},
]
COMPLETIONS = [["3+4=7<|end_of_explanation|>", "it is 7", ""], ["2*3=6 6+9=5", "häß"]]

Role = tuple[Transformer, Params, Tokenizer]
PER_TOKEN = ScoringConfig(per_token=True)


@pytest.fixture
def teacher(
    text_model: Transformer, teacher_params: Params, tokenizer: Tokenizer
) -> Role:
    return text_model, teacher_params, tokenizer


@pytest.fixture
def student(
    text_model: Transformer, student_params: Params, tokenizer: Tokenizer
) -> Role:
    return text_model, student_params, tokenizer


def rewards(scored: list[list[dict]]) -> np.ndarray:
    return np.array([record["reward"] for records in scored for record in records])


def test_shape_order_and_arrays(teacher: Role, student: Role) -> None:
    scored = rlt_jax.score_explanations(
        PROBLEMS, COMPLETIONS, teacher, [student], "tiny", PER_TOKEN
    )
    assert [len(records) for records in scored] == [3, 2]
    record = scored[0][0]
    assert "".join(record["explanation_tokens"]) == "3+4=7"
    assert "".join(record["solution_tokens"]) == "7"
    assert record["terms"]["format_penalty"] == 0.0
    assert scored[0][1]["terms"]["format_penalty"] == -1.0
    divergence = np.subtract(
        record["teacher_log_probs_explanation"], record["student_log_probs_explanation"]
    )
    np.testing.assert_allclose(record["explanation_kl_tokens"], divergence, rtol=1e-5)
    assert record["terms"]["kl_mean"] == pytest.approx(divergence.mean(), rel=1e-5)
    assert scored[0][2]["terms"]["empty_explanation"] == 1.0
    assert np.isfinite(rewards(scored)).all()


def test_a_score_does_not_depend_on_the_other_completions(
    monkeypatch: pytest.MonkeyPatch, teacher: Role, student: Role
) -> None:
    together = rlt_jax.score_explanations(
        PROBLEMS, COMPLETIONS, teacher, [student], "tiny"
    )
    monkeypatch.setattr(rlt_jax.scoring, "TOKENS_PER_MICRO_BATCH", 256)
    monkeypatch.setattr(rlt_jax.scoring, "BUCKETS", [256])
    alone = [
        rlt_jax.score_explanations([p], [[text]], teacher, [student], "tiny")[0][0]
        for p, texts in zip(PROBLEMS, COMPLETIONS, strict=True)
        for text in texts
    ]
    np.testing.assert_allclose(
        rewards(together), rewards([alone]), rtol=1e-4, atol=1e-5
    )


def test_a_few_completions_need_few_rows() -> None:
    def of_lengths(*lengths: int) -> list[Example]:
        return [Example(np.zeros(n, np.int32), None, None, None) for n in lengths]

    shape = rlt_jax.scoring.row_shape
    assert shape([of_lengths(100), of_lengths(90)], 1) == RowShape(1, 128)
    assert shape([of_lengths(100, 20, 8, 100, 100)], 1) == RowShape(4, 128)
    assert shape([of_lengths(*[128] * 100)], 1) == RowShape(32, 128)
    assert shape([of_lengths(300)], 4) == RowShape(4, 512)
    assert shape([of_lengths(5000)], 1) == RowShape(1, 8192)


def test_a_batch_is_compiled_for_its_largest_size(
    teacher: Role, student: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One completion of four at most: the same score, and one row is computed."""
    template = load_template("tiny")
    models = [LoadedModel(*teacher), LoadedModel(*student)]
    renderers = rlt_jax.scoring.make_renderers(models, template)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    score = rlt_jax.scoring.make_scorer(models, renderers, ScoringConfig(), mesh)
    problem = Problem(**PROBLEMS[0])
    given = [text_completion(template, problem, COMPLETIONS[0][0], False)]
    computed = []

    def fill(programs: object, batch: Batch, *others: object) -> Batch:
        computed.append(int(batch.num_micro_batches) * batch.tokens.shape[1])
        return log_probs.fill(programs, batch, *others)

    monkeypatch.setattr(rlt_jax.scoring, "log_probs", SimpleNamespace(fill=fill))
    (alone,) = score(given)
    (filled,) = score(given, count=4)
    assert filled["reward"] == pytest.approx(alone["reward"], rel=1e-6)
    assert computed == [1, 1]


def test_log_probs_of_solutions_by_hand(
    student: Role, naive_log_probs: Callable[..., np.ndarray]
) -> None:
    model, params, tokenizer = student
    template = load_template("tiny")
    renderer = Renderer(tokenizer, template, "student")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    score = rlt_jax.scoring.make_solution_scorer(
        LoadedModel(*student), renderer, 4, mesh
    )
    problems = [Problem(**PROBLEMS[1]), Problem(**PROBLEMS[0]), Problem(**PROBLEMS[1])]
    opening, closing = template.thought_tags
    found = score(problems, [f"{opening}2*3=6{closing}5", f"{opening}3+", "no tags"])
    for thoughts, name in (
        (("2*3=6", "3+", "no tags"), "solution_log_prob"),
        (("", "", ""), "solution_log_prob_without_thought"),
    ):
        for problem, thought, row in zip(problems, thoughts, found, strict=True):
            (made,) = student_examples(renderer, [Trace(problem, thought)])
            span = slice(made.solution.start, made.solution.end)
            values = naive_log_probs(model, params, made.tokens[None])[0, span]
            assert row[name] == pytest.approx(values.mean(), rel=1e-4)


def test_assume_closed_takes_back_the_penalty(teacher: Role, student: Role) -> None:
    args = ([PROBLEMS[0]], [["it is 7"]], teacher, [student], "tiny")
    penalised = rlt_jax.score_explanations(*args)
    closed = rlt_jax.score_explanations(*args, ScoringConfig(assume_closed=True))
    np.testing.assert_allclose(rewards(closed), rewards(penalised) + 1, rtol=1e-6)


def test_students_are_combined(teacher: Role, student: Role) -> None:
    def scored(students: list[Role], ensemble: EnsembleConfig) -> np.ndarray:
        scoring = ScoringConfig(ensemble=ensemble)
        return rewards(
            rlt_jax.score_explanations(
                PROBLEMS, COMPLETIONS, teacher, students, "tiny", scoring
            )
        )

    one = scored([student], EnsembleConfig())
    two = scored([teacher], EnsembleConfig())
    both = [student, teacher]
    np.testing.assert_allclose(
        scored(both, EnsembleConfig()), (one + two) / 2, rtol=1e-5
    )
    np.testing.assert_allclose(
        scored(both, EnsembleConfig("min")), np.minimum(one, two), rtol=1e-5
    )
    weighted = EnsembleConfig("weights", (0.2, 0.5))
    np.testing.assert_allclose(
        scored(both, weighted), (0.2 * one + 0.5 * two) / 0.7, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UserError, match="1 numbers for 2 students"):
        scored(both, EnsembleConfig("weights", (1.0,)))


def test_a_second_tokenizer_changes_segments_and_not_their_sum(
    tmp_path: Path, teacher: Role, student: Role
) -> None:
    # The same ids from a copy of the tokenizer: exactly the per-token definition.
    folder = tmp_path / "copy"
    shutil.copytree(student[2].path, folder)
    copy = (*student[:2], load_tokenizer(folder))
    same = [
        rlt_jax.score_explanations(
            PROBLEMS, COMPLETIONS, teacher, [role], "tiny", PER_TOKEN
        )
        for role in (student, copy)
    ]
    assert same[0] == same[1]
    # The student spells the text byte by byte: fewer cuts in common, the same text.
    body = "2*3=6 and so 6+9=5"
    spelling = Spelling(student[2])
    plain, spelt = (
        rlt_jax.score_explanations(
            [PROBLEMS[1]],
            [[f"{body}<|end_of_explanation|>"]],
            teacher,
            [(*student[:2], tokenizer)],
            "tiny",
            PER_TOKEN,
        )[0][0]
        for tokenizer in (student[2], spelling)
    )
    pieces = teacher[2].encode(body).offsets
    assert len(spelling.encode(body).ids) > len(pieces)
    for record in (plain, spelt):
        assert "".join(record["explanation_tokens"]) == body
        assert len(record["explanation_tokens"]) == len(pieces)
    assert max(len(token) for token in spelt["explanation_tokens"]) > 1
    name = "teacher_log_probs_explanation"
    np.testing.assert_allclose(spelt[name], plain[name], rtol=1e-4, atol=1e-4)
    # Each of the student's log-probs is a sum over the letters of a token.
    assert spelt["terms"]["kl_mean"] != pytest.approx(plain["terms"]["kl_mean"])


class Spelling:
    """A tokenizer that encodes every character of plain text on its own."""

    def __init__(self, base: Tokenizer) -> None:
        self.base = base

    def __getattr__(self, name: str) -> object:
        return getattr(self.base, name)

    def encode(self, text: str) -> Encoding:
        ids, offsets = self.base.encode(text)
        new_ids, new_offsets = [], []
        for token, (start, end) in zip(ids, offsets, strict=True):
            if end - start == 1 or text[start:end].startswith("<|"):
                new_ids.append([token])
                new_offsets.append([(start, end)])
                continue
            for place in range(start, end):
                parts = self.base.encode(text[place]).ids
                new_ids.append(parts)
                new_offsets.append([(place, place + 1)] * len(parts))
        return Encoding(
            np.concatenate(new_ids).astype(np.int32),
            np.concatenate(new_offsets).astype(np.int32),
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        return [self.encode(text) for text in texts]

    def encode_with_prefix(self, prefix: str, texts: Sequence[str]) -> list[Encoding]:
        return self.encode_batch([prefix + text for text in texts])


@pytest.mark.parametrize("top_k", [None, 3, 512])
def test_kl_over_the_vocabulary_by_hand(
    teacher: Role,
    student: Role,
    full_logits: Callable[..., np.ndarray],
    tiny: Template,
    top_k: int | None,
) -> None:
    config = RLTRewardConfig(
        kl_estimator="full" if top_k is None else "top_k", kl_top_k=top_k or 1
    )
    scoring = ScoringConfig(rlt_reward=config, per_token=True)
    problem, text = PROBLEMS[0], "3+4=7<|end_of_explanation|>"
    (record,) = rlt_jax.score_explanations(
        [problem], [[text]], teacher, [student], tiny, scoring
    )[0]

    def log_softmax(role: Role, prompt: str, temperature: float) -> np.ndarray:
        start = len(role[2].encode(prompt).ids)
        ids = role[2].encode(prompt + "3+4=7").ids
        values = full_logits(role[0], role[1], ids[None])[0] / temperature
        values -= values.max(-1, keepdims=True)
        values -= np.log(np.exp(values).sum(-1, keepdims=True))
        return values[start - 1 : -1]

    asked = Problem("3+4?", "7")
    chat = student[2].render(tiny.messages("student", asked, True))
    q = log_softmax(student, chat + tiny.thought_tags[0], 0.7)
    prompt = teacher[2].render(tiny.messages("teacher", asked, True))
    prompt += tiny.teacher_prefix(asked)
    p = log_softmax(teacher, prompt, 0.7)
    if top_k is not None:
        chosen = np.argsort(-p, axis=-1)[:, :top_k]
        p, q = (np.take_along_axis(x, chosen, -1) for x in (p, q))
        rest = [np.log(np.maximum(1 - np.exp(x).sum(-1), 1e-30)) for x in (p, q)]
        p, q = (np.column_stack(pair) for pair in zip((p, q), rest, strict=True))
    expected = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(
        record["explanation_kl_tokens"], expected, rtol=2e-3, atol=2e-4
    )


def test_more_tokens_than_the_context_of_a_model_are_refused(
    teacher: Role, student: Role
) -> None:
    model, params, tokenizer = student
    short = Transformer(dataclasses.replace(model.config, max_length=48))
    students = [(short, params, tokenizer)]
    fits = rlt_jax.score_explanations(PROBLEMS[:1], [["7"]], teacher, students, "tiny")
    assert np.isfinite(rewards(fits)).all()
    with pytest.raises(UserError, match=r"has \d+ tokens, the context of .* is 48"):
        rlt_jax.score_explanations(
            PROBLEMS[:1], [["7" * 48]], teacher, students, "tiny"
        )


def test_a_nan_names_the_completion(teacher: Role, student: Role) -> None:
    broken = jax.tree.map(lambda x: x * np.nan, student[1])
    with pytest.raises(UserError, match=r"completion 0 \(question '3\+4\?'\)"):
        rlt_jax.score_explanations(
            PROBLEMS, COMPLETIONS, teacher, [(student[0], broken, student[2])], "tiny"
        )


SCORE_ON = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
import rlt_jax
role = (*rlt_jax.load_model("embedded"), rlt_jax.load_tokenizer("embedded"))
assert jax.device_count() == int(sys.argv[1])
records = rlt_jax.score_explanations(
    [{"question": "Start at 4: +3 *7. Last digit?", "solution": "9"}],
    [["4+3=7 7*7=9<|end_of_explanation|>", "it is 9"]], role, [role], "tiny",
)[0]
print(*(record["reward"] for record in records))
"""


def test_the_number_of_devices_does_not_matter() -> None:
    one, eight = (
        subprocess.run(
            [sys.executable, "-c", SCORE_ON, count],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for count in ("1", "8")
    )
    np.testing.assert_allclose(
        np.array(one, float), np.array(eight, float), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("estimator", ["full", "top_k"])
def test_a_kl_over_the_vocabulary_needs_one_tokenizer(
    teacher: Role, student: Role, estimator: str, tmp_path: Path
) -> None:
    shutil.copytree(student[2].path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "added_tokens.json").write_text('{"<more>": 511}')
    other = rlt_jax.load_tokenizer(tmp_path)
    config = ScoringConfig(rlt_reward=RLTRewardConfig(kl_estimator=estimator))
    with pytest.raises(UserError, match="compares whole vocabularies"):
        rlt_jax.score_explanations(
            PROBLEMS, COMPLETIONS, teacher, [(*student[:2], other)], "tiny", config
        )


def test_a_model_without_tokenizer_files_is_loaded(tmp_path: Path) -> None:
    config = ModelConfig(32, 16, 1, 2, 1, 8, 24, max_length=64)
    params = init_params(config, jax.random.key(0))
    write_model(tmp_path / "model", config, params, "llama")
    assert not list((tmp_path / "model").glob("*token*"))
    model, loaded = rlt_jax.load_model(tmp_path / "model")
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_ids_that_a_model_lacks_are_refused(student: Role) -> None:
    model, params, _ = student
    V = model.config.vocab_size
    for bad in (V, -1):
        with pytest.raises(UserError, match=f"the model those from 0 to {V - 1}"):
            rlt_jax.generate(model, params, [[1], [1, bad]], {"max_new_tokens": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completions": ["it is 9", "it is 5"]}, "completions=.*a list, each a list"),
        ({"completions": COMPLETIONS[:1]}, "a list of completions for every problem"),
        ({"students": []}, "give students, and a list of completions"),
        (
            {"problems": [{"question": "q"}, {}]},
            "problems: the key 'solution' is missing",
        ),
        (
            {"problems": [Problem("q", 5), Problem("q", "s")]},
            "problems.solution=5: a te",
        ),
        ({"problems": [5, 6]}, "problems=5: keys and values"),
    ],
)
def test_bad_arguments_are_refused(
    changes: dict[str, Any], message: str, teacher: Role, student: Role
) -> None:
    values = {"problems": PROBLEMS, "completions": COMPLETIONS, "students": [student]}
    with pytest.raises(UserError, match=message):
        rlt_jax.score_explanations(teacher=teacher, **values | changes, template="tiny")
