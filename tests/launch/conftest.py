"""Launchers run against programs that record how they were called."""

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"

# Words end in \x1f, calls in \x1e: one write each, so that processes do not mix.
RECORD = r"""#!/usr/bin/env bash
printf '%s\x1e' "$(printf '%s\x1f' "${0##*/}" "$@")" >>"$STUBS/calls"
"""

# The next outcome of a run is the first line of `runs`; states are lines of a file for
# each kind of resource, or one of them, of which the last one stays.
GCLOUD = r"""
state=$STUBS/state.$3
[[ ! -e $state.$5 ]] || state=$state.$5
next() {
  head -n 1 "$1"
  if (($(wc -l <"$1") > 1)) || [[ ${2-} == all ]]; then sed -i 1d "$1"; fi
}
case "$*" in
  *rlt_jax.main*)
    outcome=$([[ ! -s $STUBS/runs ]] || next "$STUBS/runs" all)
    case $outcome in
      hang) echo $$ >>"$STUBS/hangs"; exec sleep 30 ;;
      gone)
        echo PREEMPTED >"$STUBS/state.tpu-vm"
        [[ ! -e $STUBS/state.queued-resources ]] ||
          echo SUSPENDED >"$STUBS/state.queued-resources"
        exit 255
        ;;
      one_gone) sleep 1.1; echo PREEMPTED >"$STUBS/state.tpu-vm.pod-1"; exit 255 ;;
      slow) sleep 2.1; exit 143 ;;
      *) echo "the run says hello"; exit "${outcome:-0}" ;;
    esac
    ;;
  *" describe "*)
    if [[ -e $STUBS/denied ]]; then
      echo "ERROR: PERMISSION_DENIED: no" >&2
      exit 1
    elif [[ ! -s $state ]]; then
      echo "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found." >&2
      exit 1
    fi
    next "$state"
    ;;
  *" create "*)
    [[ ! -e $STUBS/no_capacity ]] || exit 7
    [[ ! -e $STUBS/slow ]] || { touch "$STUBS/hangs"; sleep 0.3; }
    echo READY >"$STUBS/state.tpu-vm"
    if [[ $3 == queued-resources ]]; then
      printf '%s\n' WAITING_FOR_RESOURCES PROVISIONING ACTIVE >"$state"
    fi
    ;;
  *" delete "*) rm -f "$STUBS"/state.* ;;
  *" scp "*--worker=0*) [[ ! -e $STUBS/no_fetch ]] ;;
esac
"""

GIT = r"""
case "$*" in
  *" cat-file "*) echo blob ;;
  *" status "*) [[ ! -e $STUBS/dirty ]] || echo " M file" ;;
  *" archive "*)
    for word; do [[ $word != --output=* ]] || tar -czf "${word#*=}" -T /dev/null; done
    ;;
esac
"""

# The status of a program for calls that contain a text: lines `status<tab>text`.
OUTCOMES = r"""
while IFS=$'\t' read -r status text; do
  [[ "$*" == *"$text"* ]] || continue
  [[ $status != hang ]] || { echo $$ >>"$STUBS/hangs"; exec sleep 30; }
  exit "$status"
done <"$STUBS/outcomes.${0##*/}"
"""


class Stubs:
    """Stands between a launcher and the world."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cwd = folder / "cwd"
        self.bin = folder / "bin"
        self.scripts = LAUNCH
        self.bin.mkdir()
        (self.cwd / "configs").mkdir(parents=True)
        (self.cwd / "configs/x.py").touch()
        for name in ("ssh", "scp", "xpk", "srun", "python", "gcsfuse"):
            self.write(self.bin / name, OUTCOMES)
            self.outcomes(name)
        self.write(self.bin / "mountpoint", "[[ -e $STUBS/mounted ]]\n")
        self.write(self.bin / "gcloud", GCLOUD)
        self.write(self.bin / "git", GIT)
        kept = {key: value for key, value in os.environ.items() if key[:4] != "RLT_"}
        path = f"{self.bin}:{os.environ['PATH']}"
        self.environment = kept | {"PATH": path, "STUBS": str(folder)}

    def write(self, path: Path, body: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECORD + body)
        path.chmod(0o755)

    def set(self, name: str, *lines: str) -> None:
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def outcomes(self, program: str, *outcomes: tuple[str, str]) -> None:
        """Pairs of a text and the status of calls with it; "hang" is one, too."""
        lines = (f"{status}\t{text}" for text, status in outcomes)
        self.set(f"outcomes.{program}", *lines)

    def launch(
        self, script: str, *words: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.scripts / f"{script}.sh"), *words],
            capture_output=True,
            input="y\n",  # for whoever dares to ask
            text=True,
            cwd=self.cwd,
            env=self.environment | environment,
            check=False,
            timeout=60,
        )

    def terminate(self, script: str, *words: str) -> tuple[int, str]:
        """Ends a launcher once a program hangs; its exit status and messages."""
        with (
            (self.folder / "messages").open("w") as messages,
            subprocess.Popen(
                [str(self.scripts / f"{script}.sh"), *words],
                stdout=subprocess.DEVNULL,
                stderr=messages,
                cwd=self.cwd,
                env=self.environment,
            ) as process,
        ):
            while not (self.folder / "hangs").exists():
                assert process.poll() is None
                time.sleep(0.02)
            process.terminate()
            status = process.wait(timeout=60)
        return status, (self.folder / "messages").read_text()

    def still_hanging(self) -> list[int]:
        """Process ids of programs that hung and have not been ended."""
        file = self.folder / "hangs"
        ids = map(int, file.read_text().split()) if file.exists() else ()
        return [pid for pid in ids if Path(f"/proc/{pid}").exists()]

    def shell(self, command: str, cwd: Path | None = None) -> None:
        subprocess.run(
            ["bash", "-c", command],
            cwd=cwd or self.cwd,
            env=self.environment,
            check=True,
            capture_output=True,
        )

    def calls(self, *programs: str) -> list[list[str]]:
        """What was called since the last look, in order; not what only reads commits."""
        file = self.folder / "calls"
        text = file.read_text() if file.exists() else ""
        file.unlink(missing_ok=True)
        calls = [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]
        calls = [call for call in calls if "cat-file" not in call]
        return [call for call in calls if not programs or call[0] in programs]

    def on_worker(self, command: str) -> list[str]:
        """Runs a remote command; the words that the Python of the worker is given."""
        home = self.folder / "home"
        self.write(home / "rlt_jax_launch/.venv/bin/python", "")
        self.shell(command, cwd=home)
        (call,) = self.calls("python")
        return call[1:]

    def mounts_on_worker(self, command: str) -> list[list[str]]:
        """The calls of gcsfuse when a remote command runs on a worker."""
        home = self.folder / "home"
        self.write(home / "rlt_jax_launch/.venv/bin/python", "")
        self.shell(command, cwd=home)
        return self.calls("gcsfuse")


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)


@pytest.fixture
def hard_words() -> Sequence[str]:
    """Arguments that a careless shell takes apart."""
    return ("--config.a=b c", "--config.d=it's", '--config.e="$HOME" * ; | \\', "")
