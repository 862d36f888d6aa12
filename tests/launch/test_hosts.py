import subprocess

import pytest

FLAGS = ["--hosts=ann@h0,ann@h1,h2", "--config=configs/x.py", "--pause_seconds=0"]
RUN = [*FLAGS, "--workdir=runs/x", "--install=none"]


def test_runs_one_process_a_host(stubs) -> None:
    result = stubs.launch("hosts", *RUN, "--env=A=1")
    assert result.returncode == 0, result.stderr
    *runs, fetch = stubs.calls()
    assert {call[-2]: call[-1].split()[-4:] for call in runs} == {
        host: [
            "--workdir=runs/x",
            "--coordinator_address=h0:8476",
            "--num_processes=3",
            f"--process_id={i}",
        ]
        for i, host in enumerate(["ann@h0", "ann@h1", "h2"])
    }
    assert all(call[:2] == ["ssh", "-tt"] for call in runs)
    assert fetch[:2] == ["scp", "-r"]
    assert fetch[-2:] == ["ann@h0:rlt_jax_launch/runs/x", "runs"]


def test_installs_on_all_hosts_before_it_runs(stubs) -> None:
    words = ["--workdir=gs://b/x", "--extra=tpu", "--ssh_flag=-i", "--ssh_flag=my key"]
    assert stubs.launch("hosts", *FLAGS, *words).returncode == 0
    calls = stubs.calls("ssh", "scp")
    assert all(call[call.index("-i") + 1] == "my key" for call in calls)
    kinds = [
        "send" if call[0] == "scp" else "run" if "main" in call[-1] else "install"
        for call in calls
    ]
    assert kinds == ["send"] * 3 + ["install"] * 3 + ["run"] * 3
    assert calls[3][-1].endswith("-e '.[tpu]'")


def test_a_lost_connection_starts_the_run_again(stubs) -> None:
    stubs.outcomes("ssh", ("h1", "255"))
    result = stubs.launch("hosts", *RUN, "--attempts=2")
    assert result.returncode == 255
    assert "process 1 ended with status 255; ending the others" in result.stderr
    assert "attempt 2 of 2" in result.stderr
    calls = stubs.calls()
    assert len([call for call in calls if "ann@h1" in call]) == 2
    assert not [call for call in calls if call[0] == "scp"]


def test_a_run_that_fails_is_not_repeated_and_hangs_up_the_others(stubs) -> None:
    stubs.outcomes("ssh", ("process_id=2", "4"), ("process_id", "hang"))
    result = stubs.launch("hosts", *RUN)
    assert result.returncode == 4
    assert "the run failed with status 4" in result.stderr
    assert not stubs.still_hanging()
    assert len(stubs.calls()) <= 3  # one may be ended before it is recorded


def test_a_failed_installation_runs_nothing(stubs) -> None:
    stubs.outcomes("ssh", ("h1", "9"))
    result = stubs.launch("hosts", *FLAGS, "--workdir=runs/x")
    assert result.returncode == 9
    assert not [call for call in stubs.calls() if "rlt_jax.main" in call[-1]]


def test_arguments_reach_the_program_unchanged(stubs, hard_words) -> None:
    words = ["--hosts=h", "--config=c.py", "--workdir=a b", "--install=none"]
    address = "--coordinator_address=10.0.0.1:99"
    result = stubs.launch("hosts", *words, address, "--", *hard_words)
    assert result.returncode == 0, result.stderr
    command = stubs.calls()[0][-1]
    assert stubs.on_worker(command) == [
        *["-m", "rlt_jax.main", "--config=c.py", "--workdir=a b", address],
        *["--num_processes=1", "--process_id=0", *hard_words],
    ]


def test_output_names_its_host(stubs) -> None:
    stubs.write(stubs.bin / "ssh", r"printf 'step 1\r\nno end of line'")
    result = stubs.launch("hosts", *RUN)
    lines = [line for line in result.stdout.splitlines() if "+ ssh" not in line]
    said = ("step 1", "no end of line")
    assert sorted(lines) == sorted(f"[{i}] {text}" for i in range(3) for text in said)


def test_hosts_that_are_none(stubs) -> None:
    result = stubs.launch("hosts", "--hosts=a,,b", "--config=c", "--workdir=w")
    assert result.returncode == 2
    assert "--hosts=a,,b has an invalid host: ''" in result.stderr
    assert not stubs.calls()


def test_a_bucket_is_mounted_on_every_host(stubs) -> None:
    words = [*FLAGS, "--workdir=gs://my-bucket/a b", "--install=none"]
    result = stubs.launch("hosts", *words)
    assert result.returncode == 0, result.stderr
    calls = stubs.calls()
    assert [call[0] for call in calls] == ["ssh"] * 3  # nothing is fetched
    mount = [
        *["gcsfuse", "--implicit-dirs", "--rename-dir-limit=100000"],
        *["--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"],
        *["my-bucket", "gs/my-bucket"],
    ]
    for call in calls:
        assert stubs.mounts_on_worker(call[-1]) == [mount]
        folder = stubs.folder / "home/rlt_jax_launch/gs/my-bucket/a b"
        assert folder.is_dir()
        assert "--workdir=gs/my-bucket/a b" in stubs.on_worker(call[-1])
    stubs.set("mounted")
    assert not stubs.mounts_on_worker(calls[0][-1])


def test_without_gcsfuse_nothing_runs(stubs) -> None:
    stubs.launch("hosts", *FLAGS, "--workdir=gs://b/x", "--install=none")
    command = stubs.calls()[0][-1]
    stubs.outcomes("gcsfuse", ("b", "127"))
    with pytest.raises(subprocess.CalledProcessError):
        stubs.mounts_on_worker(command)
    assert [call[0] for call in stubs.calls()] == ["mountpoint", "gcsfuse"]
