"""What tells a process that it is one of several; several are in stages/test_hosts.py."""

import pytest

from rlt_jax.errors import UserError
from rlt_jax.training import hosts

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(("tasks", "several"), [(None, False), (1, False), (2, True)])
def test_slurm_steps_of_several_tasks(
    tasks: int | None, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    if tasks is not None:
        monkeypatch.setenv("SLURM_NTASKS", str(tasks))
    assert hosts._in_cluster() == several


def test_one_process_connects_to_nobody() -> None:
    hosts.connect(None, None, None)
    assert hosts.is_first()
    assert not hosts.stopping()
    hosts.agree("everything", {"x": 1})
    assert hosts.from_first(lambda: (1, 2)) == (1, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a:1", None, None), "--num_processes and --process_id missing"),
        ((None, None, 0), "--coordinator_address and --num_processes missing"),
        (("a", 2, 0), "give HOST:PORT"),
        (("a:1", 2, 2), "an id from 0"),
    ],
)
def test_flags_that_do_not_fit(flags: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hosts.connect(*flags)
