"""Sequences of token ids made from problems, traces and completions, with their spans.

The same code makes the sequences a student is trained on and those the reward scores, so
the reward sees exactly what a student will learn from.

A token belongs to a span when its characters lie wholly inside the span's text. With
the text "<t>3+4=7</t>" tokenised as `<t>`, `3`, `+`, `4`, `=`, `7</`, `t>`, the span of
"3+4=7" holds the tokens `3 + 4 =`: the last one also covers part of the closing tag.
"""

import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from rlt_jax.data.templates import Template
from rlt_jax.data.token_bytes import Decoded, Encoding
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Trace

ROLES = ("teacher", "student")
Prompt = tuple[str, Encoding]  # its text, and the encoding of it or of a longer text
THINK = "<think>"  # ends the prompts of many reasoning models


class Span(NamedTuple):
    """Tokens `start` to `end` of a sequence, and the characters they cover.

    Attributes:
      start: index of the first token.
      end: index after the last token; equal to start when the span is empty.
      offsets: [end - start, 2] int32 characters, counted from the start of the text.
    """

    start: int
    end: int
    offsets: np.ndarray


EMPTY = Span(0, 0, np.zeros((0, 2), np.int32))


class Example(NamedTuple):
    """One sequence, before it is packed.

    Attributes:
      tokens: [T] int32.
      loss_mask: [T] bool, the tokens that a model learns or has sampled.
      explanation: tokens of the explanation; empty where the policy is a student.
      solution: tokens of the solution; empty in the sequences of a teacher.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    explanation: Span
    solution: Span


class Renderer:
    """Turns problems into what a model of one role reads, each prompt rendered once.

    Attributes:
      tokenizer: of the model.
      template: system prompts, tags and delimiters.
      role: "teacher", which sees the solution and explains it, or "student".
      opened: the student's opening tag and the whitespace after it, where the model's chat
        template ends with them; else "".

    Raises:
      UserError: the chat template has no place for the system prompt.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, role: str) -> None:
        self.tokenizer, self.template, self.role = tokenizer, template, role
        places = {"system": True, "user": False, "auto": tokenizer.takes_system}
        self._as_system = places[template.system_role]
        if self._as_system and template.system(role) and not tokenizer.takes_system:
            raise UserError(
                f"tokenizer {tokenizer.path}: the chat template has no place for the "
                'system prompt. Set system_role to "auto" in the template.'
            )
        tags = map(re.escape, (template.thought_tags[0], THINK))
        opening = rf"({'|'.join(tags)})\s*\Z"
        found = re.search(opening, self._chat(Problem("question", "")))
        is_ours = found and found[1] == template.thought_tags[0] and role == "student"
        self.opened = found[0] if is_ours else ""
        # A solution, or other tags, would be in a thought.
        self._unwanted = found[0] if found and not is_ours else ""
        # A group of completions shares its prompt, and so do all students of a tokenizer.
        cache = functools.lru_cache(maxsize=4096)
        self.prompt_text: Callable[[Problem], str] = cache(self._prompt_text)
        self.prompt: Callable[[Problem], Prompt] = cache(self._prompt)

    def _chat(self, problem: Problem) -> str:
        messages = self.template.messages(self.role, problem, self._as_system)
        return self.tokenizer.render(messages)

    def _prompt_text(self, problem: Problem) -> str:
        """The chat up to where the model continues."""
        text = self._chat(problem).removesuffix(self._unwanted)
        if self.role == "teacher":
            text += self.template.teacher_prefix(problem)
        return text

    def _prompt(self, problem: Problem) -> Prompt:
        """The text of the prompt, its ids and offsets."""
        text = self.prompt_text(problem)
        return text, self.tokenizer.encode(text)

    def encode(self, problems: Sequence[Problem], turns: Sequence[str]) -> list[Prompt]:
        """For each problem the text of its prompt, and the encoding of prompt and turn.

        Prompt and turn are encoded as one text; the part of the prompt that does not
        depend on what follows is encoded once a problem.
        """
        groups: dict[Problem, list[str]] = {}
        for problem, turn in zip(problems, turns, strict=True):
            groups.setdefault(problem, []).append(turn)
        prompts = {problem: self.prompt_text(problem) for problem in groups}
        # Texts that share no prompt are encoded in one call, as each call has a cost.
        single = [one for one, of_one in groups.items() if len(of_one) == 1]
        texts = [prompts[one] + groups[one][0] for one in single]
        encodings = self.tokenizer.encode_batch(texts)
        encoded = {x: iter([y]) for x, y in zip(single, encodings, strict=True)}
        for one, of_one in groups.items():
            if one not in encoded:
                several = self.tokenizer.encode_with_prefix(prompts[one], of_one)
                encoded[one] = iter(several)
        return [(prompts[problem], next(encoded[problem])) for problem in problems]


def student_renderers(
    tokenizers: Sequence[Tokenizer], template: Template
) -> tuple[Renderer, ...]:
    """A renderer for every student; one object for those with the same prompts."""

    def key(t: Tokenizer) -> Hashable:
        return t.path, t.vocab_size, t.chat and t.chat.source, repr(t.variables)

    made = {key(one): Renderer(one, template, "student") for one in tokenizers}
    return tuple(made[key(one)] for one in tokenizers)


def lie_inside(offsets: np.ndarray, start: int, end: int) -> np.ndarray:
    """[T] bool, tokens whose characters lie wholly in [start, end), not empty ones."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    return (starts >= start) & (ends <= end) & (ends > starts)


def find_span(offsets: np.ndarray, start: int, end: int) -> Span:
    """Tokens whose characters lie wholly in [start, end), empty tokens left out."""
    inside = np.flatnonzero(lie_inside(offsets, start, end))
    if not inside.size:
        return EMPTY
    first, last = int(inside[0]), int(inside[-1]) + 1
    return Span(first, last, offsets[first:last] - start)


def align(left: Span, right: Span, same_ids: bool = False) -> tuple[np.ndarray, ...]:
    """Finest common segmentation of two tokenisations of one text.

    Args:
      left: span in one sequence.
      right: span of the same text in another sequence.
      same_ids: whether the spans have the same ids, so that tokens that share a
        character are the same parts of it.

    Returns:
      For each token of left and of right the segment it belongs to, -1 for tokens at
      the borders that the other sequence has no counterpart for.

        left  |ab|c|d|    cuts 0 2 3 4     common cuts 0 3 4
        right |a|bc|d|    cuts 0 1 3 4     segments 0 0 1 and 0 0 1
    """
    if same_ids and len(left.offsets) == len(right.offsets):
        same = np.arange(len(left.offsets), dtype=np.int32)
        return same, same
    both = left.offsets, right.offsets
    cuts = np.intersect1d(*(np.append(x[:, 0], x[-1:, 1]) for x in both))
    return tuple(_segments(offsets, cuts) for offsets in both)


def _segments(offsets: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    segment = np.searchsorted(cuts, offsets[:, 0], side="right") - 1
    inside = (segment >= 0) & (segment < len(cuts) - 1)
    return np.where(inside, segment, -1).astype(np.int32)


def student_examples(renderer: Renderer, traces: Sequence[Trace]) -> list[Example]:
    """Canonical sequences of traces as a student sees them: thought, then solution.

    `loss_mask` covers the student's whole turn with its end.
    """
    template = renderer.template
    turns = [template.student_turn(trace, renderer.opened) for trace in traces]
    ended = [turn + renderer.tokenizer.end_of_turn for turn in turns]
    encoded, examples = renderer.encode([trace.problem for trace in traces], ended), []
    for trace, turn, one in zip(traces, turns, encoded, strict=True):
        prompt, (tokens, offsets) = one
        # From the end: the prompt may hold the opening tag.
        end = len(prompt) + len(turn)
        thought_end = end - len(template.after_thought(trace.problem))
        start = thought_end - len(template.body(trace.explanation))
        thought = find_span(offsets, start, thought_end)
        end -= len(template.solution_tags[1])
        solution = find_span(offsets, end - len(trace.problem.solution), end)
        loss_mask = offsets[:, 0] >= len(prompt)
        examples.append(Example(tokens, loss_mask, thought, solution))
    return examples


def teacher_examples(renderer: Renderer, traces: Sequence[Trace]) -> list[Example]:
    """Canonical sequences of traces as if a teacher had generated them.

    `loss_mask` covers what the teacher generates: the explanation after its opening tag,
    the closing tag and the end of the turn.
    """
    texts = [renderer.template.teacher_turn(trace.explanation) for trace in traces]
    return text_examples(renderer, [trace.problem for trace in traces], texts)


EXAMPLES = {"teacher": teacher_examples, "student": student_examples}


def completion_example(
    renderer: Renderer,
    problem: Problem,
    completion: np.ndarray,
    text: str,
    offsets: np.ndarray,
) -> Example:
    """Sequence of a problem and a completion that keeps the sampled ids.

    Args:
      renderer: of the policy.
      problem: question and solution.
      completion: [T] int32 ids after the prompt, the stop token included.
      text: its text without the stop token.
      offsets: [T, 2] int32, characters of the text that each id stands for.

    Returns:
      The sequence; `loss_mask` covers the completion.
    """
    prompt, (prompt_tokens, prompt_offsets) = renderer.prompt(problem)
    tokens = np.concatenate([prompt_tokens, completion]).astype(np.int32)
    loss_mask = np.arange(len(tokens)) >= len(prompt_tokens)
    if renderer.role == "student":
        return Example(tokens, loss_mask, EMPTY, EMPTY)
    body, _ = renderer.template.parse_completion(text)
    offsets = np.concatenate([prompt_offsets, offsets + np.int32(len(prompt))])
    start = len(prompt) - len(renderer.template.pad)
    explanation = find_span(offsets, start, start + len(body))
    return Example(tokens, loss_mask, explanation, EMPTY)


def text_examples(
    renderer: Renderer, problems: Sequence[Problem], completions: Sequence[str]
) -> list[Example]:
    """Canonical sequences of a teacher's completions of which only the text is known.

    Prompt and completion are encoded as one text. A missing closing tag is added, so
    that the last token of the explanation is the same as in a closed one.
    """
    template = renderer.template
    parsed = [template.parse_completion(text) for text in completions]
    closing, end = template.explanation_tags[1], renderer.tokenizer.end_of_turn
    pairs = zip(completions, parsed, strict=True)
    turns = [text + closing * (not closed) + end for text, (_, closed) in pairs]
    encoded, examples = renderer.encode(problems, turns), []
    for (body, _), (prompt, (tokens, offsets)) in zip(parsed, encoded, strict=True):
        start = len(prompt) - len(template.pad)
        explanation = find_span(offsets, start, start + len(body))
        loss_mask = offsets[:, 0] >= len(prompt)
        examples.append(Example(tokens, loss_mask, explanation, EMPTY))
    return examples


def decode_completion(tokenizer: Tokenizer, completion: np.ndarray) -> Decoded:
    """Text of a completion without its stop token, and offsets [T, 2] of all ids."""
    stopped = len(completion) > 0 and int(completion[-1]) in tokenizer.stop_ids
    text, offsets = tokenizer.decode_with_offsets(completion[: -1 if stopped else None])
    if stopped:
        offsets = np.pad(offsets, ((0, 1), (0, 0)), constant_values=len(text))
    return text, offsets
