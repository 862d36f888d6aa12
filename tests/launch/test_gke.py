FLAGS = [
    *["--cluster=k", "--zone=z", "--tpu_type=tpu7x-16", "--workload=w"],
    *["--storage=s", "--config=configs/x.py", "--workdir=/mnt/x"],
]


def test_adds_the_checkout_to_an_image_and_waits(stubs, hard_words) -> None:
    words = [
        "--project=p",
        "--env=A=b c",
        "--env=D=e",
        "--storage=t",
        "--xpk_flag=--spot",
    ]
    result = stubs.launch("gke", *FLAGS, *words, "--", *hard_words)
    assert result.returncode == 0, result.stderr
    create, wait = stubs.calls("xpk")
    assert create[1:9] == [
        *["workload", "create", "--cluster=k", "--zone=z", "--project=p"],
        *["--workload=w", "--tpu-type=tpu7x-16", "--num-slices=1"],
    ]
    assert create[9:11] == ["--max-restarts=10", "--restart-on-exit-codes=75"]
    assert create[11] == "--base-docker-image=python:3.12"
    assert create[12].startswith("--script-dir=")
    assert create[13:15] == ["--spot", "--storage=s"]
    assert create[15:18] == ["--storage=t", "--env=A=b c", "--env=D=e"]
    assert wait[1:] == [
        *["workload", "list", "--cluster=k", "--zone=z", "--project=p"],
        "--wait-for-job-completion=w",
    ]
    stubs.shell(create[18].removeprefix("--command="))
    install, run = stubs.calls("python")
    assert install[1:] == ["-m", "pip", "install", "--quiet", "-e", ".[tpu]"]
    config, workdir = FLAGS[-2:]
    assert run[1:] == ["-m", "rlt_jax.main", config, workdir, *hard_words]


def test_runs_an_image_as_it_is(stubs) -> None:
    stubs.launch("gke", *FLAGS, "--image=mine", "--wait=false")
    (call,) = stubs.calls()
    assert "--docker-image=mine" in call
    assert call[-1].startswith("--command=exec python -m rlt_jax.main ")


def test_several_slices_and_what_they_cost(stubs) -> None:
    result = stubs.launch("gke", *FLAGS, "--num_slices=3")
    create, _ = stubs.calls("xpk")
    assert "--num-slices=3" in create
    first, *_ = result.stderr.splitlines()
    assert first == ("gke.sh: 3 x tpu7x-16: 24 chips, 24 chip-hours for every hour")


def test_nothing_can_be_asked(stubs) -> None:
    stubs.write(stubs.bin / "xpk", "read -r answer && echo asked")
    assert stubs.launch("gke", *FLAGS, "--image=mine").returncode == 1
    assert len(stubs.calls("xpk")) == 1


def test_status_of_the_workload_is_passed_on(stubs) -> None:
    stubs.outcomes("xpk", ("list", "125"))
    assert stubs.launch("gke", *FLAGS).returncode == 125


def test_a_workdir_that_would_be_lost_is_refused(stubs) -> None:
    flags = [flag for flag in FLAGS if not flag.startswith("--storage")]
    lost = stubs.launch("gke", *flags)
    assert lost.returncode == 2
    assert "--workdir=/mnt/x would be lost with the pods" in lost.stderr
    assert not stubs.calls()


def test_a_bucket_has_to_be_attached(stubs) -> None:
    result = stubs.launch("gke", *FLAGS, "--workdir=gs://bucket/x")
    assert result.returncode == 2
    assert "attach the bucket to the cluster" in result.stderr
    assert not stubs.calls()
