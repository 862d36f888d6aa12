"""Sequences and spans, token by token."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors

from rlt_jax.data import examples
from rlt_jax.data.examples import Example, Renderer, Span
from rlt_jax.data.templates import Template
from rlt_jax.data.tokenizer import SHIPPED, Tokenizer, load_tokenizer
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Trace

PROBLEM = Problem("3+4?", "7", "7")
TRACE = Trace(PROBLEM, "3+4=7")
CHAT = ["<|user|>", "3", "+", "4", "?", "<|end|>", "<|assistant|>"]
STEPS = ["3", "+", "4", "=", "7"]
THOUGHT = ("<|begin_of_thought|>", "<|end_of_thought|>")
EXPLANATION = ("<|begin_of_explanation|>", "<|end_of_explanation|>")
SOLUTION = ["<|begin_of_solution|>", "7", "<|end_of_solution|>"]


@pytest.fixture
def padded(rlt: Template) -> Template:
    """The published tags and newlines, without the long system prompts."""
    return dataclasses.replace(rlt, teacher_system="", student_system="")


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]


def span_pieces(tokenizer: Tokenizer, example: Example, span: Span) -> list[str]:
    return pieces(tokenizer, example.tokens[span.start : span.end])


def student_example(tokenizer: Tokenizer, template: Template, trace: Trace) -> Example:
    renderer = Renderer(tokenizer, template, "student")
    (example,) = examples.student_examples(renderer, [trace])
    return example


def teacher_example(tokenizer: Tokenizer, template: Template, trace: Trace) -> Example:
    renderer = Renderer(tokenizer, template, "teacher")
    (example,) = examples.teacher_examples(renderer, [trace])
    return example


def sampled_example(
    tokenizer: Tokenizer,
    template: Template,
    completion: np.ndarray,
    role: str = "teacher",
) -> Example:
    """Of `PROBLEM` and sampled ids."""
    renderer = Renderer(tokenizer, template, role)
    decoded = examples.decode_completion(tokenizer, completion)
    return examples.completion_example(renderer, PROBLEM, completion, *decoded)


def text_example(tokenizer: Tokenizer, template: Template, text: str) -> Example:
    """Of `PROBLEM` and the text of a completion."""
    renderer = Renderer(tokenizer, template, "teacher")
    (example,) = examples.text_examples(renderer, [PROBLEM], [text])
    return example


def span_of(*tokens: str) -> Span:
    ends = np.cumsum([len(token) for token in tokens])
    offsets = np.stack([ends - [len(token) for token in tokens], ends], -1)
    return Span(0, len(tokens), offsets.astype(np.int32))


def test_student_example_of_the_tiny_template(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    example = student_example(tokenizer, tiny, TRACE)
    system = ["<|system|>", "Solve", ".", "<|end|>"]
    assert pieces(tokenizer, example.tokens) == [
        *system,
        *CHAT,
        THOUGHT[0],
        *STEPS,
        THOUGHT[1],
        *SOLUTION,
        "<|end|>",
    ]
    assert (example.explanation.start, example.explanation.end) == (12, 17)
    assert (example.solution.start, example.solution.end) == (19, 20)
    np.testing.assert_array_equal(example.loss_mask, np.arange(22) >= 11)


def test_student_example_of_a_padded_template(
    tokenizer: Tokenizer, padded: Template
) -> None:
    example = student_example(tokenizer, padded, TRACE)
    body = ["\n", "\n", *STEPS, "\n", "\n"]
    assert pieces(tokenizer, example.tokens) == [
        *CHAT,
        THOUGHT[0],
        *body,
        THOUGHT[1],
        "\n",
        "\n",
        *SOLUTION,
        "<|end|>",
    ]
    assert span_pieces(tokenizer, example, example.explanation) == body
    assert span_pieces(tokenizer, example, example.solution) == ["7"]
    np.testing.assert_array_equal(example.explanation.offsets[:, 0], np.arange(9))
    np.testing.assert_array_equal(
        example.loss_mask, np.arange(len(example.tokens)) >= 7
    )


def test_teacher_example_of_the_tiny_template(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    example = teacher_example(tokenizer, tiny, TRACE)
    system = ["<|system|>", "E", "x", "plain", ".", "<|end|>"]
    assert pieces(tokenizer, example.tokens) == [
        *system,
        *CHAT,
        *SOLUTION,
        EXPLANATION[0],
        *STEPS,
        EXPLANATION[1],
        "<|end|>",
    ]
    assert (example.explanation.start, example.explanation.end) == (17, 22)
    assert not len(example.solution.offsets)
    np.testing.assert_array_equal(example.loss_mask, np.arange(24) >= 17)


def test_the_pad_belongs_to_prompt_and_explanation_of_a_teacher_example(
    tokenizer: Tokenizer, padded: Template
) -> None:
    example = teacher_example(tokenizer, padded, TRACE)
    ending = ["\n", "\n", EXPLANATION[1], "<|end|>"]
    opening = [*CHAT, *SOLUTION, "\n", "\n", EXPLANATION[0], "\n", "\n"]
    assert pieces(tokenizer, example.tokens) == [*opening, *STEPS, *ending]
    explained = ["\n", "\n", *STEPS, "\n", "\n"]
    assert span_pieces(tokenizer, example, example.explanation) == explained
    learned = pieces(tokenizer, example.tokens[example.loss_mask])
    assert learned == [*STEPS, *ending]


def test_examples_are_the_text_of_the_template(
    tokenizer: Tokenizer, rlt: Template
) -> None:
    trace = Trace(Problem("Wie groß? 🦉", "x = ½", None), "naïve: <|end_of_thought|>")
    student = tokenizer.decode(student_example(tokenizer, rlt, trace).tokens)
    chat = tokenizer.render(rlt.messages("student", trace.problem, True))
    assert student == chat + rlt.student_turn(trace) + "<|end|>"
    teacher = tokenizer.decode(teacher_example(tokenizer, rlt, trace).tokens)
    prompt, _ = Renderer(tokenizer, rlt, "teacher").prompt(trace.problem)
    assert prompt.endswith(rlt.teacher_prefix(trace.problem))
    ending = "\n\n<|end_of_explanation|><|end|>"
    assert teacher == prompt + trace.explanation + ending


def test_spans_hold_exactly_their_text(tokenizer: Tokenizer, rlt: Template) -> None:
    # Question, thought and solution quote each other and the tags.
    solution = "<|begin_of_solution|>7<|end_of_solution|>"
    thought = "\n\n7 <|begin_of_solution|>7<|end_of_solution|>"
    trace = Trace(Problem("7", solution), thought)
    example = student_example(tokenizer, rlt, trace)
    for span, text in ((example.explanation, thought), (example.solution, solution)):
        assert "".join(span_pieces(tokenizer, example, span)) == text
        assert span.offsets[-1, 1] == len(text)
    example = teacher_example(tokenizer, rlt, trace)
    assert "".join(span_pieces(tokenizer, example, example.explanation)) == thought


def test_empty_texts_have_empty_spans(tokenizer: Tokenizer, tiny: Template) -> None:
    trace = Trace(Problem("3+4?", ""), "")
    example = student_example(tokenizer, tiny, trace)
    teacher = teacher_example(tokenizer, tiny, trace)
    for span in (example.explanation, example.solution, teacher.explanation):
        assert span.start == span.end and not len(span.offsets)


def test_sampled_ids_are_kept(tokenizer: Tokenizer, tiny: Template) -> None:
    # Byte by byte, as no encoder would do it, and a tag that is spelt out.
    spelt = [int(tokenizer.encode(char).ids[0]) for char in "7*3=1"]
    assert len(tokenizer.encode("plain").ids) == 1
    spelt += [int(tokenizer.encode(char).ids[0]) for char in "plain"]
    tag = [int(tokenizer.encode(char).ids[0]) for char in EXPLANATION[1]]
    completion = np.array([*spelt, *tag, tokenizer.eos_id], np.int32)
    example = sampled_example(tokenizer, tiny, completion)
    _, prompt = Renderer(tokenizer, tiny, "teacher").prompt(PROBLEM)
    np.testing.assert_array_equal(example.tokens, [*prompt.ids, *completion])
    np.testing.assert_array_equal(example.tokens[example.loss_mask], completion)
    assert span_pieces(tokenizer, example, example.explanation) == [*"7*3=1plain"]
    text, _ = examples.decode_completion(tokenizer, completion)
    assert tiny.parse_completion(text) == ("7*3=1plain", True)


def test_a_canonical_sample_gives_the_canonical_example(
    tokenizer: Tokenizer, padded: Template
) -> None:
    text = "3+4=7\n\n" + EXPLANATION[1]
    completion = tokenizer.encode(text + "<|end|>").ids
    made = [
        sampled_example(tokenizer, padded, completion),
        teacher_example(tokenizer, padded, TRACE),
        text_example(tokenizer, padded, text),
    ]
    for example in made[1:]:
        np.testing.assert_array_equal(example.tokens, made[0].tokens)
        np.testing.assert_array_equal(example.loss_mask, made[0].loss_mask)
        assert example.explanation[:2] == made[0].explanation[:2]
        np.testing.assert_array_equal(
            example.explanation.offsets, made[0].explanation.offsets
        )


def test_a_text_without_closing_tag_gets_one(
    tokenizer: Tokenizer, padded: Template
) -> None:
    example = text_example(tokenizer, padded, "3+4=7")
    learned = pieces(tokenizer, example.tokens[example.loss_mask])
    assert learned == [*STEPS, EXPLANATION[1], "<|end|>"]
    assert span_pieces(tokenizer, example, example.explanation) == ["\n", "\n", *STEPS]


def test_a_student_policy_has_sampled_ids_and_no_spans(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    completion = tokenizer.encode("3+4=7<|end|>").ids
    example = sampled_example(tokenizer, tiny, completion, role="student")
    prompt = tokenizer.render(tiny.messages("student", PROBLEM, True))
    expected = [*tokenizer.encode(prompt).ids, *completion]
    np.testing.assert_array_equal(example.tokens, expected)
    np.testing.assert_array_equal(example.tokens[example.loss_mask], completion)
    assert example.explanation == example.solution == examples.EMPTY


def test_examples_of_several_problems_keep_their_order(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    problems = [Problem(f"{n}?", str(n)) for n in (1, 2, 1, 3, 2, 1)]
    traces = [Trace(problem, f"z{n}") for n, problem in enumerate(problems)]
    for role, make in examples.EXAMPLES.items():
        renderer = Renderer(tokenizer, tiny, role)
        together = make(renderer, traces)
        for example, trace in zip(together, traces, strict=True):
            (alone,) = make(Renderer(tokenizer, tiny, role), [trace])
            np.testing.assert_array_equal(example.tokens, alone.tokens)
            assert trace.explanation in tokenizer.decode(example.tokens)


def test_a_decoded_completion_leaves_the_stop_token_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("7 is it").ids
    text, offsets = examples.decode_completion(tokenizer, ids)
    assert text == "7 is it" and len(offsets) == len(ids)
    stopped = np.append(ids, tokenizer.eos_id)
    text, offsets = examples.decode_completion(tokenizer, stopped)
    assert text == "7 is it" and len(offsets) == len(ids) + 1
    np.testing.assert_array_equal(offsets[-1], [7, 7])
    # A stop token in the middle was not one: it is text.
    text, _ = examples.decode_completion(tokenizer, np.append(stopped, ids[0]))
    assert text == "7 is it<|end|>7"
    text, offsets = examples.decode_completion(tokenizer, np.zeros(0, np.int32))
    assert text == "" and offsets.shape == (0, 2)


def test_only_tokens_wholly_inside_belong_to_a_span() -> None:
    # "<t>3+4=7</t>" as `<t>`, `3`, `+`, `4`, `=`, `7</`, `t>`.
    offsets = span_of("<t>", "3", "+", "4", "=", "7</", "t>").offsets
    span = examples.find_span(offsets, 3, 8)
    assert (span.start, span.end) == (1, 5)
    np.testing.assert_array_equal(span.offsets[:, 0], [0, 1, 2, 3])
    nothing = examples.find_span(offsets, 7, 9)
    assert nothing.start == nothing.end and not len(nothing.offsets)


@pytest.mark.parametrize(
    ("left", "right", "left_segments", "right_segments"),
    [
        (["ab", "c", "d"], ["a", "bc", "d"], [0, 0, 1], [0, 0, 1]),
        (["a", "b"], ["a", "b"], [0, 1], [0, 1]),
        (["ab"], ["a", "b"], [0], [0, 0]),
        (["ab", "cd", "e"], ["a", "b", "c", "d", "e"], [0, 1, 2], [0, 0, 1, 1, 2]),
        (["abc", "d"], ["a", "bcd"], [0, 0], [0, 0]),
        # The right sequence's last token reached into the closing tag and fell away.
        (["a", "b", "c"], ["a", "b"], [0, 1, -1], [0, 1]),
        (["a", "bc"], ["a", "b"], [0, -1], [0, -1]),
        (["a"], [], [-1], []),
    ],
)
def test_worked_alignments(
    left: list[str],
    right: list[str],
    left_segments: list[int],
    right_segments: list[int],
) -> None:
    spans = [span_of(*side) if side else examples.EMPTY for side in (left, right)]
    ours = examples.align(*spans)
    np.testing.assert_array_equal(ours[0], left_segments)
    np.testing.assert_array_equal(ours[1], right_segments)


def test_a_first_token_without_counterpart_is_left_out() -> None:
    whole = span_of("\n", "\n", "a", "b")
    # The other sequence's newlines are part of a token with the opening tag.
    partial = Span(0, 2, whole.offsets[2:])
    left, right = examples.align(whole, partial)
    np.testing.assert_array_equal(left, [-1, -1, 0, 1])
    np.testing.assert_array_equal(right, [0, 1])


def test_alignment_is_common_and_finest() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = "abcdefghijkl"
        cuts = [sorted({0, *rng.integers(1, 12, 5), 12}) for _ in range(2)]
        sides = [[text[a:b] for a, b in itertools.pairwise(side)] for side in cuts]
        segments = examples.align(*(span_of(*side) for side in sides))
        texts = []
        for side, numbers in zip(sides, segments, strict=True):
            joined: dict[int, str] = {}
            for token, number in zip(side, numbers, strict=True):
                joined[int(number)] = joined.get(int(number), "") + token
            texts.append(joined)
        common = sorted(set(cuts[0]) & set(cuts[1]))
        expected = [text[a:b] for a, b in itertools.pairwise(common)]
        assert texts[0] == texts[1] == dict(enumerate(expected))


TURNS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    "{% endfor %}"
)
OPEN = (
    TURNS + "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)


def embedded_with(folder: Path, chat_template: str) -> Tokenizer:
    """The embedded tokenizer with another chat template."""
    shutil.copytree(SHIPPED["embedded"], folder, dirs_exist_ok=True)
    config = {"eos_token": "<|end|>", "chat_template": chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def prefix_space_tokenizer(folder: Path) -> Tokenizer:
    """A SentencePiece model that puts a space before a text, as of Llama 2."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["an ant and a pan in an inn", "sis snaps 12 pins"]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    chat = (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    )
    config = {"eos_token": "</s>", "chat_template": chat}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def test_prompt_and_completion_of_a_teacher_are_one_text(
    tmp_path: Path, tiny: Template
) -> None:
    tokenizer = prefix_space_tokenizer(tmp_path)
    trace = Trace(Problem("an ant", "12"), "in a pan")
    example = teacher_example(tokenizer, tiny, trace)
    prompt, _ = Renderer(tokenizer, tiny, "teacher").prompt(trace.problem)
    text = prompt + trace.explanation + EXPLANATION[1] + " </s>"
    assert example.tokens.tolist() == tokenizer.encode(text).ids.tolist()
    # A space before the whole text, and none in it.
    assert tokenizer.decode(example.tokens) == " " + text
    explained = span_pieces(tokenizer, example, example.explanation)
    assert "".join(explained) == trace.explanation
    # What a student reads, the reward of the text, and the warm-up agree on the tokens.
    assert text_example(tokenizer, tiny, "in a pan" + EXPLANATION[1]).tokens.size
    student = student_example(tokenizer, tiny, trace)
    assert span_pieces(tokenizer, student, student.explanation) == explained


def test_equal_ids_give_equal_segments_with_a_tokenizer_that_trims(
    tmp_path: Path, padded: Template
) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"an": 256, "Ġan": 257}
    built = Library(models.BPE(vocab, [("a", "n"), ("Ġ", "an")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.post_processor = processors.ByteLevel()
    built.add_special_tokens(["</s>", *EXPLANATION, *THOUGHT])
    built.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", "chat_template": "{{ messages[0].content }}</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    text = "an an\n x an\n\n"
    completion = tokenizer.encode(text + EXPLANATION[1] + "</s>").ids
    sampled = sampled_example(tokenizer, padded, completion).explanation
    trace = Trace(PROBLEM, "\n\n" + text)
    written = teacher_example(tokenizer, padded, trace).explanation
    student = student_example(tokenizer, padded, trace).explanation
    count = sampled.end - sampled.start
    assert count == 10
    for other in (written, student):
        np.testing.assert_array_equal(sampled.offsets, other.offsets)
        for segments in examples.align(sampled, other):
            np.testing.assert_array_equal(segments, np.arange(count))


def test_turns_end_as_the_chat_template_ends_them(
    tmp_path: Path, tiny: Template
) -> None:
    # The end of a turn is another token than the end of a text.
    chat = TURNS.replace("<|end|>", "<|system|>")
    tokenizer = embedded_with(tmp_path, chat)
    ending = int(tokenizer.encode("<|system|>").ids[0])
    assert tokenizer.end_of_turn == "<|system|>"
    assert tokenizer.stop_ids == tuple(sorted({ending, tokenizer.eos_id}))
    for example in (
        student_example(tokenizer, tiny, TRACE),
        teacher_example(tokenizer, tiny, TRACE),
        text_example(tokenizer, tiny, "3+4=7"),
    ):
        assert example.tokens[-1] == ending and example.loss_mask[-1]
        assert tokenizer.eos_id not in example.tokens
    for stop in tokenizer.stop_ids:
        completion = np.append(tokenizer.encode("3+4=7").ids, stop)
        assert examples.decode_completion(tokenizer, completion)[0] == "3+4=7"


def test_earlier_turns_stand_before_the_question(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    history = (("user", "1+1?"), ("assistant", "2"))
    problem = Problem("3+4?", "7", history=history)
    start = "<|system|>Solve.<|end|><|user|>1+1?<|end|><|assistant|>2<|end|>"
    question = "<|user|>3+4?<|end|><|assistant|>"
    renderer = Renderer(tokenizer, tiny, "student")
    assert renderer.prompt(problem)[0] == start + question
    example = student_example(tokenizer, tiny, Trace(problem, "3+4=7"))
    assert span_pieces(tokenizer, example, example.explanation) == STEPS
    assert span_pieces(tokenizer, example, example.solution) == ["7"]
    as_user = Renderer(
        tokenizer, dataclasses.replace(tiny, system_role="user"), "student"
    )
    start = "<|user|>Solve.\n\n1+1?<|end|><|assistant|>2<|end|>"
    assert as_user.prompt(problem)[0] == start + question


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
DROPS = TURNS.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)


@pytest.mark.parametrize("chat", [REFUSES + TURNS, DROPS])
def test_a_system_prompt_without_a_place_goes_to_the_first_user_turn(
    chat: str, tmp_path: Path, tiny: Template
) -> None:
    tokenizer = embedded_with(tmp_path, chat)
    assert not tokenizer.takes_system
    for role, system in (("teacher", "Explain."), ("student", "Solve.")):
        for place in ("auto", "user"):
            template = dataclasses.replace(tiny, system_role=place)
            prompt, _ = Renderer(tokenizer, template, role).prompt(PROBLEM)
            assert prompt.startswith(f"<|user|>{system}\n\n3+4?<|end|>")
        template = dataclasses.replace(tiny, system_role="system")
        with pytest.raises(UserError, match='Set system_role to "auto"'):
            Renderer(tokenizer, template, role)
        silent = dataclasses.replace(template, teacher_system="", student_system="")
        prompt, _ = Renderer(tokenizer, silent, role).prompt(PROBLEM)
        assert prompt.startswith("<|user|>3+4?<|end|>")


def think_template(template: Template, **fields: str) -> Template:
    tags = {"thought_tags": ("<think>", "</think>"), "pad": "\n"}
    return dataclasses.replace(template, system_role="auto", **tags | fields)


@pytest.mark.parametrize("space", ["", "\n", "\n\n"])
def test_an_opening_of_the_chat_template_counts_as_the_students(
    space: str, tmp_path: Path, tiny: Template
) -> None:
    tokenizer = embedded_with(tmp_path, OPEN.replace("<think>\\n", f"<think>{space}"))
    template = think_template(tiny)
    renderer = Renderer(tokenizer, template, "student")
    assert renderer.opened == f"<think>{space}"
    prompt, _ = renderer.prompt(PROBLEM)
    assert prompt.endswith(f"<|assistant|><think>{space}")
    example = student_example(tokenizer, template, TRACE)
    start = "" if space else "\n"  # the pad is there once
    turn = f"{start}3+4=7\n</think><|begin_of_solution|>7<|end_of_solution|><|end|>"
    assert tokenizer.decode(example.tokens) == prompt + turn
    assert tokenizer.decode(example.tokens[example.loss_mask]) == turn
    span = example.explanation
    body = "".join(span_pieces(tokenizer, example, span))
    assert body == "\n3+4=7\n" and span.offsets[0, 0] == 0
    assert span_pieces(tokenizer, example, example.solution) == ["7"]
    # The text of the completion alone has no opening tag.
    assert template.thought_of(turn) is None
    assert template.thought_of(renderer.opened + turn).strip() == "3+4=7"


def test_a_teacher_and_other_tags_do_not_stand_in_an_open_thought(
    tmp_path: Path, tiny: Template
) -> None:
    tokenizer = embedded_with(tmp_path, OPEN)
    teacher, _ = Renderer(tokenizer, think_template(tiny), "teacher").prompt(PROBLEM)
    assert "<think>" not in teacher
    assert "<|assistant|><|begin_of_solution|>7" in teacher
    renderer = Renderer(tokenizer, tiny, "student")
    assert renderer.opened == ""
    assert renderer.prompt(PROBLEM)[0].endswith("<|assistant|>")
    example = student_example(tokenizer, tiny, TRACE)
    assert "<think>" not in tokenizer.decode(example.tokens)
    assert span_pieces(tokenizer, example, example.explanation) == STEPS
    # A model with thought tags of its own.
    own = embedded_with(tmp_path / "own", OPEN.replace("<think>", THOUGHT[0]))
    assert Renderer(own, tiny, "student").opened == THOUGHT[0] + "\n"
    teacher, _ = Renderer(own, tiny, "teacher").prompt(PROBLEM)
    assert THOUGHT[0] not in teacher


def test_students_with_other_chat_templates_have_other_prompts(
    tmp_path: Path, tiny: Template
) -> None:
    first, other = embedded_with(tmp_path, TURNS), embedded_with(tmp_path, OPEN)
    again = embedded_with(tmp_path, TURNS)
    made = examples.student_renderers([first, other, again], tiny)
    assert made[0] is made[2] and made[1] is not made[0]
    assert made[1].tokenizer is other
    file = tmp_path / "words.jinja"
    file.write_text("{{ word }}{{ messages[0].content }}")
    words = [load_tokenizer(tmp_path, str(file), {"word": word}) for word in "ab"]
    prompts = [
        renderer.prompt(PROBLEM)[0][0]
        for renderer in examples.student_renderers(
            words, dataclasses.replace(tiny, system_role="user")
        )
    ]
    assert prompts == ["a", "b"]


def test_questions_that_end_in_a_tag_are_no_openings(
    tokenizer: Tokenizer, tiny: Template
) -> None:
    renderer = Renderer(tokenizer, think_template(tiny), "student")
    prompt, _ = renderer.prompt(Problem("What is <think>", "7"))
    assert renderer.opened == "" and "What is <think><|end|>" in prompt
