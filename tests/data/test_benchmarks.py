"""Benchmarks in their published layouts, in every kind of file."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlt_jax.data import pipeline
from rlt_jax.data.predictions import read_predictions
from rlt_jax.data.tasks import gsm8k
from rlt_jax.data.templates import Template
from rlt_jax.errors import UserError
from rlt_jax.records import Problem
from rlt_jax.rl.grading import grade

# task, columns as published, and what is read
LAYOUTS = [
    (
        "math500",
        {
            "problem": "q",
            "solution": "so $\\boxed{x}$",
            "answer": "x",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/algebra/1.json",
        },
        Problem("q", "so $\\boxed{x}$", "x"),
    ),
    (
        "aime24",
        {"ID": "2024-II-4", "Problem": "q", "Solution": "s", "Answer": 33},
        Problem("q", "s", "33"),
    ),
    (
        "aime24",
        {"id": 60, "problem": "q", "solution": "\\boxed{204}", "url": "u"},
        Problem("q", "\\boxed{204}", "204"),
    ),
    (
        "aime24",
        {"problem": "q", "solution": "\\boxed{3} is \\boxed{\\frac{1}{2}}."},
        Problem("q", "\\boxed{3} is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ),
    (
        "aime24",
        {"id": 1, "problem": "q", "solution": "s", "answer": "033", "question": "Q"},
        Problem("q", "s", "033"),
    ),
    (
        "aime25",
        {"problem": "q", "answer": "70", "id": "0"},
        Problem("q", "70", "70"),
    ),
    ("aime25", {"question": "q", "answer": "70"}, Problem("q", "70", "70")),
    (
        "amc23",
        {"id": 0, "question": "q", "answer": 27.0, "url": "u"},
        Problem("q", "27", "27"),
    ),
    (
        "gsm8k",
        {"question": "q", "answer": "6*7=<<6*7=42>>42\n#### 1,042"},
        Problem("q", "The answer is \\boxed{1042}.", "1042"),
    ),
]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        file.write_text(lines, encoding="utf-8")
    return str(file)


TAGS = tuple((f"<{name}>", f"</{name}>") for name in ("explain", "think", "solution"))


def load(task: str, path: str, **keys: Any) -> list[Problem]:
    template = Template("", "", *TAGS, pad="", delimiter="")
    return pipeline.load_problems({"task": task, "path": path, **keys}, template, 0)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
@pytest.mark.parametrize(("task", "row", "problem"), LAYOUTS)
def test_published_layouts(
    task: str, row: dict[str, Any], problem: Problem, suffix: str, tmp_path: Path
) -> None:
    path = write(tmp_path / f"a.{suffix}", [row, row])
    if suffix == "csv" and task == "amc23":  # the one float, a text in CSV
        problem = Problem("q", "27.0", "27.0")
    assert load(task, path) == [problem] * 2
    assert load(task, path, limit=1) == [problem]


def test_a_pattern_names_several_files(tmp_path: Path) -> None:
    for part in ("I", "II"):
        row = {"question": part, "answer": "1"}
        write(tmp_path / f"aime2025-{part}.jsonl", [row])
    found = load("aime25", str(tmp_path / "aime2025-*.jsonl"))
    assert [problem.question for problem in found] == ["I", "II"]


def test_aime24_as_it_is_shared(shared: Path) -> None:
    found = load("aime24", str(shared / "data" / "aime24" / "test.jsonl"))
    assert len(found) == 30
    assert found[0].answer == "204"
    assert all(0 <= int(problem.answer) <= 999 for problem in found)


GPQA = [
    {
        "Record ID": f"rec{n}",
        "Question": f"Which one, {n}?\n",
        "Correct Answer": " right\n",
        **{f"Incorrect Answer {i}": f"wrong, {i}\nsecond line" for i in (1, 2, 3)},
        "Explanation": 'It "is".',
    }
    for n in range(40)
]


def test_gpqa_lists_its_options_in_an_order_of_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "gpqa_diamond.csv", GPQA)
    problems = load("gpqa", path)
    for n, problem in enumerate(problems):
        assert problem.question.startswith(f"Which one, {n}?\n\n(A) ")
        assert f"({problem.answer}) right\n" in problem.question
        assert problem.grader == "choice"
        listed = re.findall(r"^\((.)\) (\w+)", problem.question, re.MULTILINE)
        assert [letter for letter, _ in listed] == list("ABCD")
        assert sorted(text for _, text in listed) == ["right"] + ["wrong"] * 3
    assert {problem.answer for problem in problems} == set("ABCD")
    assert all(v.correct for v in grade(problems, [p.solution for p in problems]))
    assert load("gpqa", path) == problems
    assert load("gpqa", path, limit=3) == problems[:3]
    assert load("gpqa", path, shuffle_seed=1) != problems


def test_an_option_of_gpqa_may_be_the_number_0(tmp_path: Path) -> None:
    path = write(tmp_path / "gpqa.jsonl", [GPQA[0] | {"Correct Answer": 0}])
    (problem,) = load("gpqa", path)
    assert f"({problem.answer}) 0\n" in problem.question


def test_a_file_of_questions_and_answers_needs_no_solution(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": 4}, {"question": "r", "answer": "C"}]
    path = write(tmp_path / "a.jsonl", rows)
    assert load("file", path) == [Problem("q", "4", "4"), Problem("r", "C", "C")]
    assert load("file", path, grader="choice", limit=1) == [
        Problem("q", "4", "4", "choice")
    ]


@pytest.mark.parametrize("task", ["gsm8k", "math500", "aime24", "aime25", "amc23"])
def test_a_missing_file_says_where_to_get_it(task: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"b.jsonl': no such file.* Download it: .*https://"
    ):
        load(task, str(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="gpqa_diamond.csv of https://"):
        load("gpqa", str(tmp_path / "b.csv"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"problem": "q", "answer": "1"}\n{"pro',
            "a.jsonl, line 2: not valid JSON",
        ),
        ("a.jsonl", "", "has no records"),
        ("a.jsonl", "[1]", "line 1: the record is .* not an object"),
        (
            "a.jsonl",
            '{"problem": "q"}',
            "line 1: needs problem or question, and answer",
        ),
        (
            "a.jsonl",
            '{"problem": "q", "solution": "\\\\boxed{3} is \\\\boxed{\\\\frac{1}{2}"}',
            "line 1: needs problem or question, and answer",
        ),
        (
            "a.jsonl",
            '{"problem": " ", "answer": "1"}',
            "the columns are problem, ans",
        ),
        ("a.json", "[{]", "a.json cannot be read"),
        ("a.parquet", "no", "a.parquet cannot be read"),
        ("a.csv", "problem,answer\n,1\n", "record 1: needs problem"),
        (
            "a.txt",
            "",
            "unknown file type '.txt'; convert to one of .jsonl, .json, .csv",
        ),
    ],
)
def test_bad_files_are_one_message(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load("math500", str(tmp_path / name))


PROBLEMS = [Problem("q", "1", "1"), Problem(" r\n", "2", "2")]


def test_predictions_are_joined_by_the_question(tmp_path: Path) -> None:
    rows = [
        {"question": "r", "completion": "c"},
        {"question": "q", "completion": "a"},
        {"question": "q", "completion": "b"},
        {"question": "r", "completion": "d"},
    ]
    for suffix in ("jsonl", "parquet"):
        path = write(tmp_path / f"a.{suffix}", rows)
        assert read_predictions(path, PROBLEMS) == [["a", "b"], ["c", "d"]]
    lists = [{"question": q, "completions": [q, "x"]} for q in "rq"]
    path = write(tmp_path / "b.parquet", lists)
    assert read_predictions(path, PROBLEMS) == [["q", "x"], ["r", "x"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "q", "completion": "a"}], "0 predictions for the question 'r'"),
        (
            [{"question": q, "completion": "a"} for q in "qqr"],
            "1 predictions for the question 'r', but 2 for others",
        ),
        (
            [{"question": "z", "completion": "a"}],
            "line 1: the data has no question 'z'",
        ),
        ([{"question": "q"}], "line 1: needs `completions`, a list"),
        (
            [{"question": "q", "completions": "a"}],
            "line 1: needs `completions`, a list",
        ),
        (
            [{"question": q, "completions": []} for q in "qr"],
            "a.jsonl: there are no predictions; add one or more texts to",
        ),
    ],
)
def test_predictions_that_do_not_fit(
    rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=message):
        read_predictions(path, PROBLEMS)


def test_predictions_need_different_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "q", "completion": "a"}])
    with pytest.raises(UserError, match="only 1 distinct"):
        read_predictions(path, PROBLEMS[:1] * 2)


def test_gsm8k_records_that_are_no_problems(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    for answer in ("so it is ####", "so it is 5", "<<" * 10**6):
        file.write_text(json.dumps({"question": "q", "answer": answer}))
        with pytest.raises(UserError, match="line 1: needs a question, and an answer"):
            gsm8k.problems(str(file))
    file.write_text(json.dumps({"question": "q", "answer": "<<1+1=2>>2 #### 2"}))
    with pytest.raises(UserError, match="it has no problems; change its settings"):
        load("gsm8k", str(file), max_calculations=0)


def test_gsm8k_problems_with_few_calculations(tmp_path: Path) -> None:
    rows = [
        {"question": f"q{n}", "answer": "x <<1+1=2>>2 " * n + f"\n#### {n}"}
        for n in (1, 3, 2, 0, 2)
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answers(**options: int) -> list[str | None]:
        return [p.answer for p in gsm8k.problems(str(file), **options)]

    assert answers() == ["1", "3", "2", "0", "2"]
    assert answers(max_calculations=2) == ["1", "2", "0", "2"]
    assert answers(max_calculations=2, limit=2) == ["1", "2"]
    assert gsm8k.traces(str(file), 1)[0].explanation == "x 2"
