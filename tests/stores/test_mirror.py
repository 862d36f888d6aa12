"""The mirror of a workdir at a URL: what is pushed and pulled, and what cuts it off."""

import contextlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from rlt_jax import stores
from rlt_jax.errors import StorageError, UserError
from tests.stores.conftest import Memory

URL = "memory://bucket/my/run"
LISTED = f"/bucket/my/run/{stores.LIST}"
OnHost = Callable[[str], Path]


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def content(root: Path) -> dict[str, str]:
    """Name -> text of every file of the run."""
    return {
        str(file.relative_to(root)): file.read_text(encoding="utf-8")
        for file in root.rglob("*")
        if file.is_file() and file.name != stores.LIST
    }


def train(root: Path, step: int) -> None:
    """Appends records and replaces the checkpoint by that of a step."""
    with (root / "rl" / "metrics.jsonl").open("a", encoding="utf-8") as opened:
        opened.write(json.dumps({"step": step}) + "\n")
    write(root, {f"rl/checkpoints/{step}/{part}": f"{part}{step}" for part in "abc"})
    for old in (root / "rl" / "checkpoints").iterdir():
        if old.name != str(step):
            shutil.rmtree(old)
    write(root, {"rl/checksums.json": json.dumps({"of": step})})


def run(root: Path, upto: int = 3) -> None:
    """A run that goes on from what it finds; every step is pushed."""
    settings = root / "rl" / "settings.json"
    write(root, {"run.json": "{}"})
    if settings.exists():
        assert json.loads(settings.read_text(encoding="utf-8")) == {"at": f"{root}/rl"}
    stores.push()
    write(root, {"rl/settings.json": json.dumps({"at": f"{root}/rl"})})
    write(root, {"rl/metrics.jsonl": ""} if not checkpoints(root) else {})
    first = max(checkpoints(root), default=0)
    file = root / "rl" / "metrics.jsonl"
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(rows) >= first  # the records of a checkpoint are there before it
    file.write_text("".join(rows[:first]), encoding="utf-8")
    for step in range(first + 1, upto + 1):
        train(root, step)
        stores.push()
    write(root, {"rl/done.json": "{}"})


def checkpoints(root: Path) -> list[int]:
    """Steps of the checkpoints, which are whole."""
    found = []
    for folder in (root / "rl" / "checkpoints").glob("*"):
        assert {file.name for file in folder.iterdir()} == {"a", "b", "c"}
        found.append(int(folder.name))
    return found


def test_another_host_goes_on_with_all_files(memory: Memory, on_host: OnHost) -> None:
    with stores.workdir(URL) as root:
        run(root, 2)
        left = content(root)
    assert "{workdir}/rl" in memory.objects["/bucket/my/run/rl/settings.json"].decode()
    on_host("other")
    with stores.workdir(URL) as other:
        assert other != root and other.name == "run"
        moved = {k: v.replace(str(root), str(other)) for k, v in left.items()}
        assert content(other) == moved
        assert json.loads(moved["rl/settings.json"]) == {"at": f"{other}/rl"}


class Killed(BaseException):
    """The process ends here."""


def dies_at(moment: int) -> Callable[..., None]:
    """What kills the process at an operation of the store, in all its threads."""
    count = itertools.count()

    def kill(*_: object) -> None:
        if next(count) >= moment:
            raise Killed

    return kill


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)], ids=str)
def test_it_can_be_killed_at_any_operation_of_the_store(
    every: int, elsewhere: bool, memory: Memory, on_host: OnHost
) -> None:
    with stores.workdir(URL) as root:
        run(root)
        whole = content(root)
    assert len(memory.calls) > 30
    for moment in range(0, len(memory.calls), every):
        base = f"bucket/{moment}/run"
        on_host(f"{moment}")
        memory.before = dies_at(moment)
        with pytest.raises(Killed), stores.workdir(f"memory://{base}") as root:
            run(root)
        memory.before = lambda *_: None
        if elsewhere:  # from what is in the store alone
            on_host(f"{moment} elsewhere")
        with stores.workdir(f"memory://{base}") as root:
            run(root)
        end = content(root)
        assert end.keys() == whole.keys()
        assert end["rl/metrics.jsonl"] == whole["rl/metrics.jsonl"]
        listed = json.loads(memory.objects[f"/{base}/{stores.LIST}"])
        assert set(listed["files"]) == whole.keys()
        assert {f"/{base}/{name}" for name in whole} <= memory.objects.keys()


def test_only_what_has_changed_is_put(memory: Memory, on_host: OnHost) -> None:
    with stores.workdir(URL) as root:
        write(root, {"rl/a.json": "1", "rl/b.json": "1"})
        stores.push()
        memory.calls.clear()
        stores.push()
        assert memory.calls == []
        write(root, {"rl/b.json": "22"})
        stores.push()
        put = [path for name, path in memory.calls if name == "put_file"]
        assert [Path(path).name for path in put] == ["b.json", stores.LIST]


def test_the_list_is_put_after_the_files_and_before_anything_is_removed(
    memory: Memory, on_host: OnHost
) -> None:
    with stores.workdir(URL) as root:
        run(root, 1)
        stores.push()
        memory.calls.clear()
        train(root, 2)
        stores.push()
    names = [name for name, _ in memory.calls]
    listed = memory.calls.index(("put_file", f"/bucket/my/run/{stores.LIST}"))
    assert "put_file" not in names[listed + 1 :]
    assert names.count("rm_file") == 3
    assert names.index("rm_file") > listed


def test_what_is_not_whole_is_not_put(memory: Memory, on_host: OnHost) -> None:
    with stores.workdir(URL) as root:
        partial = "rl/checkpoints/5.orbax-checkpoint-tmp/a"
        write(root, {".rl.lock": "1", "rl/done.json.partial": "1", partial: "1"})
        write(root, {"rl/x.json": "1"})
    names = {Path(path).name for path in memory.objects}
    assert names == {"x.json", stores.LIST}


def test_a_checkpoint_may_go_while_it_is_pushed(
    memory: Memory, on_host: OnHost
) -> None:
    with stores.workdir(URL) as root:
        run(root, 1)
        stores.push()
        train(root, 2)
        folder = root / "rl" / "checkpoints" / "2"

        def remove(name: str, *args: object) -> None:
            if name == "put_file":
                shutil.rmtree(folder, ignore_errors=True)

        memory.before = remove
        stores.push()
        listed = json.loads(memory.objects[f"/bucket/my/run/{stores.LIST}"])
        steps = {name.split("/")[2] for name in listed["files"] if "points/" in name}
        assert steps == {"1"}  # whole, and not a part of the one that has gone
        memory.before = lambda *_: None
        train(root, 3)
    on_host("other")
    with stores.workdir(URL) as other:
        assert checkpoints(other) == [3]


def test_a_mirror_that_the_store_has_gone_on_from_is_put_aside(
    memory: Memory, on_host: OnHost, caplog: pytest.LogCaptureFixture
) -> None:
    with stores.workdir(URL) as root:
        run(root, 1)
    on_host("other")
    with stores.workdir(URL) as other:
        run(other, 3)
    on_host("host")
    with stores.workdir(URL) as back:
        assert back == root
        assert checkpoints(root) == [3]
        assert "has gone on elsewhere" in caplog.text
    (kept,) = root.parent.glob("run.*")
    assert checkpoints(kept) == [1]


def test_a_mirror_that_was_cleaned_up_does_not_empty_the_store(
    memory: Memory, on_host: OnHost, caplog: pytest.LogCaptureFixture
) -> None:
    with stores.workdir(URL) as root:
        run(root)
        whole = content(root)
    before = {*memory.objects}
    (root / "rl" / "checkpoints" / "3" / "a").unlink()
    with stores.workdir(URL) as again:
        assert content(again) == whole
    assert "has more than" in caplog.text
    assert {*memory.objects} == before


def test_a_pull_that_was_cut_off_goes_on(memory: Memory, on_host: OnHost) -> None:
    with stores.workdir(URL) as root:
        run(root)
        whole = content(root)
    on_host("other")
    for moment in (4, 6, 8, 10**6):
        memory.calls.clear()
        memory.before = dies_at(moment)
        with contextlib.suppress(Killed), stores.workdir(URL) as other:
            here = content(other).items()
            assert {k: v.replace(str(other), str(root)) for k, v in here} == whole
            assert {x.name for x in other.parent.iterdir()} == {".lock", "run"}
    read = [name for call, name in memory.calls if call == "get_file"]
    assert 0 < len(read) < len(whole)


def test_a_run_that_is_replaced_while_it_puts_files_does_not_put_its_list(
    memory: Memory, on_host: OnHost
) -> None:
    taken = pytest.raises(UserError, match="has taken over")
    with taken, stores.workdir(URL) as root:
        run(root, 1)
        train(root, 2)

        def other_begins(call: str, *paths: str) -> None:
            if call == "put_file" and "checkpoints" in paths[-1]:
                memory.before = lambda *_: None
                other = json.loads(memory.objects[LISTED])
                other |= {"id": "other", "owner": "process 1 on other"}
                memory.put(LISTED, json.dumps(other).encode())

        memory.before = other_begins
        stores.push()
    assert json.loads(memory.objects[LISTED])["id"] == "other"


def test_a_run_that_was_replaced_ends(memory: Memory, on_host: OnHost) -> None:
    message = "process .* has taken over memory://bucket/my/run; "
    with pytest.raises(UserError, match=message), stores.workdir(URL) as root:
        run(root, 1)
        on_host("other")
        with stores.workdir(URL) as other:
            run(other, 2)
        before = memory.objects
        on_host("host")
        train(root, 7)
    assert memory.objects == before


def test_two_runs_of_a_host_do_not_share_a_mirror(
    memory: Memory, on_host: OnHost
) -> None:
    in_use = pytest.raises(UserError, match="in use by a run on this host")
    with stores.workdir(URL), in_use, stores.workdir(URL):
        pytest.fail("it works")
    with stores.workdir(URL):
        pass


def test_failures_that_pass_are_tried_again(memory: Memory, on_host: OnHost) -> None:
    failures = itertools.cycle([OSError("503"), TimeoutError(), ConnectionResetError()])
    calls: Counter[tuple[object, ...]] = Counter()

    def fail(*call: object) -> None:
        calls[call] += 1
        if calls[call] % 3:
            raise next(failures)

    memory.before = fail
    with stores.workdir(URL) as root:
        run(root, 2)
        left = content(root)
    on_host("other")
    with stores.workdir(URL) as other:
        assert content(other).keys() == left.keys()


def test_the_tries_are_bounded(
    memory: Memory, on_host: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(stores, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(stores.time, "sleep", waits.append)

    def fail(*_: object) -> None:
        raise OSError("503 Service Unavailable")

    message = rf"{URL}: OSError 503.*6 times.*is kept in"
    with pytest.raises(StorageError, match=message), stores.workdir(URL) as root:
        write(root, {"rl/a.jsonl": "1"})
        memory.before = fail
    assert waits == [1, 2, 4, 8, 16]
    memory.before = lambda *_: None
    with stores.workdir(URL) as again:  # what was not pushed is pushed first
        assert content(again) == {"rl/a.jsonl": "1"}
    assert "/bucket/my/run/rl/a.jsonl" in memory.objects


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        OSError("Forbidden: b/bucket"),
        RuntimeError("Unable to locate credentials"),
        NotImplementedError(),
        RuntimeError("Anonymous caller does not have storage.objects.create access"),
    ],
    ids=str,
)
def test_a_refusal_ends_before_any_work(
    error: Exception, memory: Memory, on_host: OnHost
) -> None:
    def refuse(name: str, *_: object) -> None:
        if name == "put_file":
            raise error

    memory.before = refuse
    with pytest.raises(UserError, match=f"^{URL}: .*rights"), stores.workdir(URL):
        pytest.fail("it works")
    assert [name for name, _ in memory.calls].count("put_file") == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://bucket/run", "nosuch://bucket/run: Protocol not known"),
        ("memory://", r"^memory://: it names no bucket\.$"),
        ("gs://", r"^gs://: it names no bucket\.$"),
        ("s3:/", r"^s3:/: it names no bucket\.$"),
        ("adl://container/run", "pip install"),
    ],
)
def test_an_address_without_store_is_one_message(
    url: str, message: str, on_host: OnHost
) -> None:
    with pytest.raises(UserError, match=message), stores.workdir(url):
        pytest.fail("it works")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"id": "1", "removed": [], "files": []}',
        b'{"id": "1", "removed": 1, "files": {}}',
        b'{"id": "1", "removed": [], "files": {"../../x": [1, 1]}}',
        b'{"id": "1", "removed": [], "files": {"/x": [1, 1]}}',
        b'{"id": "1", "removed": [], "files": {"rl/missing": [1, 1]}}',
    ],
)
def test_a_damaged_list_is_one_message(
    text: bytes, memory: Memory, on_host: OnHost
) -> None:
    memory.put(f"/bucket/my/run/{stores.LIST}", text)
    with pytest.raises(UserError, match=URL), stores.workdir(URL):
        pytest.fail("it works")


def test_a_run_of_another_kind_is_not_overwritten(
    memory: Memory, on_host: OnHost
) -> None:
    memory.put("/bucket/my/run/run.json", b"{}")
    with pytest.raises(UserError, match="has a run without"), stores.workdir(URL):
        pytest.fail("it works")


def test_a_folder_is_worked_in_as_it_is(tmp_path: Path, on_host: OnHost) -> None:
    with stores.workdir(tmp_path) as root:
        assert root == tmp_path
        stores.push()
    assert not os.listdir(tmp_path)
