"""The reward against numbers of the reference implementation."""

import subprocess
import sys
from pathlib import Path

CHECK = Path(__file__).with_name("golden_check.py")


def test_every_case_of_the_public_folder_agrees(shared: Path) -> None:
    folder = shared / "golden" / "public"
    done = subprocess.run(
        [sys.executable, str(CHECK), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "0 off"
    assert "reward                      466 compared" in done.stdout


def test_a_wrong_number_is_noticed(shared: Path, tmp_path: Path) -> None:
    source = shared / "golden"
    for name in ("tokenizer", "teacher", "student"):
        (tmp_path / name).symlink_to((source / name).resolve())
    folder = tmp_path / "wrong"
    folder.mkdir()
    for name in ("arrays.npz", "configs.json"):
        (folder / name).symlink_to((source / "public" / name).resolve())
    cases = (source / "public" / "cases.jsonl").read_text(encoding="utf-8")
    first = cases.splitlines()[0]
    spoilt = first.replace('"reward_f64": -', '"reward_f64": -1', 1)
    assert spoilt != first
    (folder / "cases.jsonl").write_text(spoilt + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(CHECK), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "OFF p01_plain/run: reward" in done.stdout
