import re
import subprocess

import pytest

FLAGS = ["--name=pod", "--zone=z", "--config=configs/x.py", "--poll_seconds=0"]
MAKE = [*FLAGS, "--accelerator_type=v6e-16"]
LOCAL = "--workdir=runs/x"
BUCKET = "--workdir=gs://bucket/x"


def steps(stubs) -> list[str]:
    """What gcloud was asked to do, without looks at states and first contacts."""
    names = []
    for call in stubs.calls("gcloud"):
        assert call[1:3] == ["compute", "tpus"]
        assert "--zone=z" in call
        name = call[4]
        if name == "ssh":
            assert "--worker=all" in call
            name = "run" if "rlt_jax.main" in call[-1] else "install"
        if name == "scp":
            name = "send" if "--worker=all" in call else "fetch"
        if name != "describe" and call[-1] != "--command=true":
            names.append(name)
    return names


def commands(stubs) -> list[str]:
    calls = [call for call in stubs.calls("gcloud") if call[4] == "ssh"]
    return [call[-1].removeprefix("--command=") for call in calls]


def test_makes_runs_fetches_and_deletes(stubs) -> None:
    result = stubs.launch("tpu_pod", *MAKE, LOCAL)
    assert result.returncode == 0, result.stderr
    assert "the run says hello" in result.stdout
    assert steps(stubs) == ["create", "send", "install", "run", "fetch", "delete"]


def test_uses_a_slice_that_is_there_and_leaves_it(stubs) -> None:
    stubs.set("state.tpu-vm", "READY")
    assert stubs.launch("tpu_pod", *FLAGS, BUCKET).returncode == 0
    assert steps(stubs) == ["send", "install", "run"]


def test_waits_for_a_slice_that_is_being_made(stubs) -> None:
    stubs.set("state.tpu-vm", "CREATING", "STARTING", "READY")
    assert stubs.launch("tpu_pod", *FLAGS, BUCKET).returncode == 0
    assert steps(stubs) == ["send", "install", "run"]


def test_mounts_a_bucket_on_its_workers(stubs) -> None:
    stubs.set("state.tpu-vm", "READY")
    stubs.launch("tpu_pod", *FLAGS, BUCKET, "--install=none")
    command = commands(stubs)[-1]
    (mount,) = stubs.mounts_on_worker(command)
    assert mount[-2:] == ["bucket", "gs/bucket"]
    assert "--workdir=gs/bucket/x" in stubs.on_worker(command)


def test_keep(stubs) -> None:
    result = stubs.launch("tpu_pod", *MAKE, BUCKET, "--keep")
    assert steps(stubs) == ["create", "send", "install", "run"]
    assert "gcloud compute tpus tpu-vm delete pod --zone=z --quiet" in result.stderr


@pytest.mark.parametrize("queued", [[], ["--queued"]])
def test_resumes_after_a_preemption(stubs, queued) -> None:
    stubs.set("runs", "gone", "0")
    result = stubs.launch("tpu_pod", *MAKE, *queued, BUCKET, "--", "--config.seed=1")
    assert result.returncode == 0, result.stderr
    assert "pod is " in result.stderr and "attempt 2 of 10" in result.stderr
    calls = stubs.calls("gcloud")
    runs = [call for call in calls if "rlt_jax.main" in call[-1]]
    assert len(runs) == 2 and runs[0] == runs[1]
    kind = "queued-resources" if queued else "tpu-vm"
    managed = [call[3:5] for call in calls if call[4] in ("create", "delete")]
    assert managed == [[kind, "create"], [kind, "delete"]] * 2


def test_the_slice_of_another_is_not_made_again(stubs) -> None:
    stubs.set("state.tpu-vm", "READY")
    stubs.set("runs", "gone")
    result = stubs.launch("tpu_pod", *MAKE, BUCKET)
    assert result.returncode == 2
    assert (
        "pod is PREEMPTED and was not created by this launch; delete it first"
        in result.stderr
    )
    assert steps(stubs) == ["send", "install", "run"]


def test_a_run_that_fails_is_not_repeated(stubs) -> None:
    stubs.set("runs", "3", "0")
    result = stubs.launch("tpu_pod", *MAKE, LOCAL)
    assert result.returncode == 3
    assert "the run failed with status 3" in result.stderr
    assert steps(stubs) == ["create", "send", "install", "run", "fetch", "delete"]


def test_attempts_are_bounded(stubs) -> None:
    stubs.set("runs", "gone", "gone", "gone")
    result = stubs.launch("tpu_pod", *MAKE, LOCAL, "--attempts=2")
    assert result.returncode == 255
    assert "PREEMPTED after attempt 2, the last" in result.stderr
    assert steps(stubs) == ["create", "send", "install", "run", "delete"] * 2


def test_what_could_not_be_fetched_is_kept(stubs) -> None:
    stubs.set("no_fetch")
    result = stubs.launch("tpu_pod", *MAKE, LOCAL)
    assert result.returncode == 1
    assert "pod is kept (its workdir could not be copied)" in result.stderr
    assert "delete" not in steps(stubs)


def test_fetches_into_a_folder_or_not_at_all(stubs) -> None:
    stubs.set("state.tpu-vm", "READY")
    stubs.launch("tpu_pod", *FLAGS, LOCAL, "--fetch_to=a b", "--install=none")
    fetch = stubs.calls("gcloud")[-1]
    assert fetch[5:7] == ["pod:rlt_jax_launch/runs/x", "a b"]
    assert (stubs.cwd / "a b").is_dir()
    stubs.launch("tpu_pod", *FLAGS, LOCAL, "--fetch_to=none", "--install=none")
    assert steps(stubs) == ["run"]
    stubs.launch("tpu_pod", *FLAGS, "--workdir=/mnt/x", "--install=none")
    assert stubs.calls("gcloud")[-1][5] == "pod:/mnt/x"


def test_queued_resource(stubs) -> None:
    words = ["--queued", "--spot", "--project=p", "--create_flag=--network=a b"]
    result = stubs.launch("tpu_pod", *MAKE, BUCKET, *words)
    assert result.returncode == 0, result.stderr
    assert "pod is WAITING_FOR_RESOURCES; waiting" in result.stderr
    calls = stubs.calls("gcloud")
    (create,) = [call for call in calls if "create" in call]
    assert create[3:] == [
        "queued-resources",
        "create",
        "pod",
        "--zone=z",
        "--project=p",
        "--node-id=pod",
        "--accelerator-type=v6e-16",
        "--spot",
        "--runtime-version=v2-alpha-tpuv6e",
        "--network=a b",
    ]
    kind = [call[3] for call in calls if call[4] == "describe"]
    assert kind == [*["queued-resources"] * 4, "tpu-vm"]
    assert calls[-1][3:] == [
        *["queued-resources", "delete", "pod", "--zone=z", "--project=p"],
        *["--force", "--quiet"],
    ]


def test_a_queued_resource_that_fails_is_deleted(stubs) -> None:
    stubs.write(
        stubs.bin / "gcloud",
        '[[ $4 != describe ]] || cat "$STUBS/state" || { echo NOT_FOUND >&2; exit 1; }\n'
        '[[ $4 != create ]] || echo FAILED >"$STUBS/state"\n',
    )
    result = stubs.launch("tpu_pod", *MAKE, BUCKET, "--queued")
    assert result.returncode == 2
    assert "the request for pod failed" in result.stderr
    assert steps(stubs) == ["create", "delete"]


def test_what_could_not_be_made_is_left_alone(stubs) -> None:
    stubs.set("no_capacity")
    result = stubs.launch("tpu_pod", *MAKE, BUCKET)
    assert result.returncode == 2
    assert "could not create pod" in result.stderr
    assert steps(stubs) == ["create"]


def test_an_unknown_state_makes_nothing(stubs) -> None:
    stubs.set("denied")
    result = stubs.launch("tpu_pod", *MAKE, BUCKET)
    assert result.returncode == 2
    assert "PERMISSION_DENIED" in result.stderr
    assert not steps(stubs)


def test_nothing_to_make_it_of(stubs) -> None:
    result = stubs.launch("tpu_pod", *FLAGS, BUCKET)
    assert result.returncode == 2
    assert "no slice pod in z; to create it, set --accelerator_type" in result.stderr
    assert not steps(stubs)


@pytest.mark.parametrize(
    ("accelerator_type", "image"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_runtime_images(stubs, accelerator_type, image) -> None:
    words = [f"--accelerator_type={accelerator_type}", "--dry_run"]
    dry = stubs.launch("tpu_pod", *FLAGS, BUCKET, *words)
    assert f"--version={image}\n" in dry.stdout
    named = stubs.launch("tpu_pod", *FLAGS, BUCKET, *words, "--version=mine")
    assert "--version=mine\n" in named.stdout


def test_types_without_an_image(stubs) -> None:
    newer = stubs.launch("tpu_pod", *FLAGS, BUCKET, "--accelerator_type=tpu7x-16")
    assert newer.returncode == 2
    assert "launch/gke.sh" in newer.stderr
    unknown = stubs.launch("tpu_pod", *FLAGS, BUCKET, "--accelerator_type=x-1")
    assert unknown.returncode == 2
    assert "the runtime image for x-1 is unknown; set" in unknown.stderr
    assert not steps(stubs)


def test_arguments_reach_the_program_unchanged(stubs, hard_words) -> None:
    stubs.set("state.tpu-vm", "READY")
    words = ["--config=configs/x.py:a b", "--workdir=runs/x y", "--env=A=b c"]
    stubs.launch("tpu_pod", *FLAGS, *words, "--install=none", "--", *hard_words)
    _, command = commands(stubs)
    assert stubs.on_worker(command) == [
        *["-m", "rlt_jax.main", "--config=configs/x.py:a b", "--workdir=runs/x y"],
        *hard_words,
    ]
    assert "'A=b c'" in command
    assert (stubs.folder / "home/rlt_jax_launch/runs/x y").is_dir()


def test_installation(stubs) -> None:
    stubs.set("state.tpu-vm", "READY")
    stubs.launch("tpu_pod", *FLAGS, BUCKET, "--setup=mount it; true")
    _, checkout, _ = commands(stubs)
    assert checkout.startswith("(mount it; true) && mkdir -p rlt_jax_launch && tar ")
    assert checkout.endswith(" -e '.[tpu]'")
    stubs.launch(
        "tpu_pod", *FLAGS, BUCKET, "--install=rlt_jax[tpu] == 1", "--python=3.13"
    )
    _, package, _ = commands(stubs)
    assert package.endswith(" 'rlt_jax[tpu] == 1'")
    assert "--python=3.13 .venv" in package
    assert "tar" not in package
    assert not stubs.calls("git")


def test_warns_of_what_is_not_sent_or_would_be_lost(stubs) -> None:
    stubs.set("dirty")
    result = stubs.launch("tpu_pod", *MAKE, LOCAL, "--spot")
    assert "uncommitted changes are not included" in result.stderr
    assert "--workdir=runs/x is lost on preemption" in result.stderr


def test_a_signal_ends_the_launch_and_deletes_what_it_made(stubs) -> None:
    stubs.set("runs", "hang")
    status, _ = stubs.terminate("tpu_pod", *MAKE, LOCAL)
    assert status == 143
    assert not stubs.still_hanging()
    assert steps(stubs) == ["create", "send", "install", "run", "fetch", "delete"]


def test_a_signal_while_it_is_made(stubs) -> None:
    stubs.set("slow")
    status, messages = stubs.terminate("tpu_pod", *MAKE, LOCAL)
    assert status == 143
    assert (
        "pod is kept (its creation was interrupted); to delete it: gcloud" in messages
    )
    assert steps(stubs) == ["create"]


SLICES = [*MAKE, "--node_count=2"]


def test_several_slices_are_one_queued_resource(stubs) -> None:
    result = stubs.launch("tpu_pod", *SLICES, LOCAL)
    assert result.returncode == 0, result.stderr
    calls = stubs.calls("gcloud")
    (create,) = [call for call in calls if call[4] == "create"]
    assert create[3:9] == [
        *["queued-resources", "create", "pod", "--zone=z"],
        *["--node-count=2", "--node-prefix=pod"],
    ]
    assert not [word for word in create if word.startswith("--node-id")]
    on_all = ["--node=all", "--worker=all", "--batch-size=all"]
    for call in calls:
        if call[4] == "ssh":
            assert call[3:6] == ["queued-resources", "ssh", "pod"]
            assert set(on_all) <= set(call)
    send, fetch = [call for call in calls if call[4] == "scp"]
    assert send[3] == fetch[3] == "queued-resources"
    assert set(on_all) <= set(send)
    assert fetch[5] == "pod:rlt_jax_launch/runs/x"
    assert {"--node=0", "--worker=0", "--recurse"} <= set(fetch)
    described = [call[3:6:2] for call in calls if call[4] == "describe"]
    assert described[-2:] == [["tpu-vm", "pod-0"], ["tpu-vm", "pod-1"]]
    assert calls[-1][3:6] == ["queued-resources", "delete", "pod"]
    assert "--force" in calls[-1]


def test_all_slices_are_created_again_when_one_is_lost(stubs) -> None:
    stubs.set("runs", "one_gone", "0")
    result = stubs.launch("tpu_pod", *SLICES, BUCKET, "--max_hours=1")
    assert result.returncode == 0, result.stderr
    assert "pod-1 is PREEMPTED; starting attempt 2 of 10" in result.stderr
    calls = stubs.calls("gcloud")
    managed = [call[3:6] for call in calls if call[4] in ("create", "delete")]
    both = [["queued-resources", word, "pod"] for word in ("create", "delete")]
    assert managed == both * 2
    runs = [call[-1] for call in calls if "rlt_jax.main" in call[-1]]
    first, second = [int(re.search(r" (\d+)s env ", run)[1]) for run in runs]
    assert 3590 < first <= 3600 and second < first  # the hour is for both together


def test_waits_for_a_slice_that_is_repaired_and_leaves_slices_that_were_there(
    stubs,
) -> None:
    stubs.set("state.queued-resources", "ACTIVE")
    stubs.set("state.tpu-vm", "READY")
    stubs.set("state.tpu-vm.pod-1", "REPAIRING", "READY")
    result = stubs.launch("tpu_pod", *FLAGS, "--node_count=2", BUCKET)
    assert result.returncode == 0, result.stderr
    assert "pod-1 is REPAIRING; waiting" in result.stderr
    assert steps(stubs) == ["send", "install", "run"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--node_count=0"], "--node_count must be a positive integer, not '0'"),
        (
            ["--node_count=2", "--accelerator_type=v3-8"],
            "--node_count=2: several slices require TPU v4 or later",
        ),
        (["--max_hours=0"], "a positive number of hours, not '0'"),
        (["--max_hours=12h"], "a positive number of hours, not '12h'"),
        (["--max_hours=-1"], "a positive number of hours, not '-1'"),
        (
            ["--max_hours=1", "--keep"],
            "--max_hours limits the cost and --keep does not",
        ),
        (["--grace_seconds=0"], "--grace_seconds must be a positive integer"),
    ],
)
def test_flags_that_are_refused(stubs, words, message) -> None:
    result = stubs.launch("tpu_pod", *MAKE, BUCKET, *words)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not stubs.calls()


@pytest.mark.parametrize(
    ("accelerator_type", "chips"),
    [
        ("v2-8", 4),
        ("v4-8", 4),
        ("v4-32", 16),
        ("v5p-8", 4),
        ("v5litepod-16", 16),
        ("v6e-1", 1),
        ("v6e-16", 16),
    ],
)
def test_cost_is_printed_first(stubs, accelerator_type, chips) -> None:
    words = [*FLAGS, BUCKET, f"--accelerator_type={accelerator_type}", "--dry_run"]
    s = "" if chips == 1 else "s"
    first, *_ = stubs.launch("tpu_pod", *words).stderr.splitlines()
    assert first == (
        f"tpu_pod.sh: {accelerator_type}: {chips} chip{s}, "
        f"{chips} chip-hour{s} for every hour"
    )
    first, *_ = stubs.launch("tpu_pod", *words, "--max_hours=1.5").stderr.splitlines()
    assert first.endswith(
        f"{chips} chip{s}, at most {chips * 1.5:g} chip-hours with --max_hours=1.5"
    )


def test_cost_of_several_slices_and_of_an_unknown_type(stubs) -> None:
    words = [*FLAGS, BUCKET, "--version=mine", "--dry_run"]
    slices = ["--accelerator_type=v4-32", "--node_count=3"]
    result = stubs.launch("tpu_pod", *words, *slices)
    assert "3 x v4-32: 48 chips, 48 chip-hours for every hour" in result.stderr
    result = stubs.launch("tpu_pod", *words, "--accelerator_type=v9-8")
    assert "v9-8: unknown number of chips, so the cost is unknown" in result.stderr


def test_workers_end_the_run_after_max_hours(stubs) -> None:
    stubs.set("state.tpu-vm", "READY")
    stubs.launch("tpu_pod", *FLAGS, LOCAL, "--install=none", "--max_hours=12")
    limit = r" timeout --foreground --preserve-status --kill-after=600s (\d+)s env "
    command = commands(stubs)[-1]
    assert 43190 < int(re.search(limit, command)[1]) <= 43200
    command = re.sub(r" \d+s env ", " 1s env ", command)
    worker = stubs.folder / "home"
    stubs.write(
        worker / "rlt_jax_launch/.venv/bin/python",
        "trap 'echo saved >saved; exit 143' TERM\nfor i in {1..300}; do sleep 0.1; done\n",
    )
    with pytest.raises(subprocess.CalledProcessError) as ended:
        stubs.shell(command, cwd=worker)
    assert ended.value.returncode == 143
    assert (worker / "rlt_jax_launch/saved").exists()


def test_max_hours_ends_the_launch_and_deletes_what_it_made(stubs) -> None:
    stubs.set("runs", "slow")
    result = stubs.launch("tpu_pod", *MAKE, BUCKET, "--max_hours=0.0006")
    assert result.returncode == 143
    assert (
        "the run was ended after --max_hours=0.0006, with status 143; the same command"
        in result.stderr
    )
    assert steps(stubs)[-1] == "delete"


def test_max_hours_leaves_a_slice_that_was_there(stubs) -> None:
    stubs.set("state.tpu-vm", "READY")
    stubs.set("runs", "slow")
    result = stubs.launch("tpu_pod", *FLAGS, BUCKET, "--max_hours=0.0006")
    assert result.returncode == 143
    assert "delete" not in steps(stubs)


def test_a_run_that_does_not_end_after_max_hours_is_left(stubs) -> None:
    stubs.set("runs", "hang")
    words = ["--max_hours=0.0014", "--grace_seconds=1"]
    result = stubs.launch("tpu_pod", *MAKE, BUCKET, *words)
    assert result.returncode == 143
    assert "the run did not end after --max_hours=0.0014" in result.stderr
    assert not stubs.still_hanging()
    assert steps(stubs) == ["create", "send", "install", "run", "delete"]
