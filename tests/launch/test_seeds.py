"""launch/seeds.sh: the seeds of an experiment side by side."""

import pytest

FLAGS = ["--config=configs/x.py", "--workdir=runs/x y"]


def command(seed: str, *rest: str) -> list[str]:
    flags = [f"--config=configs/x.py:{seed}", "--workdir=runs/x y"]
    cache = "--compilation_cache=runs/x y/programs"
    return ["python", "-m", "rlt_jax.main", *flags, cache, *rest]


def test_every_seed_runs_once(stubs, hard_words) -> None:
    result = stubs.launch("seeds", *FLAGS, "--seeds=3,5", "--", *hard_words)
    assert result.returncode == 0, result.stderr
    expected = [command(seed, *hard_words) for seed in ("3", "5")]
    assert sorted(stubs.calls()) == expected


def test_a_single_seed(stubs) -> None:
    result = stubs.launch("seeds", *FLAGS, "--seeds=3")
    assert result.returncode == 0, result.stderr
    assert stubs.calls() == [command("3")]


@pytest.mark.parametrize("seeds", ["0,", "0, 1", "one", "0,1,0"])
def test_lists_that_are_refused(stubs, seeds) -> None:
    result = stubs.launch("seeds", *FLAGS, f"--seeds={seeds}")
    assert result.returncode == 2
    assert "--seeds" in result.stderr and not stubs.calls()


def test_a_failing_seed_ends_the_others(stubs) -> None:
    stubs.outcomes("python", (":5", "4"), (":3", "hang"))
    result = stubs.launch("seeds", *FLAGS, "--seeds=3,5")
    assert result.returncode == 4
    assert not stubs.still_hanging()
