import pytest

FLAGS = ["--gpus_per_node=8", "--config=configs/x.py", "--workdir=/shared/x y"]


def test_one_task_a_gpu_and_all_tasks_see_all(stubs, hard_words) -> None:
    words = ["--nodes=2", "--time=1:00", "--partition=p", "--account=a"]
    words += ["--cpus_per_task=4", "--srun_flag=--exclusive", "--python=/env/python"]
    result = stubs.launch("slurm", *FLAGS, *words, "--", *hard_words)
    assert result.returncode == 0, result.stderr
    (call,) = stubs.calls()
    assert call == [
        *["srun", "--job-name=rlt_jax", "--kill-on-bad-exit=1", "--label"],
        *["--nodes=2", "--time=1:00", "--partition=p", "--account=a"],
        *["--cpus-per-task=4", "--ntasks-per-node=8", "--gpus-per-node=8"],
        *["--gpu-bind=none", "--exclusive", "/env/python", "-m", "rlt_jax.main"],
        *["--config=configs/x.py", "--workdir=/shared/x y", *hard_words],
    ]


def test_status_is_passed_on(stubs) -> None:
    stubs.outcomes("srun", ("main", "3"))
    assert stubs.launch("slurm", *FLAGS).returncode == 3


def test_a_container(stubs) -> None:
    words = ["--container_image=docker://r#rlt_jax:cuda", "--container_mounts=/a:/b"]
    result = stubs.launch("slurm", *FLAGS, "--config=configs/inside.py", *words)
    assert result.returncode == 0, result.stderr
    (call,) = stubs.calls()
    assert call[4:7] == [
        "--container-image=docker://r#rlt_jax:cuda",
        "--container-workdir=/app",
        "--container-mounts=/a:/b",
    ]
    assert "in the container cannot be checked from here" in result.stderr


@pytest.mark.parametrize(("words", "cpus"), [([], "6"), (["--cpus_per_task=2"], "2")])
def test_cores_of_the_allocation(stubs, words, cpus) -> None:
    stubs.launch("slurm", *FLAGS, *words, SLURM_CPUS_PER_TASK="6")
    (call,) = stubs.calls()
    assert f"--cpus-per-task={cpus}" in call
