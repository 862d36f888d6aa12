import sys

FLAGS = ["--config=configs/x.py", "--workdir=runs/x y"]

# Says what it sees of the other processes.
PROGRAM = """
import sys
import jax
from jax.experimental import multihost_utils
flags = dict(word[2:].split("=") for word in sys.argv[3:])
address, count, index = flags["coordinator_address"], flags["num_processes"], flags["process_id"]
jax.distributed.initialize(address, int(count), int(index))
total = multihost_utils.process_allgather(jax.numpy.array(jax.process_index() + 1)).sum()
# One write: what Gloo prints from another thread may not come in between.
sys.stdout.write(f"\\n{jax.local_device_count()} {jax.device_count()} {total}\\n")
"""


def test_every_process_gets_its_place(stubs, hard_words) -> None:
    result = stubs.launch("local_pod", "3", *FLAGS, "--port=2000", "--", *hard_words)
    assert result.returncode == 0, result.stderr
    assert sorted(stubs.calls()) == sorted(
        [
            *["python", "-m", "rlt_jax.main", *FLAGS],
            *["--coordinator_address=127.0.0.1:2000", "--num_processes=3"],
            *[f"--process_id={i}", *hard_words],
        ]
        for i in range(3)
    )


def test_environment_and_prefix(stubs) -> None:
    stubs.write(
        stubs.bin / "python",
        'echo "$JAX_PLATFORMS $JAX_NUM_CPU_DEVICES $JAX_CPU_COLLECTIVES_IMPLEMENTATION"\n'
        'echo "$XLA_FLAGS"\n',
    )
    given = "--xla_dump_to=/tmp/x y"
    result = stubs.launch("local_pod", "2", *FLAGS, "--devices=3", XLA_FLAGS=given)
    lines = [line for line in result.stdout.splitlines() if "+ env" not in line]
    flags = f"--xla_cpu_enable_concurrency_optimized_scheduler=false {given}"
    assert sorted(lines) == sorted(
        f"[{n}] {x}" for n in "01" for x in ("cpu 3 gloo", flags)
    )


def test_one_failure_ends_all_and_its_status_is_the_status(stubs) -> None:
    stubs.outcomes("python", ("process_id=2", "5"), ("process_id", "hang"))
    result = stubs.launch("local_pod", "3", *FLAGS)
    assert result.returncode == 5
    assert "process 2 ended with status 5; ending the others" in result.stderr
    assert not stubs.still_hanging()


def test_processes_that_do_not_end_are_killed(stubs) -> None:
    stubs.write(
        stubs.bin / "python",
        '[[ "$*" == *process_id=1 ]] && { sleep 0.3; exit 6; }\n'
        "trap '' TERM\necho $$ >>$STUBS/hangs\nfor i in {1..300}; do sleep 0.1; done\n",
    )
    result = stubs.launch("local_pod", "2", *FLAGS, "--grace_seconds=1")
    assert result.returncode == 6
    assert not stubs.still_hanging()


def test_a_signal_ends_all(stubs) -> None:
    stubs.outcomes("python", ("process_id", "hang"))
    status, messages = stubs.terminate("local_pod", "2", *FLAGS)
    assert status == 143
    assert "stopped by a signal; ending all processes" in messages
    assert not stubs.still_hanging()


def test_number_of_processes(stubs) -> None:
    assert stubs.launch("local_pod", *FLAGS, RLT_PROCESSES="2").returncode == 0
    assert len(stubs.calls()) == 2
    missing = stubs.launch("local_pod", *FLAGS)
    assert "missing: --processes" in missing.stderr
    none = stubs.launch("local_pod", "0", *FLAGS)
    assert "--processes must be a positive integer, not '0'" in none.stderr
    assert not stubs.calls()


def test_processes_meet(stubs) -> None:
    program = stubs.folder / "program.py"
    program.write_text(PROGRAM)
    stubs.write(stubs.bin / "python", f'exec {sys.executable} {program} "$@"\n')
    result = stubs.launch("local_pod", "2", *FLAGS, "--devices=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[0] 2 4 3" in result.stdout
    assert "[1] 2 4 3" in result.stdout
