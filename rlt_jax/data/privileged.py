"""Privileged sequences: a student's attempt as a teacher reads it that knows more.

    student:  chat(student_system, q) | attempt
    teacher:  chat(student_system, privileged(q, seen)) | attempt       prompt "privileged"
              teacher_prefix(q, seen) | thought of the attempt + closing tag      "teacher"

`seen` is what the teacher is shown: by default the solution. In the first form every token
of the attempt is judged, by any model that follows instructions. The second is the form
that a reinforcement-learned teacher was trained in; it judges the thought and where it
ends: the closing tags of the two count as the same token (see `closing_ids`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlt_jax.data import controls, rows, templates, token_bytes
from rlt_jax.data.examples import EMPTY, Example, Renderer, Span, find_span, lie_inside
from rlt_jax.data.tokenizer import Tokenizer
from rlt_jax.records import Problem
from rlt_jax.types import Rollout

PROMPTS = ("teacher", "privileged")
SEES = ("nothing", "solution", "explanation", "attempt", "other")


def seen_texts(
    sees: str,
    template: templates.Template,
    explanations: Mapping[Any, str],
    problems: Sequence[Problem],
    right: Sequence[str | None] = (),
) -> list[str | None]:
    """What the teacher is shown of each problem; None where there is nothing.

    Args:
      sees: "nothing", so that the teacher reads what the student does; "solution";
        "explanation", an explanation of the problem and its solution;
        "attempt", the first right attempt of the group but the completion itself;
        "other", the solution of another question, a control (arXiv 2608.09228).
      template: what stands between explanation and solution.
      explanations: `Problem.asked` -> explanation.
      problems: of E completions, those of a question side by side.
      right: E, the text of each completion that is right, else None.
    """
    if sees == "other":
        return controls.other_solutions(problems)
    if sees == "explanation":
        joined = template.delimiter or "\n\n"
        told = ((explanations.get(one.asked), one.solution) for one in problems)
        return [None if z is None else z.strip() + joined + s for z, s in told]
    if sees == "attempt":
        attempts = [(m, text) for m, text in enumerate(right) if text is not None]
        return [
            next((x for m, x in attempts if m != n and problems[m] == problem), None)
            for n, problem in enumerate(problems)
        ]
    return [problem.solution * (sees == "solution") for problem in problems]


def privileged_prompt(
    renderer: Renderer, student: Renderer, problem: Problem
) -> tuple[str, token_bytes.Encoding]:
    """What a teacher reads before an attempt; `problem.solution` is what it is shown."""
    if renderer.role == "student" and problem.solution:
        question = renderer.template.privileged_question(problem)
        problem = problem._replace(question=question)
    prompt, encoding = renderer.prompt(problem)
    if renderer.role == "teacher" or renderer.opened == student.opened:
        return prompt, encoding
    # The attempt has its opening tag where the student's own prompt does not end with it.
    prompt = prompt.removesuffix(renderer.opened) + student.opened
    return prompt, renderer.tokenizer.encode(prompt)


def privileged_examples(
    renderer: Renderer,
    student: Renderer,
    rollout: Rollout,
    seen: Sequence[str | None],
    limit: int,
) -> tuple[list[Example], list[Example]]:
    """Sequences of a teacher and the completions that it judges.

    The span `explanation` of both holds the text that is judged; it is empty where nothing
    is seen, or where the teacher's sequence is longer than the limit.

    Args:
      renderer: the teacher's; its role is the form of the prompt.
      student: the student's.
      rollout: E completions, decoded.
      seen: from `seen_texts`.
      limit: tokens of a sequence.
    """
    judge = _as_teacher if renderer.role == "teacher" else _as_student
    sequences, completions = [], []
    for n, (request, shown) in enumerate(zip(rollout.requests, seen, strict=True)):
        tokens, one, span = rollout.tokens[n], rows.ABSENT, EMPTY
        if shown is not None:
            problem = request.problem._replace(solution=shown)
            one, span = judge(renderer, student, problem, rollout, n)
            if len(one.tokens) > limit:
                one, span = rows.ABSENT, EMPTY
        sequences.append(one)
        completions.append(Example(tokens, np.ones(len(tokens), bool), span, EMPTY))
    return sequences, completions


def closing_ids(tokenizer: Tokenizer, template: templates.Template) -> tuple[int, int]:
    """Ids with which the closing tags of an explanation and of a thought begin."""
    tags = template.explanation_tags[1], template.thought_tags[1]
    encoded = [tokenizer.encode(f"0{tag}") for tag in tags]
    return tuple(int(ids[offsets[:, 1] > 1][0]) for ids, offsets in encoded)


def _as_student(
    renderer: Renderer, student: Renderer, problem: Problem, rollout: Rollout, n: int
) -> tuple[Example, Span]:
    """The attempt after a question with the solution in it, and all its tokens."""
    tokens, text, offsets = rollout.tokens[n], rollout.texts[n], rollout.offsets[n]
    prompt, (ids, _) = privileged_prompt(renderer, student, problem)
    if renderer.tokenizer.pieces == student.tokenizer.pieces:
        own = Span(0, len(tokens), offsets)
        span = Span(len(ids), len(ids) + len(tokens), offsets)
        all_ids = np.concatenate([ids, tokens]).astype(np.int32)
    else:
        whole = prompt + text + renderer.tokenizer.end_of_turn
        all_ids, places = renderer.tokenizer.encode(whole)
        first, end = len(prompt), len(text)
        if len(tokens) and int(tokens[-1]) in student.tokenizer.stop_ids:
            # The stop tokens of the two are compared, too.
            offsets = _as_one(offsets, -1, end)
            places = _as_one(places, -1, first + end)
            end += 1
        span = find_span(places, first, first + end)
        own = find_span(offsets, 0, end)
    return Example(all_ids, np.ones(len(all_ids), bool), span, EMPTY), own


def _as_teacher(
    renderer: Renderer, student: Renderer, problem: Problem, rollout: Rollout, n: int
) -> tuple[Example, Span]:
    """The thought as an explanation of the solution, and its tokens in the attempt."""
    text, offsets, template = rollout.texts[n], rollout.offsets[n], renderer.template
    (opening, closing), (_, told) = template.thought_tags, template.explanation_tags
    at = text.find(opening)
    start = 0 if student.opened or at < 0 else at + len(opening)
    end = text.find(closing, start)
    closed = end >= 0
    if not closed:  # or in the middle of the tag
        cut = max(k for k in range(len(closing)) if text.endswith(closing[:k]))
        end = max(len(text) - cut, start)
    start += len(template.pad) * text.startswith(template.pad, start)
    turn = text[start:end] + told * closed + renderer.tokenizer.end_of_turn
    ((prompt, (all_ids, places)),) = renderer.encode([problem], [turn])
    first, last = len(prompt), len(prompt) + end - start
    if closed and end in offsets[:, 0] and last in places[:, 0]:
        # The closing tags of the two are compared, too, unless text is merged into one.
        offsets = _as_one(offsets, lie_inside(offsets, end, end + len(closing)), end)
        places = _as_one(places, lie_inside(places, last, last + len(told)), last)
        last, end = last + 1, end + 1
    span, own = find_span(places, first, last), find_span(offsets, start, end)
    return Example(all_ids, np.ones(len(all_ids), bool), span, EMPTY), own


def _as_one(offsets: np.ndarray, which: Any, place: int) -> np.ndarray:
    """Offsets in which some tokens stand for the same single character at a place."""
    offsets = offsets.copy()
    offsets[which] = place, place + 1
    return offsets
