"""Reading problems and traces: every format, and every message."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlt_jax.data.pipeline import load_traces
from rlt_jax.data.templates import load_template
from rlt_jax.data.traces import read_completions, read_problems, read_traces
from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Trace, history_of, problem_record

TEMPLATE = load_template("rlt")
REPLY = (
    "<|begin_of_thought|>\n\n3 + 4 = 7\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is 7.\n\n<|end_of_solution|>"
)
ROW = {"question": "3+4?", "solution": "It is 7.", "reasoning_trace": "3 + 4 = 7"}
TRACE = Trace(Problem("3+4?", "It is 7."), "3 + 4 = 7")
BODIES = Trace(Problem("3+4?", "\n\nIt is 7.\n\n"), "\n\n3 + 4 = 7\n\n")


def chat(*turns: tuple[str, Any], keys: tuple[str, str] = ("from", "value")) -> dict:
    turns = turns or (("user", "3+4?"), ("assistant", REPLY))
    return {"conversations": [dict(zip(keys, turn, strict=True)) for turn in turns]}


def write(file: Path, *rows: Any) -> str:
    """Writes the rows in the format of the file's ending; strings are raw lines."""
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), file)
    else:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(file)


@pytest.fixture(params=["data.jsonl", "data.json", "data.parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def test_plain_columns_round_trip(file: Path) -> None:
    rows = [ROW | {"answer": str(i), "question": f"{i}?"} for i in range(5)]
    traces = read_traces(write(file, *rows), TEMPLATE)
    assert [t.problem.question for t in traces] == [f"{i}?" for i in range(5)]
    assert [t.problem.answer for t in traces] == [str(i) for i in range(5)]
    assert {t.explanation for t in traces} == {ROW["reasoning_trace"]}
    assert read_problems(str(file), TEMPLATE) == [t.problem for t in traces]
    assert read_traces(str(file), TEMPLATE, limit=2) == traces[:2]
    assert read_problems(str(file), TEMPLATE, limit=9) == [t.problem for t in traces]


def test_traces_are_scored_as_a_student_learns_them(file: Path) -> None:
    for row in (chat(), ROW):
        (trace,) = read_traces(write(file, row), TEMPLATE)
        ((problem, (completion,)),) = read_completions(str(file), TEMPLATE)
        body, is_closed = TEMPLATE.parse_completion(completion)
        assert is_closed
        scored = Trace(problem, body)
        assert TEMPLATE.student_turn(scored) == TEMPLATE.student_turn(trace)


def test_what_was_cut_off_is_not_learned_and_is_scored_as_open(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [ROW | {"closed": True}, ROW | {"closed": False}, ROW | {"closed": True}]
    assert len(read_traces(write(file, *rows), TEMPLATE)) == 2
    assert "1 of 3 traces, cut off" in caplog.text
    assert len(read_traces(str(file), TEMPLATE, keep_cut_off=True)) == 3
    other = write(file.with_name("other.jsonl"), ROW | {"closed": False})
    with pytest.raises(UserError, match="all 1 traces were cut off "):
        read_traces(other, TEMPLATE)
    completions = [texts[0] for _, texts in read_completions(str(file), TEMPLATE)]
    closed = [TEMPLATE.parse_completion(text)[1] for text in completions]
    assert closed == [True, False, True]


def test_an_empty_cell_of_a_table_is_no_value(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    long = "x" * 200_000
    file.write_text(f"question,solution,answer\nq1,,5\nq2,{long},\n", encoding="utf-8")
    assert read_problems(str(file), TEMPLATE) == [
        Problem("q1", "5", "5"),
        Problem("q2", long, None),
    ]


@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("user, assistant", [("user", "assistant"), ("human", "gpt")])
def test_conversations(
    file: Path, keys: tuple[str, str], user: str, assistant: str
) -> None:
    row = chat(
        ("system", "Be good."), (user, "3+4?"), (assistant, REPLY), keys=keys
    ) | {"system": "Think."}
    assert read_traces(write(file, row), TEMPLATE) == [BODIES]
    assert read_problems(str(file), TEMPLATE) == [BODIES.problem]


def test_a_published_conversation_becomes_the_same_student_turn(file: Path) -> None:
    (trace,) = read_traces(write(file, chat()), TEMPLATE)
    assert TEMPLATE.student_turn(trace) == REPLY


def test_a_plain_row_makes_a_student_turn_with_a_padded_thought(file: Path) -> None:
    (trace,) = read_traces(write(file, ROW), TEMPLATE)
    assert trace == TRACE
    # The explanation is padded; the solution stands between its tags as it is.
    solution = ROW["solution"]
    assert TEMPLATE.student_turn(trace) == REPLY.replace(
        f"\n\n{solution}\n\n", solution
    )


def test_a_thought_may_quote_the_tags_of_the_solution(file: Path) -> None:
    quoted = "<|begin_of_solution|>no<|end_of_solution|>"
    row = chat(("user", "3+4?"), ("assistant", REPLY.replace("3 + 4", quoted)))
    (trace,) = read_traces(write(file, row), TEMPLATE)
    assert trace.problem == BODIES.problem
    assert quoted in trace.explanation
    assert read_problems(str(file), TEMPLATE) == [BODIES.problem]


def test_problems_need_no_trace(file: Path) -> None:
    row = {"question": "3+4?", "solution": "It is 7.", "reasoning_trace": None}
    assert read_problems(write(file, row), TEMPLATE) == [TRACE.problem]
    reply = REPLY.partition("<|end_of_thought|>\n\n")[2]
    row = chat(("user", "3+4?"), ("assistant", reply))
    assert read_problems(write(file, row), TEMPLATE) == [BODIES.problem]


def test_prompt_is_another_name_of_question(file: Path) -> None:
    row = {"prompt": "3+4?", "solution": "It is 7.", "question": None}
    assert read_problems(write(file, row), TEMPLATE) == [TRACE.problem]


def test_a_conversation_takes_its_answer_from_the_row(file: Path) -> None:
    row = chat() | {"answer": "7", "question": "another", "solution": None}
    expected = BODIES.problem._replace(answer="7")
    assert read_problems(write(file, row), TEMPLATE) == [expected]


@pytest.mark.parametrize(
    "answer, text",
    [("7", "7"), ("", ""), (7, "7"), (0, "0"), (0.5, "0.5"), (None, None)],
)
def test_answers_become_text(file: Path, answer: Any, text: str | None) -> None:
    (problem,) = read_problems(write(file, ROW | {"answer": answer}), TEMPLATE)
    assert problem.answer == text


def test_texts_are_verbatim(file: Path) -> None:
    odd = " \n\ttwo\u2028lines \u00e9\U0001f600\x0b\r\n"
    row = dict.fromkeys(ROW, odd)
    assert read_traces(write(file, row), TEMPLATE) == [Trace(Problem(odd, odd), odd)]


def test_unescaped_separators_do_not_end_a_line(tmp_path: Path) -> None:
    line = json.dumps(ROW | {"question": "a\u2028b\x85c"}, ensure_ascii=False)
    (problem,) = read_problems(write(tmp_path / "a.jsonl", line), TEMPLATE)
    assert problem.question == "a\u2028b\x85c"


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "", ROW, "  \t", ROW, "")
    assert read_traces(path, TEMPLATE) == [TRACE, TRACE]
    path = write(tmp_path / "a.jsonl", "", ROW, "", "{")
    with pytest.raises(UserError, match="a.jsonl, line 4: not valid JSON"):
        read_traces(path, TEMPLATE)


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-8-sig")
    assert read_traces(str(path), TEMPLATE) == [TRACE]


def test_other_parquet_columns_are_not_even_converted(tmp_path: Path) -> None:
    # Nanoseconds have no Python value: converting this column raises.
    table = pa.Table.from_pylist([ROW]).append_column(
        "time", pa.array([1], pa.timestamp("ns"))
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_traces(str(tmp_path / "a.parquet"), TEMPLATE) == [TRACE]


def test_directories_and_globs_are_read_in_order(tmp_path: Path) -> None:
    names = ["c.parquet", "a.jsonl", "b.json"]
    for name in names:
        write(tmp_path / name, ROW | {"question": name})
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "d.jsonl").mkdir()

    def questions(path: Path) -> list[str]:
        return [p.question for p in read_problems(str(path), TEMPLATE)]

    assert questions(tmp_path) == sorted(names)
    assert questions(tmp_path / "*.json*") == ["a.jsonl", "b.json"]
    assert questions(tmp_path / "**" / "*.parquet") == ["c.parquet"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    path = write(tmp_path / "a[1].jsonl", ROW)
    assert read_traces(path, TEMPLATE) == [TRACE]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"solution": "s"}, "question or prompt is missing; the keys are solution. A"),
        (
            {"question": None, "solution": "s"},
            "the keys are question, solution. A record",
        ),
        ({"text": "t"}, "question or prompt is missing; the keys are text. A"),
        (
            {"question": "q", "id": 1},
            "solution is missing; the keys are question, id. A",
        ),
        (ROW | {"question": 5}, "question is 5 (int); it must be a string"),
        (ROW | {"solution": ["s"]}, "solution is ['s'] (list); it must be a string"),
        (ROW | {"question": " \n"}, "the question is empty; remove the record"),
        (
            ROW | {"answer": True},
            "answer is True (bool); it must be a string, a number",
        ),
        (
            ROW | {"answer": ["7"]},
            "answer is ['7'] (list); it must be a string, a number or null",
        ),
        (ROW | {"answer": float("nan")}, "answer is nan (float); it must be a string"),
        ({"conversations": "hi"}, "conversations is 'hi' (str); it must be a list"),
        (
            {"conversations": ["hi"]},
            "conversations is ['hi'] (list); it must be a list of turns",
        ),
        (
            chat(("tool", "x")),
            "roles in conversations are ['tool']; there must be turns of user",
        ),
        (chat(("user", 5)), ", turn 1: value is 5 (int); it must be a string"),
        (chat(("user", "q"), ("gpt", None)), ", turn 2: content or value is missing"),
        (chat(("system", "s")), "the roles in conversations are []; there must"),
        (chat(("gpt", REPLY)), "roles in conversations are ['assistant']; there"),
        (chat(("user", " "), ("gpt", REPLY)), "the question is empty"),
        (
            chat(("user", "q"), ("user", "q"), ("gpt", REPLY)),
            "conversations are ['user', 'user', 'assistant']; there must be turns of",
        ),
        (
            chat(("user", "q"), ("gpt", "<|begin_of_thought|>7")),
            "<|begin_of_solution|> is missing in the assistant's turn, or in the wrong",
        ),
        (
            chat(("user", "q"), ("gpt", REPLY.replace("<|end_of_solution|>", ""))),
            "<|end_of_solution|> is missing in the assistant's turn, or in the wrong",
        ),
    ],
)
def test_bad_rows_are_named(file: Path, row: dict, message: str) -> None:
    place = "record 1" if file.suffix == ".parquet" else "line 1"
    with pytest.raises(UserError) as error:
        read_problems(write(file, row), TEMPLATE)
    assert str(error.value).startswith(f"{file}, {place}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"question": "q", "solution": "s"},
            "reasoning_trace is missing; the keys are question, solution. A record",
        ),
        (ROW | {"reasoning_trace": 1.5}, "reasoning_trace is 1.5 (float); it must"),
        (ROW | {"closed": "perhaps"}, "closed is 'perhaps' (str); write true or false"),
        (ROW | {"closed": 0.5}, "closed is 0.5 (float); write true or false"),
        (ROW | {"closed": [True]}, "closed is [True] (list); write true or false"),
        (
            chat(("user", "q"), ("gpt", REPLY.replace("<|begin_of_thought|>", ""))),
            "<|begin_of_thought|> is missing in the assistant's turn, or in the wrong",
        ),
        (
            chat(("user", "q"), ("gpt", REPLY.replace("<|end_of_thought|>", ""))),
            "<|end_of_thought|> is missing in the assistant's turn, or in the wrong",
        ),
    ],
)
def test_rows_without_a_trace_are_named(file: Path, row: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_traces(write(file, row), TEMPLATE)
    assert str(error.value).startswith(f"{file}, ")
    assert message in str(error.value)


def test_the_row_in_the_message_is_the_bad_one(file: Path) -> None:
    place = "record 3" if file.suffix == ".parquet" else "line 3"
    path = write(file, ROW, ROW, ROW | {"question": ""}, ROW)
    with pytest.raises(UserError, match=f"{file.name}, {place}: the question is empty"):
        read_traces(path, TEMPLATE)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{'q': 1}\n", "line 1: not valid JSON: Expecting property name"),
        (b'{"question": "\xff"}\n', "line 1: not valid JSON: 'utf-8' codec"),
        (b"[\n", "line 1: not valid JSON: Expecting value: .*one JSON object per line"),
        (
            b"[1, 2]\n",
            r"line 1: the record is \[1, 2\] \(list\), not an object; write one",
        ),
        (b"null\n", r"line 1: the record is None \(NoneType\), not an object"),
        (b"", "a.jsonl: the file has no records; remove it from `path`"),
        (b"\n  \n", "a.jsonl: the file has no records"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_traces(str(tmp_path / "a.jsonl"), TEMPLATE)


def test_unreadable_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    whole = Path(write(path, ROW)).read_bytes()
    for content in (b"", b"no parquet", whole[:-4], whole[:4] + whole[40:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a.parquet cannot be read: "):
            read_traces(str(path), TEMPLATE)


def test_parquet_without_rows_is_named(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"question": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match="a.parquet: the file has no records"):
        read_problems(str(tmp_path / "a.parquet"), TEMPLATE)


@pytest.mark.parametrize("name", ["none.jsonl", "none*", "no/where"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file, folder or glob") as error:
        read_traces(str(tmp_path / name), TEMPLATE)
    assert str(error.value).startswith(repr(str(tmp_path / name)))


def test_directories_without_data_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(
        UserError, match="it has no file that ends in .jsonl, .json, .csv, .parquet"
    ):
        read_traces(str(tmp_path), TEMPLATE)


@pytest.mark.parametrize("pattern", ["a.txt", "*"])
def test_other_endings_are_named(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.txt").write_text("question,solution\n")
    with pytest.raises(
        UserError, match="a.txt: unknown file type '.txt'; convert to one"
    ):
        read_traces(str(tmp_path / pattern), TEMPLATE)


def test_an_empty_path_is_not_the_working_directory() -> None:
    with pytest.raises(UserError, match="'': no such file, folder"):
        read_traces("", TEMPLATE)


TURNS = (
    ("system", "Be good."),
    ("user", "Hello."),
    ("assistant", "Hello. How can I help?"),
    ("user", "3+4?"),
)
HISTORY = (("user", "Hello."), ("assistant", "Hello. How can I help?"))


def messages(*turns: tuple[str, str], column: str = "messages") -> dict:
    return {column: [{"role": role, "content": text} for role, text in turns]}


def test_the_last_turn_of_a_longer_conversation_is_learned(file: Path) -> None:
    path = write(file, messages(*TURNS, ("assistant", REPLY)))
    (trace,) = read_traces(path, TEMPLATE)
    assert trace == BODIES._replace(problem=BODIES.problem._replace(history=HISTORY))
    assert read_problems(path, TEMPLATE) == [trace.problem]


@pytest.mark.parametrize(
    ("extra", "solution", "answer"),
    [
        ({"reward_model": {"ground_truth": "7", "style": "rule"}}, "7", "7"),
        ({"reward_model": {"ground_truth": 7}, "answer": "8"}, "8", "8"),
        ({"answer": 7}, "7", "7"),
        ({"answer": "7", "solution": "It is 7."}, "It is 7.", "7"),
    ],
)
def test_a_prompt_is_continued(
    file: Path, extra: dict, solution: str, answer: str
) -> None:
    path = write(file, messages(*TURNS, column="prompt") | extra)
    problem = Problem("3+4?", solution, answer, history=HISTORY)
    assert read_problems(path, TEMPLATE) == [problem]


def test_a_reply_without_tags_is_the_solution(file: Path) -> None:
    path = write(file, messages(("user", "3+4?"), ("assistant", "3 + 4 is 7.")))
    assert read_problems(path, TEMPLATE) == [Problem("3+4?", "3 + 4 is 7.")]
    with pytest.raises(UserError, match="begin_of_thought|> is missing"):
        read_traces(path, TEMPLATE)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "3+4?", "solution": "3 + 4 is 7."},
        messages(("user", "3+4?"), ("assistant", "3 + 4 is 7.")),
    ],
)
def test_a_teacher_can_warm_up_on_the_working_of_solutions(
    file: Path, row: dict
) -> None:
    path = write(file, row)
    (trace,) = read_traces(path, TEMPLATE, missing_trace="solution")
    assert trace == Trace(Problem("3+4?", "3 + 4 is 7."), "3 + 4 is 7.")
    # Where there is a trace, that is learned.
    path = write(file.with_name("more.jsonl"), ROW, chat())
    assert read_traces(path, TEMPLATE, missing_trace="solution") == [TRACE, BODIES]
    with pytest.raises(UserError, match="missing_trace='x': one of error, solution"):
        config = {"task": "file", "path": path, "missing_trace": "x"}
        load_traces(config, TEMPLATE, seed=0)


def test_csv_is_read_as_jsonl_is(tmp_path: Path) -> None:
    rows = [
        {"closed": "False", "messages": json.dumps(messages(*TURNS)["messages"])},
        {"closed": "true", "completions": json.dumps(["a", "b"])},
        {"closed": "", "question": "true", "answer": "[1, 2]"},
        {"closed": " FALSE ", "reward_model": json.dumps({"ground_truth": "7"})},
    ]
    columns = ["question", "solution", "reasoning_trace", "answer", "closed"]
    columns += ["messages", "completions", "reward_model"]
    file = tmp_path / "data.csv"
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(ROW | row for row in rows)
    traces = read_traces(str(file), TEMPLATE)
    assert [trace.problem.question for trace in traces] == ["3+4?", "true"]
    assert traces[1].problem.answer == "[1, 2]"
    problems = read_problems(str(file), TEMPLATE)
    assert problems[0].history == HISTORY
    assert problems[3].answer == "7"
    completions = [texts for _, texts in read_completions(str(file), TEMPLATE)]
    assert completions[1] == ["a", "b"]
    file.write_text('question,solution,completions\nq,s,"[a"\n', encoding="utf-8")
    with pytest.raises(
        UserError, match=r"completions is '\[a' .* in a CSV file as JSON"
    ):
        list(read_completions(str(file), TEMPLATE))


def test_bad_completions_are_skipped_if_asked(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good = '{"question": "q", "solution": "s", "completions": ["a", "b"]}'
    file.write_text(f"{good}\n{good.replace('[', '7, [')}\n{good}\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2"):
        list(read_completions(str(file), TEMPLATE))
    found = list(read_completions(str(file), TEMPLATE, on_bad_row="skip"))
    assert [texts for _, texts in found] == [["a", "b"]] * 2


def test_what_a_run_writes_keeps_the_history(tmp_path: Path) -> None:
    problem = Problem("3+4?", "It is 7.", "7", history=HISTORY)
    record = problem_record(problem) | {"reasoning_trace": "3 + 4 = 7"}
    path = write(tmp_path / "traces.jsonl", record)
    assert read_traces(path, TEMPLATE) == [Trace(problem, "3 + 4 = 7")]
    assert history_of(record) == HISTORY
    plain = problem_record(problem._replace(history=()))
    assert "prompt" not in plain and history_of(plain) == ()


def test_a_prompt_in_csv_may_be_a_list_or_a_text(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerows([["prompt", "answer"], ["[1, 2] or (1, 2)?", "1"]])
        writer.writerow([json.dumps(messages(*TURNS)["messages"]), "7"])
    one, two = read_problems(str(file), TEMPLATE)
    assert (one.question, one.history) == ("[1, 2] or (1, 2)?", ())
    assert (two.question, two.history) == ("3+4?", HISTORY)


def test_a_row_with_more_fields_than_the_header_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("question,answer\n1+1?,2\nHow many, in all?,12\n", encoding="utf-8")
    with pytest.raises(UserError, match="record 2: it has more fields than the header"):
        read_problems(str(file), TEMPLATE)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (0.00001, "0.00001"),
        (1e-7, "0.0000001"),
        (0.5, "0.5"),
        (27.0, "27.0"),
        (12, "12"),
    ],
)
def test_numbers_are_written_out(tmp_path: Path, answer: float, text: str) -> None:
    path = write(tmp_path / "data.jsonl", {"question": "q", "answer": answer})
    assert read_problems(path, TEMPLATE)[0].answer == text
