"""A config that does not exist is refused before anything is created."""

import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
WORKDIR = "--workdir=/mnt/x"
TPU = ["--name=n", "--zone=z", "--accelerator_type=v6e-8", "--poll_seconds=0", WORKDIR]
HOSTS = ["--hosts=a,b", WORKDIR]
GKE = ["--cluster=k", "--zone=z", "--tpu_type=v6e-8", "--workload=w", "--storage=s"]
GKE += [WORKDIR]
INSTALLS = [("tpu_pod", TPU), ("hosts", HOSTS), ("gke", GKE)]
HERE = [
    ("local_pod", ["2", WORKDIR]),
    ("seeds", [WORKDIR]),
    ("slurm", ["--gpus_per_node=8", WORKDIR]),
]


@pytest.fixture
def checkout(stubs) -> Path:
    """A checkout with a committed config and one that is not committed."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (stubs.bin / "git").unlink()
    folder = stubs.folder / "checkout"
    shutil.copytree(LAUNCH, folder / "launch")
    (folder / "configs").mkdir()
    (folder / "configs/old.py").touch()
    who = ["-c", "user.name=n", "-c", "user.email=n@example.com"]
    for words in (["init", "--quiet"], ["add", "."], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    (folder / "configs/new.py").touch()
    stubs.scripts = folder / "launch"
    return folder


@pytest.mark.parametrize(("script", "words"), INSTALLS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("configs/none.py", "there is no file configs/none.py in the checkout "),
        ("configs/none.py:a:b", "there is no file configs/none.py in the checkout "),
        ("configs", "there is no file configs in the checkout "),
        ("../old.py", "there is no file ../old.py in the checkout "),
        (
            "configs/new.py:gsm8k",
            "configs/new.py is not committed, and the last commit is what is installed",
        ),
    ],
)
def test_configs_that_are_refused(
    stubs, checkout, script, words, config, message
) -> None:
    for more in ([], ["--dry_run"]):
        result = stubs.launch(script, *words, f"--config={config}", *more)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"{script}.sh: --config={config}: {message}")
        assert not stubs.calls()


@pytest.mark.parametrize(("script", "words"), INSTALLS)
@pytest.mark.parametrize("config", ["configs/old.py", "configs/old.py:a:b"])
def test_committed_configs(stubs, checkout, script, words, config) -> None:
    result = stubs.launch(script, *words, f"--config={config}", "--dry_run")
    assert result.returncode == 0, result.stderr
    assert "--config" not in result.stderr


@pytest.mark.parametrize(
    ("script", "words", "config", "where"),
    [
        ("tpu_pod", TPU, "/data/c.py:a", "where the run works"),
        ("tpu_pod", [*TPU, "--install=none"], "c.py", "on the workers"),
        ("hosts", HOSTS, "/data/c.py", "where the run works"),
        ("hosts", [*HOSTS, "--install=none"], "c.py", "on the hosts"),
        ("gke", GKE, "/mnt/c.py", "where the run works"),
        ("gke", [*GKE, "--image=i"], "c.py", "in the image"),
        ("slurm", HERE[2][1], "/data/c.py", "on the nodes"),
        ("slurm", [*HERE[2][1], "--srun_flag=--chdir=/d"], "c.py", "on the nodes"),
    ],
)
def test_configs_elsewhere_are_said_to_be_unchecked(
    stubs, script, words, config, where
) -> None:
    result = stubs.launch(script, *words, f"--config={config}", "--dry_run")
    assert result.returncode == 0, result.stderr
    message = f"whether this file exists {where} cannot be checked from here"
    assert result.stderr.count(f"--config={config}: {message}") == 1


@pytest.mark.parametrize(("script", "words"), [INSTALLS[0], INSTALLS[2]])
def test_paths_of_this_machine_are_refused(stubs, script, words) -> None:
    config = LAUNCH.parent / "configs/quickstart.py:a"
    result = stubs.launch(script, *words, f"--config={config}")
    assert result.returncode == 2
    assert "is a path of this machine; set --config=configs/quickstart.py:a" in (
        result.stderr
    )
    assert not stubs.calls()


@pytest.mark.parametrize(("script", "words"), HERE)
def test_configs_of_this_machine(stubs, script, words) -> None:
    refused = stubs.launch(script, *words, "--config=configs/none.py:a")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"{script}.sh: --config=configs/none.py:a: "
        f"there is no file configs/none.py; this is {stubs.cwd}\n"
    )
    assert not stubs.calls()
    assert stubs.launch(script, *words, "--config=configs/x.py:a").returncode == 0
