"""Templates: bodies, tags, and the messages about bad template files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from rlt_jax.data.templates import Template, load_template
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Trace
from tests.data.mutations import (
    COUNTS,
    TEXTS,
    check_settings,
    message_of,
    mutated_json,
)

PROBLEM = Problem("3+4?", "It is 7.", "7")
PLAIN = Template(
    teacher_system="",
    student_system="Think.",
    explanation_tags=("<e>", "</e>"),
    thought_tags=("<t>", "</t>"),
    solution_tags=("<s>", "</s>"),
    pad="\n",
    delimiter=" | ",
)


def test_turns_are_put_together_as_documented() -> None:
    assert PLAIN.teacher_prefix(PROBLEM) == "<s>It is 7.</s> | <e>\n"
    turn = PLAIN.student_turn(Trace(PROBLEM, "3+4=7"))
    assert turn == "<t>\n3+4=7\n</t> | <s>It is 7.</s>"


def test_an_empty_system_prompt_is_left_out() -> None:
    user = {"role": "user", "content": "3+4?"}
    for as_system in (True, False):
        assert PLAIN.messages("teacher", PROBLEM, as_system) == [user]
    system = {"role": "system", "content": "Think."}
    assert PLAIN.messages("student", PROBLEM, True) == [system, user]


def test_a_system_prompt_may_stand_in_the_first_user_turn() -> None:
    user = {"role": "user", "content": "Think.\n\n3+4?"}
    assert PLAIN.messages("student", PROBLEM, False) == [user]
    problem = PROBLEM._replace(history=(("user", "1+1?"), ("assistant", "2")))
    first = {"role": "user", "content": "1+1?"}
    turns = [{"role": "assistant", "content": "2"}, {"role": "user", "content": "3+4?"}]
    system = {"role": "system", "content": "Think."}
    assert PLAIN.messages("student", problem, True) == [system, first, *turns]
    first = {"role": "user", "content": "Think.\n\n1+1?"}
    assert PLAIN.messages("student", problem, False) == [first, *turns]


def test_a_system_prompt_is_not_put_in_a_turn_of_the_assistant() -> None:
    problem = PROBLEM._replace(history=(("assistant", "Hello!"),))
    user = {"role": "user", "content": "Think.\n\n3+4?"}
    greeting = {"role": "assistant", "content": "Hello!"}
    assert PLAIN.messages("student", problem, False) == [greeting, user]


def test_a_teacher_may_have_tags_and_a_delimiter_of_its_own() -> None:
    assert PLAIN.teacher_delimiter == PLAIN.delimiter
    assert PLAIN.teacher_solution_tags == PLAIN.solution_tags
    template = dataclasses.replace(
        PLAIN,
        teacher_delimiter="",
        teacher_solution_tags=["<a>", "</a>"],
        thought_prefix="Well: ",
    )
    assert template.teacher_prefix(PROBLEM) == "<a>It is 7.</a><e>\n"
    turn = template.student_turn(Trace(PROBLEM, "3+4=7"))
    assert turn == "Well: <t>\n3+4=7\n</t> | <s>It is 7.</s>"
    with pytest.raises(UserError, match="teacher_solution_tags"):
        dataclasses.replace(PLAIN, teacher_solution_tags=("<a>", ""))


@pytest.mark.parametrize(
    ("pad", "opened", "start"),
    [
        ("\n", "", "Well: <t>\nx\n"),
        ("\n", "<t>", "\nx\n"),
        ("\n", "<t>\n", "x\n"),
        ("\n\n", "<t>\n", "\nx\n\n"),
        ("\n", "<t>\n\n", "x\n"),
        ("", "<t>\n", "x"),
    ],
)
def test_an_opened_thought_goes_on_after_the_opening(
    pad: str, opened: str, start: str
) -> None:
    template = dataclasses.replace(PLAIN, pad=pad, thought_prefix="Well: ")
    turn = template.student_turn(Trace(PROBLEM, "x"), opened)
    assert turn == start + "</t> | <s>It is 7.</s>"


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("x", "\nx\n"),
        ("\nx\n", "\nx\n"),
        ("\nx", "\nx"),
        ("", "\n\n"),
        ("x\n", "\nx\n\n"),
    ],
)
def test_a_body_is_padded_unless_it_is_already(text: str, body: str) -> None:
    assert PLAIN.body(text) == body
    assert PLAIN.body(body) == body


def test_without_pad_a_body_is_the_text() -> None:
    bare = dataclasses.replace(PLAIN, pad="")
    assert bare.body("x") == "x"
    assert bare.parse_completion("x</e>") == ("x", True)


@pytest.mark.parametrize(
    ("completion", "body", "closed"),
    [
        ("x\n</e>", "\nx\n", True),
        ("x\n", "\nx\n", False),
        ("x</e>y</e>z", "\nx", True),
        ("x</t></s>y", "\nx</t></s>y", False),
        ("</e>", "\n", True),
        ("", "\n", False),
        ("x</", "\nx</", False),
        ("<e>x</e>", "\n<e>x", True),
    ],
)
def test_the_explanation_ends_at_the_first_closing_tag(
    completion: str, body: str, closed: bool
) -> None:
    assert PLAIN.parse_completion(completion) == (body, closed)


@pytest.mark.parametrize(
    ("completion", "solution"),
    [
        ("<t>..</t> | <s> 7 </s>", "7"),
        ("<s>7", "7"),
        ("<s>6</s> no: <s>7</s> done", "7"),
        ("no tags", None),
        ("<s></s>", ""),
    ],
)
def test_the_solution_is_the_last_tagged_part(
    completion: str, solution: str | None
) -> None:
    assert PLAIN.solution_of(completion) == solution


@pytest.mark.parametrize("name", ["tiny", "rlt"])
def test_a_shipped_template_can_be_copied_and_named_by_path(
    name: str, tmp_path: Path
) -> None:
    template = load_template(name)
    copy = tmp_path / "mine.json"
    copy.write_text(json.dumps(dataclasses.asdict(template)))
    assert load_template(str(copy)) == template


def test_bad_template_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a file nor .* \(rlt, short, tiny\)"):
        load_template("no_such_template")
    file = tmp_path / "mine.json"
    file.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_template(str(file))
    fields = dataclasses.asdict(PLAIN)
    for bad, message in [
        ([], "mine.json is damaged: it is .*, no keys and values"),
        (fields | {"colour": "red"}, "unknown key 'colour'"),
        ({"pad": ""}, "the key 'teacher_system' is missing"),
        (fields | {"pad": 1}, "mine.json: it.pad=1: a text"),
        (fields | {"thought_prefix": None}, "thought_prefix=None: a text"),
        (fields | {"system_role": "tool"}, "system_role"),
    ]:
        file.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):
            load_template(str(file))
    for tags in (["<e>"], ["<e>", ""], ["<e>", 1], ["<e>", " \n"], "ee", 5, None, {}):
        file.write_text(json.dumps(fields | {"explanation_tags": tags}))
        with pytest.raises(UserError, match=f"^template {file}: .*explanation_tags"):
            load_template(str(file))


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:8])
def test_a_file_that_is_no_json_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^template {file}: ") as raised:
        load_template(str(file))
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solution_tags": ("<t>", "</s>")}, "'<t>' stands in '<t>'"),
        ({"explanation_tags": ("<e>", "</s>.")}, "'</s>' stands in '</s>.'"),
        ({"explanation_tags": ("<e>", "<e>")}, "'<e>' stands in '<e>'"),
        ({"explanation_tags": ("e", "</e>")}, "'e' stands in '</e>'"),
        ({"thought_tags": ("<t>", "</t><s>")}, "'<s>' stands in '</t><s>'"),
        ({"teacher_solution_tags": ("<a>", "<e>")}, "'<e>' stands in '<e>'"),
    ],
)
def test_tags_of_a_sequence_are_told_apart(
    changes: dict[str, tuple[str, str]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAIN, **changes)


def test_a_teacher_may_have_the_tags_of_a_thought() -> None:
    template = dataclasses.replace(PLAIN, explanation_tags=PLAIN.thought_tags)
    assert template.parse_completion("x</t>") == ("\nx", True)


@pytest.mark.parametrize(
    "examples", [COUNTS[0], pytest.param(COUNTS[1], marks=pytest.mark.slow)]
)
def test_any_template_is_valid_or_named(examples: int, tmp_path: Path) -> None:
    file, outcomes = tmp_path / "mine.json", []

    def use() -> None:
        template = load_template(str(file))
        template.teacher_prefix(PROBLEM)
        template.student_turn(Trace(PROBLEM, "3+4=7"))
        template.messages("teacher", PROBLEM, True)
        template.parse_completion(template.privileged_question(PROBLEM))

    @check_settings(examples)
    @given(mutated_json(dataclasses.asdict(PLAIN)))
    def check(content: Any) -> None:
        file.write_text(json.dumps(content))
        outcomes.append(message_of(use, str(file)))

    check()
    assert 0 < sum(map(bool, outcomes)) < len(outcomes)
