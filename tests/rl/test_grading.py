"""Verdicts on answers as students write them."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlt_jax.data.tasks import benchmarks, gsm8k
from rlt_jax.errors import UserError
from rlt_jax.records import Problem
from rlt_jax.rl import math_answers
from rlt_jax.rl.grading import Verdict, grade

HANGS = r"\boxed{9^{9^{9^9}}}"  # one computation in C that no signal handler interrupts


def graded(prediction: str | None, answer: str, grader: str = "math") -> Verdict:
    (verdict,) = grade([Problem("q", "s", answer, grader)], [prediction])
    return verdict


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("7", "7"),
        (" 7\n", "7"),
        ("some words", "some words"),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\boxed{\frac{3}{6}}", "0.5"),
        (r"So the answer is \boxed{42}.", "42"),
        (r"First $\boxed{3}$, no: $\boxed{4}$", "4"),
        (r"The answer is 3. \boxed{4} is right.", "4"),
        ("The answer is 3, as 4 - 1 is 3 and not 2", "3"),
        (r"So the answer is 12. The final answer is within \boxed{}.", "12"),
        (r"\boxed{x+1}", "1+x"),
        ("1,000", "1000"),
        ("It is 7.", "7"),
        ("012", "12"),
        (r"\boxed{+5}", "5"),
        (r"$2\sqrt{3}$", r"2\sqrt3"),
        (r"$3 \pi$", r"3\pi"),
        (r"\boxed{\frac{3}{4} + 1}", r"\frac74"),
        ("$2^{10}$", "1024"),
        ("$x^2+1$", "1+x^2"),
        ("The answer is $6  -  5i$.", "6 - 5i"),
        ("$5!$", "120"),
        ("The answer is 5!", "5"),
        ("**$7$** is the answer", "7"),
        ("$7$, $8$", "7, 8"),
        ("It costs $5 or $6 more, \\(7\\) in all.", "7"),
        ("答案是 7", "7"),
        ("7*4=28\n28-3=25", "25"),
        ("100/5 = 5A/5 or 20 = A.", "20"),
        ("at 8km/4hrs = 2km/hr", "2"),
        ("$$\n7\n$$\n", "7"),
        (
            "$$\\begin{pmatrix}\n1\\\\2\n\\end{pmatrix}$$",
            r"\begin{bmatrix}1\\2\end{bmatrix}",
        ),
        ("It takes 5s", "5"),
        ("7 apples", "7"),
        ("**5**", "5"),
        ("-5.", "-5"),
        ("$(3, 4)$", "(3,4)"),
        (r"\[ x = 5 \]", "5"),
        (r"\boxed{7} is not \frac{1}{2} of {13}", "7"),
        (r"\boxed{10{,}080}", "10080"),
        (r"\boxed{1{,}000{,}000}", "1000000"),
        (r"\boxed{\$32{,}348}", "32348"),
        (r"\boxed{12{,}345.67}", "12345.67"),
        (r"\boxed{10\,080}", "10080"),
        (r"\boxed{1\ 000~000}", "1000000"),
        (r"\boxed{10080}", r"10{,}080"),
        (r"\boxed{\text{\$}32{,}348}", "32348"),
        (r"The answer is \$32{,}348.", "32348"),
        (r"\boxed{€1{,}200}", "1200"),
        (r"\boxed{\sin^2(x)}", r"\sin^2 x"),
        (r"\boxed{\cos^3(2x)}", r"\cos^3 2x"),
        (r"\boxed{\tan^{-1}(x)}", r"\tan^{-1} x"),
        (r"\boxed{\sqrt{\sin^2(x)+1}}", r"\sqrt{1+\sin^2 x}"),
        (r"\boxed{\log_2(3)}", r"\log_2 3"),
        (r"\boxed{\log_{2} 3}", r"\log_2(3)"),
        (r"\boxed{\ln(2)}", r"\ln 2"),
        (r"\boxed{\sin(x)\cos(x)}", r"\sin x \cos x"),
        ("0.333333", "1/3"),
    ],
)
def test_right_answers_in_other_forms(prediction: str, answer: str) -> None:
    assert graded(prediction, answer) == Verdict(True, answer)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("−3", "-3"),
        (r"\boxed{−3}", "-3"),
        ("The answer is −3", "-3"),
        ("−1/2", "-0.5"),
        ("√16", "4"),
        (r"\boxed{√16}", "4"),
        ("The answer is √16.", "4"),
        ("√10", r"\sqrt{10}"),
        ("√51", r"\sqrt{51}"),
        ("√2.25", "1.5"),
        ("√(x+1)", r"\sqrt{x+1}"),
        (r"$√{x+1}$", r"\sqrt{x+1}"),
        ("2√3", r"\sqrt{12}"),
        (r"$2 √ 3$", "√12"),
        (r"\boxed{√2+√3}", r"\sqrt2+\sqrt3"),
        ("√(2(x+1))", r"\sqrt{2(x+1)}"),
        (r"\boxed{\frac{√(4(2+1))}{2}}", r"\sqrt3"),
        (r"√\frac{1}{4}", "0.5"),
    ],
)
def test_minus_and_root_signs(prediction: str, answer: str) -> None:
    assert graded(prediction, answer) == Verdict(True, answer)
    assert not graded(prediction, "6").correct


@pytest.mark.parametrize(
    ("prediction", "answer", "vote"),
    [
        (None, "7", None),
        ("", "7", None),
        (" \n", "7", None),
        ("8", "7", "8"),
        ("-7", "7", "-7"),
        ("70", "7", "70"),
        ("007", "8", "7"),
        ("1,234", "1", "1234"),
        (r"First $\boxed{4}$, no: $\boxed{3}$", "4", "3"),
        (r"The known 7 gives \boxed{8}", "7", "8"),
        ("{}{$$", "7", "{}{$$"),
        ("other  words", "some words", "other words"),
        (r"\boxed{\text{Other words}}", "some words", "otherwords"),
        (r"$2\sqrt{3}$", "2", "2*sqrt(3)"),
        ("The answer is 7√2", "7", "7*sqrt(2)"),
        ("$2^{10}$", "2", "1024"),
        ("$5x$", "5", "5*x"),
        ("$5!$", "5", "120"),
        (r"\boxed{x > 5}", "5", "x > 5"),
        ("$4, 3$", "(3, 4)", "{3, 4}"),
        (r"\boxed{\frac{6}{4}}", "0.5", "3/2"),
    ],
)
def test_wrong_or_missing_answers(
    prediction: str | None, answer: str, vote: str | None
) -> None:
    assert graded(prediction, answer) == Verdict(False, vote)


@pytest.mark.parametrize(
    ("prediction", "vote"),
    [
        # Of LaTeX outside of a math environment or a box only numbers are parsed,
        (r"2\sqrt{3}", "2"),
        ("2^{10}", "2"),
        ("5x", "5"),
        ("3+xy", "3"),
        ("(3, 4)", "4"),
        ("7²", "7"),
        ("x > 5", "5"),
        # not what has no number, or a sign that stands alone.
        (r"\sin x", r"\sin x"),
        ("+5", "+5"),
        ("The answer is - 7", "7"),
        # Mixed numbers are read in part, spaces may add,
        ("1 1/2", "1"),
        (r"$3 \quad 5$", "8"),
        # a base is dropped, a letter that may be a unit, too,
        (r"\boxed{2516_7}", "2516"),
        (r"$2\pi h$", "2*pi"),
        # and boxes that stand close together are a set.
        (r"First \boxed{3}, but no: \boxed{4}", "{3, 4}"),
    ],
)
def test_what_math_verify_reads_in_its_own_way(prediction: str, vote: str) -> None:
    """As the numbers of other tools that use it do, for better or worse."""
    assert graded(prediction, "17") == Verdict(False, vote)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("√16", "16"),
        ("√10", "0"),
        ("√51", "5"),
        ("√√16", "4"),
        ("√51", r"\sqrt5"),
        ("√(2(x+1))", r"\sqrt{2x+1}"),
        (r"√\frac{1}{4}", "1/4"),
        (r"\boxed{10{,}080}", "10"),
        (r"\boxed{10{,}080}", "80"),
        (r"\boxed{10{,}08}", "1008"),
        (r"\boxed{(10{,}080)}", "(10, 80)"),
        (r"\boxed{1{,}000{,}000}", "1000"),
        (r"\boxed{10\,080}", "90"),
        (r"\boxed{\$32{,}348}", "348"),
        (r"\boxed{\begin{pmatrix}1\\ 200\end{pmatrix}}", "1200"),
        (r"\boxed{\sin^2(x)}", r"\sin(x^2)"),
        (r"\boxed{\sin(x^2)}", r"\sin^2 x"),
        (r"\boxed{\sin^2(x)}", r"2\sin x"),
        (r"\boxed{\sin^2(x)+1}", r"\sin^2(x+1)"),
        (r"\boxed{\sin(2x)}", r"2\sin x"),
        (r"\boxed{\sin(x)\cos(x)}", r"\sin(x\cos x)"),
        (r"\boxed{\cos^3(2x)}", r"\cos(6x)"),
        (r"\boxed{\cos^3(2x)}", r"2\cos^3 x"),
        (r"\boxed{\tan^{-1}(x)}", r"\frac{1}{\tan x}"),
        (r"\boxed{\log_2(3)}", r"\log_3 2"),
        (r"\boxed{\log_2(3)}", r"\ln 3"),
        (r"\boxed{\log_2(3)}", r"\log 6"),
        (r"\boxed{\log_2(3)+1}", r"\log_2 4"),
        (r"\boxed{\ln(2)+1}", r"\ln 3"),
        (r"\boxed{\ln(2)}", "2"),
    ],
)
def test_near_misses(prediction: str, answer: str) -> None:
    assert not graded(prediction, answer).correct


def test_rounding_is_not_equality() -> None:
    assert not graded("0.333", "1/3").correct


@pytest.mark.parametrize(
    "prediction",
    [
        *("C", "c", "(C)", "(c).", " C\n", "**C**", "C.", r"\boxed{C}", r"\text{(C)}"),
        *(r"$\boxed{\textbf{(C)}}$", r"First \boxed{A}. No: \boxed{\text{C}}"),
        *("The answer is C.", "the answer is: (C)", "**Answer: C**", "Answer: $C$"),
        *("C) 42 m", "(C) 42 m", "Option C is right.", "The answer is option C"),
        "A thorough look at (A) and (B) leaves (C).",
        "The correct answer is C, not option A.",
        "**Answer: C**\n\nOption A is incorrect",
        "**Answer:** C\n\nOption A is incorrect",
        r"\boxed{C}, which excludes option A.",
        "\\boxed{C}\nHence option (B) is wrong.",
        "**(C)** because of (A)",
        "C because of (A)",
        "answer: C) The choice A",
        "The correct option is C",
        "The correct choice would be C",
        "The wrong answer is A. The answer is C",
        "Option A is clearly wrong, option B isn't right; option C is.",
        "Answer: I think it is option C",
        "C) 42 is more than (A)",
        "(A) is wrong, (C) is right, (B) is wrong",
        "Neither option A nor option B: option C",
        "The answer is clearly C.",
        "Of (A) and (B)\nnone fits, but (C)",
        *("The answer is therefore C", "The answer is thus (C)."),
        *("Therefore C is the correct answer.", "So (C) is clearly right: not A."),
        *("I would pick C.", "I would not choose A; I choose option C."),
        "Option A: wrong. Option B: wrong. Option C is correct.",
        "Option A: no. Option B: no. Option C: yes.",
        "Option A - wrong. Option B - false. Option C - correct.",
        "Option A (wrong), option B (incorrect), option C (right).",
        "Option A: not possible. Option C: correct.",
        "Option A is wrong. Option B is wrong. So C.",
        *("Hence (C) must be right", "So C has to be correct.", "I'd go with C."),
        *("The answer is therefore: C", "The answer is, indeed, C."),
        *("C is the answer.", "Therefore, C is my only answer.", "Hence C"),
        *("The answer cannot be A, so it is C.", "It must be C.", "It's C"),
    ],
)
def test_the_letter_of_a_choice(prediction: str) -> None:
    for answer in ("C", "(C)"):
        assert graded(prediction, answer, "choice") == Verdict(True, "C")
    assert graded(prediction, "D", "choice") == Verdict(False, "C")


@pytest.mark.parametrize("text", ["A", "(A)", "The answer is A.", "Option A fits"])
def test_marked_letters_that_may_be_words(text: str) -> None:
    assert graded(text, "A", "choice").correct
    assert graded(text.replace("A", "I") + ".", "I", "choice").correct == (
        "fits" not in text
    )


@pytest.mark.parametrize(
    "prediction",
    [
        *("42", "Cat", "A cat", "Answer: I think so", "The answer is A good one"),
        *("Hence option (A) is wrong.", "The choice I made", "K", "The answer is Z"),
        "The answer is not A",
        "The answer is therefore not A",
        "The answer is A-type",
        "Therefore A is not the correct answer.",
        "Hence (A) must be wrong",
        "I would not pick A.",
        "I would not go with A, as it is wrong.",
        "I would pick A cat.",
        "Option A: wrong.",
        "So I think that it is A good idea",
    ],
)
def test_no_letter_is_no_choice(prediction: str) -> None:
    for answer in ("A", "I"):
        assert graded(prediction, answer, "choice") == Verdict(False, prediction)


@pytest.mark.parametrize("prediction", ["", " \n", r"Option A: \boxed{}", None])
def test_empty_answers_are_no_choice(prediction: str | None) -> None:
    assert graded(prediction, "A", "choice") == Verdict(False)


@pytest.mark.parametrize(
    ("texts", "vote"),
    [
        (["3", "3.0", "6/2", "x = 3", r"\boxed{3.00}", "It is 3.", "$x=3$"], "3"),
        (["7/2", "3.5", r"\frac{14}{4}", r"$3\frac{1}{2}$", "350%"], "7/2"),
        (["$x+1$", r"\boxed{1 + x}"], "x + 1"),
        (["$(1, 2, 3)$", r"\boxed{\left(1,2,3\right)}"], "(1, 2, 3)"),
        (["Two words", " Two\nwords "], "Two words"),
        ([r"\boxed{9^{99999}}"], "9^{99999}"),
        ([r"\boxed{@}", r"So it is \boxed{@}."], "@"),
    ],
)
def test_equal_wrong_answers_have_one_vote(texts: list[str], vote: str) -> None:
    verdicts = grade([Problem("q", "s", "17")] * len(texts), texts)
    assert verdicts == [Verdict(False, vote)] * len(texts)


def test_exact_is_the_same_text() -> None:
    assert graded(" 7\n", "7", "exact") == Verdict(True, "7")
    assert graded("07", "7", "exact") == Verdict(False, "07")
    assert graded(" ", "7", "exact") == Verdict(False)


def test_what_cannot_be_graded_is_named() -> None:
    with pytest.raises(UserError, match="'Why.' has no `answer`"):
        grade([Problem("Why?", "Because.")], ["x"])
    for answer in ("", " \n"):
        with pytest.raises(UserError, match="'q' has no `answer`"):
            graded("", answer)
    with pytest.raises(
        UserError, match="unknown grader 'maths'; known are math, choice"
    ):
        graded("7", "7", "maths")


def test_the_same_text_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answers, "_running", None)
    assert graded(" x + 1\n", "x + 1") == Verdict(True, "x + 1")
    assert graded(" ", "7") == graded(None, "7") == Verdict(False)


def test_long_texts_are_read_whole() -> None:
    noise = "so x is 3 or so. " * 3000
    assert graded(rf"{noise}\boxed{{\frac{{14}}{{2}}}}{noise}", "7").correct
    assert graded(f"{noise} Hence, the answer is 14/2", "7").correct
    assert graded(f"The answer is 14/2. {'and so on ' * 3000}", "7").correct
    assert not graded("1" * 20_000, "7").correct


def test_a_hanging_answer_is_wrong_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(math_answers, "SECONDS", 1.0)
    problems = [Problem("q", "s", "0.5")] * 4
    began = time.monotonic()
    verdicts = grade(problems, [HANGS, "1/2", r"\boxed{9^{9^{9^8}}}", "1/2"])
    assert time.monotonic() - began < 30
    assert verdicts[0] == verdicts[2] == Verdict(False, error="timeout")
    assert verdicts[1] == verdicts[3] == Verdict(True, "0.5")


def test_processes_that_are_ended_from_outside_are_replaced() -> None:
    assert graded("1/2", "0.5").correct
    for worker in math_answers._running()._pool_manager.worker_manager.workers:
        os.kill(worker, signal.SIGKILL)
    assert graded("1/4", "0.25").correct


# A grader with an argument: re.sub(prediction, answer, argument), whose result is right
# if it is not empty. The answer is the first group of the prediction.
SUB, FIRST = "re:sub?", r"\1"


def test_graders_with_an_argument_run_in_other_processes() -> None:
    assert graded("(a)", FIRST, f"{SUB}a?") == Verdict(True, FIRST)
    assert graded("(x)|a\\?", FIRST, f"{SUB}a?") == Verdict(False, "(x)|a\\?")
    assert graded("a", FIRST, f"{SUB}a") == Verdict(False, error="crash")
    assert graded(None, FIRST, f"{SUB}a") == Verdict(False)
    mixed = [("1/2", "0.5", "math"), ("(b)", FIRST, f"{SUB}a"), ("7", "7", "exact")]
    problems = [Problem("q", "s", answer, grader) for _, answer, grader in mixed]
    verdicts = grade(problems, [prediction for prediction, *_ in mixed])
    assert [verdict.answer for verdict in verdicts] == ["0.5", FIRST, "7"]
    with pytest.raises(UserError, match="'re:no' is not a"):
        graded("x", "y", "re:no?argument")


def test_a_grader_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answers, "FUNCTION_SECONDS", 2.0)
    slow = f"{SUB}{'a' * 99}b"
    problems = [Problem("q", "s", FIRST, slow)] * 3
    began = time.monotonic()
    verdicts = grade(problems, ["(a+)+$", "(b)", "(a+)"])
    assert time.monotonic() - began < 30
    assert verdicts[0] == Verdict(False, error="timeout")
    assert verdicts[1] == verdicts[2] == Verdict(True, FIRST)


def test_graders_with_an_argument_outlive_processes_that_are_ended() -> None:
    assert graded("(a)", FIRST, f"{SUB}a").correct
    for worker in math_answers._running()._pool_manager.worker_manager.workers:
        os.kill(worker, signal.SIGKILL)
    assert graded("(a)", FIRST, f"{SUB}a").correct


def test_grading_in_a_thread() -> None:
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.append(graded("3/4", "0.75")))
    thread.start()
    thread.join(60)
    assert found == [Verdict(True, "0.75")]


SCRIPT = """
import sys, threading, time
from rlt_jax.records import Problem
from rlt_jax.rl.grading import grade
{guard}
    problem = Problem("q", "s", "0.5")
    print(grade([problem], ["1/2"])[0].correct, "jax" in sys.modules)
    hangs = [r"\\boxed{{9^{{9^{{9^9}}}}}}"]
    threading.Thread(target=grade, args=([problem], hangs), daemon=True).start()
    time.sleep(0.5)
"""


@pytest.mark.parametrize("guarded", [True, False])
def test_scripts_end_whatever_is_being_graded(guarded: bool, tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    guard = 'if __name__ == "__main__":' if guarded else "if True:"
    file.write_text(SCRIPT.format(guard=guard))
    result = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if guarded:
        assert (result.stdout, result.stderr) == ("True False\n", "")
    else:
        assert result.returncode == 1
        assert "keep its work under" in result.stderr  # between those of its processes


def test_gsm8k_solutions_are_right(shared: Path) -> None:
    problems = gsm8k.problems(str(shared / "data" / "gsm8k" / "test.jsonl"))
    assert (
        sum(v.correct for v in grade(problems, [p.solution for p in problems])) == 1319
    )
    # The same through math-verify, not as plain integers.
    texts = [f"Hence, it is ${problem.answer}$." for problem in problems]
    assert sum(v.correct for v in grade(problems, texts)) == 1319


def test_aime_answers_in_five_forms_and_five_near_misses(shared: Path) -> None:
    file = shared / "data" / "aime24" / "test.jsonl"
    problems = benchmarks.problems("aime24", str(file))
    right, wrong = [], []
    for problem in problems:
        n = int(problem.answer)
        right += [f"\\boxed{{{n}}}", f"{n:03d}", f"The answer is {n}."]
        right += [f"${n}.0$", f"$\\frac{{{2 * n}}}{{2}}$"]
        turned = int(str(n)[::-1])
        wrong += [f"\\boxed{{{n + 1}}}", f"-{n}", f"The answer is {n}000.", ""]
        wrong += [f"${n}/2$" if turned == n else f"{turned}"]
    five = [problem for problem in problems for _ in range(5)]
    assert len(five) == 150
    for text, verdict in zip(right, grade(five, right), strict=True):
        assert verdict.correct, text
    for text, verdict in zip(wrong, grade(five, wrong), strict=True):
        assert not verdict.correct, text


def hostile(rng: random.Random) -> str:
    """A text that is to trouble a parser, now and then one that takes for ever."""
    n, digit = rng.choice([1, 3, 20, 400, 3000]), rng.randint(2, 9)
    endless = [
        f"{digit}^{{9^{{9^9}}}}",
        f"{digit}**9**9**9",
        f"{digit}!!!!!",
        "\\int_0^\\infty " * 20 + "x",
        f"\\sum_{{i=1}}^{{{10**digit}}} i^{digit}",
        "\\left(" * n + "x" + "\\right)" * n,
    ]
    parts = [
        "(" * n,
        "\\frac{" * n,
        "\\sqrt{" * 3 + "2" + "}" * n,
        str(digit) * n,
        f"1e{n * digit}",
        f"0.{'0' * n}{digit}",
        f"{digit}!",
        "\\begin{matrix}" * n,
        "\\def\\x{\\x\\x}\\x",
        "$" * n,
        "{" * rng.randint(1, 9),
        "1,234," * n,
        "x" * rng.randint(1, 9),
        "é数²½∞√∑" * n,
        "٣٤\u2028\u202e",
        "\x00\x07\x1b[2J",
        "\ud800\udc00\udfff",
        "\\text{" + "a " * n,
        "%\\%#_&~^\\\\",
        "<" * n + "=" * n,
        "\\cup" * n + "(1, 2]",
        "-" * n + str(digit),
    ]
    kind = endless if rng.random() < 0.005 else parts
    text = "".join(rng.choice(kind) for _ in range(rng.randint(1, 3)))
    form = rng.choice(
        ["{}", "\\boxed{{{}}}", "${}$", "The answer is {}.", "\\boxed{{{}"]
    )
    return form.format(text)


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_hostile_texts_neither_hang_nor_crash(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(math_answers, "SECONDS", 0.5)
    rng = random.Random(0)
    texts = [hostile(rng) for _ in range(count)]
    # Right answers beside them count nevertheless.
    right = {"exact": r"\frac{17}{3}", "choice": "(C)", "math": r"$\frac{34}{6}$"}
    for grader, text in right.items():
        answer = "C" if grader == "choice" else r"\frac{17}{3}"
        given = [*texts[: count // 2], text, *texts[count // 2 :], text]
        problem = Problem("q", "s", answer, grader)
        *verdicts, last = grade([problem] * len(given), given)
        assert last.correct and verdicts.pop(count // 2).correct
        assert not any(verdict.correct for verdict in verdicts)
    assert {v.error for v in verdicts} <= {None, "timeout", "crash"}
    assert any(verdict.answer for verdict in verdicts)
