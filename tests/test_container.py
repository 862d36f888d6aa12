"""The Dockerfile: what it copies exists, and its commands install what they should."""

import ast
import fnmatch
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """Names and arguments of the instructions, with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def setup_argument(name: str) -> ast.expr:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (value,) = [k.value for call in calls for k in call.keywords if k.arg == name]
    return value


def extras() -> list[str]:
    return [key.value for key in setup_argument("extras_require").keys]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore excludes a file or folder of the root."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.removeprefix("**/") for line in lines if line[:1] not in ("", "#")]
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def test_python_of_the_image_is_supported() -> None:
    (image,) = arguments("FROM")
    minor = int(re.fullmatch(r"python:3\.(\d+)-slim-\w+", image)[1])
    least = re.fullmatch(r">=3\.(\d+)", setup_argument("python_requires").value)[1]
    assert minor >= int(least)


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    sources = [word for rest in arguments("COPY") for word in rest.split()[:-1]]
    assert "." in sources
    needed = [word for word in sources if word[:1] not in "-."]
    needed += ["setup.py", "README.md", "LICENSE", "rlt_jax", "configs", "experiments"]
    needed += ["tests", "launch", "scripts", "benchmarks", "docs", "pytest.ini"]
    for name in needed:
        assert (ROOT / name).exists(), name
        assert not is_ignored(name), name
    assert is_ignored(".git") and is_ignored("runs") and is_ignored("__pycache__")


def install(folder: Path, extra: str) -> subprocess.CompletedProcess[str]:
    """Runs the command that installs the dependencies; pip prints its arguments."""
    (command,) = [rest for rest in arguments("RUN") if "$EXTRA" in rest]
    (folder / "pip").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "pip").chmod(0o755)
    (folder / "setup.py").write_bytes((ROOT / "setup.py").read_bytes())
    return subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=folder,
        env={"PATH": f"{folder}:/usr/bin:/bin", "EXTRA": extra},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("extra", ["cpu", *extras()])
def test_extras(tmp_path, extra) -> None:
    result = install(tmp_path, extra)
    assert result.returncode == 0, result.stderr
    target = "." if extra == "cpu" else f".[{extra}]"
    assert result.stdout == f"install\n{target}\n"
    # setup.py reads one and packs the other.
    assert (tmp_path / "README.md").exists() and (tmp_path / "LICENSE").exists()


@pytest.mark.parametrize("extra", ["cuda99", "", "jax"])
def test_extras_that_do_not_exist(tmp_path, extra) -> None:
    result = install(tmp_path, extra)
    assert result.returncode == 2
    message = f"EXTRA={extra}: not cpu and not an extra of setup.py\n"
    assert (result.stderr, result.stdout) == (message, "")


def test_the_default_command_is_the_quickstart_of_the_readme() -> None:
    (command,) = arguments("CMD")
    words = json.loads(command)
    assert " ".join(words) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / words[3].removeprefix("--config=")).is_file()


def test_the_user_owns_the_folder_of_the_run_and_is_not_root() -> None:
    names = [instruction for instruction, _ in instructions()]
    assert arguments("ARG") == ["EXTRA=cpu", "RUN_AS=rlt"]
    assert arguments("USER") == ["${RUN_AS}"]
    assert names.index("USER") > len(names) - 1 - names[::-1].index("RUN")
    create = arguments("RUN")[0]
    assert "useradd --create-home --uid=1000 rlt" in create
    (folder,) = arguments("WORKDIR")
    assert f"install --directory --owner=rlt --group=rlt {folder}" in create
    # The folder where launch/slurm.sh starts the run in a container.
    slurm = (ROOT / "launch/slurm.sh").read_text(encoding="utf-8")
    assert f"[container_workdir]={folder} " in slurm


def test_the_package_is_installed_after_it_was_copied() -> None:
    steps = [(name, rest) for name, rest in instructions() if name in ("COPY", "RUN")]
    assert steps[-2] == ("COPY", "--chown=rlt:rlt . ./")
    assert steps[-1] == ("RUN", "pip install --no-deps --editable .")
