"""The folder of a stage: is it complete, was it made with these settings, what did it read.

`settings.json` has the settings; `sessions.json`, until `done.json` takes its place, how
often the stage was begun; `changes.jsonl` the settings that it was continued with.
"""

import contextlib
import datetime
import fcntl
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

from rlt_jax import files, stores
from rlt_jax.errors import LOG, UserError
from rlt_jax.records import Record
from rlt_jax.stages import preflight
from rlt_jax.training.metrics import append_jsonl

SETTINGS, SESSIONS, DONE = "settings.json", "sessions.json", "done.json"
CHANGES = "changes.jsonl"
# Types of what sessions.json, done.json and run.json may have.
KINDS = {"sessions": int, "inputs": dict, "workdir": str, "files": dict, "date": str}
KINDS |= {"stage": str, "finished": str, "seconds": float, "summary": dict}
RUN = "run.json"  # in the workdir
# What --resume_with_changes may change; with more of the first, a complete stage goes on.
LENGTHS = ("sft.steps", "sft.epochs", "loop.steps")
CHANGEABLE = re.compile(
    r"(sft|loop)\.(steps|epochs|\w+_every|keep_checkpoints|max_skipped|micro_batch_size"
    r"|profile_steps)|optimizer\.(learning_rate|schedule|warmup_fraction|weight_decay"
    r"|clip_norm)|objective\.skip_gradient_norm|rows\.micro_batch_size|(mesh|engine)(\..*)?"
)


def is_done(folder: Path) -> bool:
    """Whether the stage in a folder is complete."""
    return bool(_read(folder / DONE))


def begin(name: str, folder: Path, values: Record, with_changes: bool) -> bool:
    """Makes the folder of a stage that has something to do, with its settings.

    Args:
      name: of the stage.
      folder: of the stage.
      values: settings of the stage.
      with_changes: whether it may continue with other settings, where these allow it.

    Returns:
      Whether there is something to do.

    Raises:
      UserError: the folder was made with other settings.
    """
    found = _changed_settings(name, folder, values)
    if found and not (with_changes and _may_change(folder, found)):
        key, (before, now) = next(iter(found.items()))
        how = f"with other settings ({key} was {before!r}, is {now!r})"
        raise _made(name, folder, how, go_on=_may_change(folder, found))
    changed = changed_inputs(folder, values)
    if changed:
        LOG.info(f"stage {name}: {changed[0]}, which it reads, was run afresh")
        keep_aside(folder)
    if is_done(folder) and not found:
        return False
    check_inputs(folder, values)
    begun, inputs = _read(folder / SESSIONS), _inputs(folder, values)
    # One that died told nobody how long it was.
    sessions = begun.get("sessions", int((folder / SETTINGS).is_file())) + 1
    with files.storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with files.storing(folder / DONE):
        (folder / DONE).unlink(missing_ok=True)
    stores.push()  # before the new settings: a store has no more of what was done with others
    begun = {"sessions": sessions, "inputs": inputs, "workdir": str(folder.parent)}
    files.write_json(folder / SESSIONS, begun)
    if found and not changed:
        _record_changes(name, folder, found)
    files.write_json(folder / SETTINGS, values)
    return True


def complete(folder: Path, done: Record) -> None:
    """Writes `done.json`; its seconds are those of the last of `sessions`."""
    outputs = [*folder.glob("*.jsonl"), *folder.glob("results.json")]
    sizes = {"files": {file.name: file.stat().st_size for file in sorted(outputs)}}
    begun = _read(folder / SESSIONS)
    files.write_json(folder / DONE, files.finite(done) | sizes | begun)
    (folder / SESSIONS).unlink(missing_ok=True)


def changed_inputs(folder: Path, values: Record) -> list[str]:
    """Stages that were run afresh since a stage has read from them."""
    inputs = _inputs(folder, values)
    begun = _begun(folder)
    known = begun.get("inputs", inputs)  # earlier versions did not keep them
    names = known.keys() | inputs.keys()
    return sorted(name for name in names if known.get(name) != inputs.get(name))


def check_inputs(folder: Path, values: Record) -> None:
    """Checks that the stages that are read have the files that they were completed with.

    Raises:
      UserError: a file has another size, as when its end was lost.
    """
    for name in _inputs(folder, values):
        sizes = _read(folder.with_name(name) / DONE).get("files", {})
        for output, size in sizes.items():
            file = folder.with_name(name) / output
            now = file.stat().st_size if file.is_file() else 0
            if now != size:
                raise UserError(
                    f"{file} has {now:,} bytes, but {size:,} when its stage was complete. "
                    f"Restore it, or run the stage afresh with --only={name}; to read a "
                    "changed copy, name it in the config."
                )


def set_aside(name: str, folder: Path, values: Record, with_changes: bool) -> None:
    """Renames the folder of a complete stage, or of one with other settings.

    Args:
      name: of the stage.
      folder: of the stage.
      values: settings of the stage.
      with_changes: whether it may continue with other settings, where these allow it.
    """
    try:
        found = _changed_settings(name, folder, values)
    except UserError:  # damaged
        return keep_aside(folder)
    goes_on = with_changes and found and _may_change(folder, found)
    if not goes_on and (found or is_done(folder)):
        keep_aside(folder)


def keep_aside(folder: Path) -> None:
    """Renames a folder, so that the stage begins afresh and what it did is kept."""
    number = 1
    while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    with files.storing(folder):
        folder.rename(kept)
    LOG.info("the earlier %s is kept as %s", folder, kept)


def remove_untouched(folder: Path) -> None:
    """Removes a stage's folder without any work in it: a mended config may use it."""
    if {path.name for path in folder.iterdir()} == {SETTINGS, SESSIONS}:
        shutil.rmtree(folder)
        others = {path.name for path in folder.parent.glob("[!.]*")}  # locks apart
        if others == {RUN}:
            (folder.parent / RUN).unlink()


def date_of_run(root: Path) -> str:
    """Date and time of the run's first start: chat templates may have them in prompts."""
    file = root / f".{RUN}.lock"
    files.check_regular(file)
    with files.storing(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
    with lock:  # runs of several seeds may start at the same time
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not (date := _read(root / RUN).get("date")):
            date = _date_of_stages(root) or now()
            files.write_json(root / RUN, {"date": date})
        file.unlink(missing_ok=True)  # who waits for it finds the date
    return date


def _date_of_stages(root: Path) -> str:
    """The date that the stages of a run were made with, where run.json is lost; or ""."""
    dates: list[str] = []
    for file in sorted(root.glob(f"*/{SETTINGS}")):
        with contextlib.suppress(UserError):  # damaged, which its own stage says
            found = flat(files.read_json(file))
            dates += [x for key, x in found.items() if key.endswith(".date") and x]
    return statistics.mode(dates) if dates else ""


def now() -> str:
    """Date and time as ISO 8601 has them."""
    return datetime.datetime.now().astimezone().isoformat()


def flat(values: Any, prefix: str = "") -> Record:
    """Nested values by their dotted keys."""
    if not isinstance(values, dict) or (prefix and not values):
        return {prefix: values}
    return {
        key: leaf
        for name, item in values.items()
        for key, leaf in flat(item, f"{prefix}.{name}" if prefix else name).items()
    }


def differences(old: Record, new: Record) -> dict[str, tuple[Any, Any]]:
    """Key -> value before and now, where settings differ; {} without any before."""
    before, after = flat(old), flat(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys() if old else ())
        if before.get(key) != after.get(key)
    }


def _changed_settings(
    name: str, folder: Path, values: Record
) -> dict[str, tuple[Any, Any]]:
    """`differences` to the settings that a folder was made with.

    Paths in the workdir are the same if it was called otherwise, as when it has moved.
    """
    begun, root = _begun(folder), folder.parent

    def relative(settings: Record, root: str) -> Record:
        beginning = json.dumps(f"{root}/")[:-1]
        text = json.dumps(settings).replace(beginning, '"{workdir}/')
        return json.loads(text)

    old = relative(_settings(name, folder), begun.get("workdir", str(root)))
    return differences(old, relative(values, str(root)))


def _may_change(folder: Path, found: dict[str, tuple[Any, Any]]) -> bool:
    """Whether a stage may continue with these differences."""
    lengths = [found[key] for key in LENGTHS if key in found]
    longer = any((now or 0) > (old or 0) for old, now in lengths)
    return all(map(CHANGEABLE.fullmatch, found)) and (longer or not is_done(folder))


def _record_changes(name: str, folder: Path, found: dict[str, tuple[Any, Any]]) -> None:
    changes = {key: {"before": old, "now": new} for key, (old, new) in found.items()}
    append_jsonl(folder / CHANGES, [{"time": now(), "changes": changes}])
    words = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in found.items())
    LOG.info(f"stage {name} continues with changes: {words}")


def _made(name: str, folder: Path, how: str, go_on: bool = False) -> UserError:
    changes = ", --resume_with_changes to continue with these" if go_on else ""
    return UserError(
        f"stage {name}: {folder} was made {how}. Use another --workdir{changes}, or "
        f"--only={name} to run this stage afresh."
    )


def _settings(name: str, folder: Path) -> Record:
    """The settings that a folder was made with; {} for a new one."""
    try:
        found = files.read_json(folder / SETTINGS, {})
        if not found and (folder / SETTINGS).is_file():
            raise UserError(f"{folder / SETTINGS} is damaged: it has no settings.")
        return found
    except UserError as error:
        raise UserError(
            f"{error} If the config is the one that the stage was made with, remove that "
            f"file and the stage continues; --only={name} runs it afresh."
        ) from error


def _inputs(folder: Path, values: Record) -> dict[str, str]:
    """Complete stages that a stage reads -> when they were complete."""
    read = preflight.stages_read(values, folder.parent)
    if values["stage"] == "report":  # it has their names
        read += re.findall(r'"(\w+)"', json.dumps(values))
    others = {*read} - {folder.name}
    done = {name: _read(folder.with_name(name) / DONE) for name in others}
    return {name: x["finished"] for name, x in done.items() if x.get("finished")}


def _begun(folder: Path) -> Record:
    """What is kept of a stage: `done.json`, or `sessions.json` until that is there."""
    return _read(folder / DONE) or _read(folder / SESSIONS)


def _read(file: Path) -> Record:
    """The values in a file; {} where there is none or, with a warning, a damaged one."""
    try:
        return files.read_json(file, {}, KINDS)
    except UserError as error:
        LOG.warning("%s It is not used; the stage continues without it.", error)
        return {}
