"""The reward against numbers of the reference implementation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECK = Path(__file__).with_name("golden_check.py")


def run_check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHECK), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )


def public_cases(shared: Path) -> list[str]:
    """The lines of the public cases.jsonl."""
    file = shared / "golden" / "public" / "cases.jsonl"
    return file.read_text(encoding="utf-8").splitlines()


def make_folder(
    shared: Path, tmp_path: Path, cases: list[str], configs: dict[str, Any]
) -> Path:
    """The public folder with other cases and configurations."""
    source = shared / "golden"
    for name in ("tokenizer", "teacher", "student"):
        (tmp_path / name).symlink_to((source / name).resolve())
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / "arrays.npz").symlink_to((source / "public" / "arrays.npz").resolve())
    (folder / "cases.jsonl").write_text("\n".join(cases) + "\n", encoding="utf-8")
    (folder / "configs.json").write_text(json.dumps(configs), encoding="utf-8")
    return folder


def public_configs(shared: Path) -> dict[str, Any]:
    file = shared / "golden" / "public" / "configs.json"
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_case_of_the_public_folder_agrees(shared: Path) -> None:
    done = run_check(shared / "golden" / "public")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "0 off"
    assert "reward                      466 compared" in done.stdout


def test_a_wrong_number_is_noticed(shared: Path, tmp_path: Path) -> None:
    first = public_cases(shared)[0]
    changed = first.replace('"reward_f64": -', '"reward_f64": -1', 1)
    assert changed != first
    folder = make_folder(shared, tmp_path, [changed], public_configs(shared))
    done = run_check(folder)
    assert done.returncode == 1
    assert "OFF p01_plain/run: reward" in done.stdout


def test_settings_come_from_the_configs_and_not_from_their_names(
    shared: Path, tmp_path: Path
) -> None:
    # A reliable case, an explanation that is empty and one that the reference mislocates.
    chosen = ("p01_plain", "p07_close_at_once", "p30_thought_is_question")
    cases = [
        line.replace('"no_entropy"', '"student_only"')
        for line in public_cases(shared)
        if json.loads(line)["id"] in chosen
    ]
    configs = public_configs(shared)
    run = configs["run"]
    configs = {
        "run": run,
        "student_only": configs["no_entropy"],
        # Temperatures that the reference has no numbers for.
        "cold_teacher": run | {"gen_temperature": 0.5},
        "cold_student": run
        | {"reward": run["reward"] | {"unbias_student_log_probs_temp": 0.4}},
    }
    assert all('"student_only"' in line for line in cases)
    done = run_check(make_folder(shared, tmp_path, cases, configs))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "0 off"
    # Three cases in `run`, two in `student_only`, where the empty one has no number.
    assert "reward                        5 compared" in done.stdout
    # Of the temperatures the reliable case has numbers for 0.7 alone.
    assert "student_lp                    1 compared" in done.stdout
