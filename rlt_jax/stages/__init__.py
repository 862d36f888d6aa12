"""The stages by name, and the pipeline that runs them in order.

A stage is a module with `SECTIONS`, the owners of the keys of its config, and
`run(config, workdir, seed)`, which is given that config, the folder of the stage and the
seed of everything random, and returns a summary that goes into `done.json`, beside the
seconds and the peak memory of the stage (on accelerators, of all stages so far). One with
`prepare(config, seed)` is checked before the first stage of a run works, see `preflight`.
"""

import datetime
import difflib
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from rlt_jax import settings
from rlt_jax.errors import LOG, UserError, check_choice
from rlt_jax.ranges import NonNegativeInt, check_value
from rlt_jax.records import Record
from rlt_jax.stages import preflight
from rlt_jax.training import hosts
from rlt_jax.training.metrics import finite, peak_gib, reset_peak, write_json

STAGES = ("sft", "rl", "collect", "score", "evaluate", "plan", "export", "report")
SESSIONS = "sessions.json"  # in the folder of a stage until it is complete
RUN = "run.json"  # in the workdir
# Keys of earlier versions -> their names now.
RENAMED = {
    "student": "students, a tuple of models",
    "reward": "rlt_reward",
    "terms": "reward_terms",
    "sft.format": "sft.role",
    "loop.format": "loop.role",
}


def run_pipeline(
    config: ConfigDict, workdir: str | Path, only: str | None = None
) -> None:
    """Runs every stage of the config that is not complete.

    A config has `seed` and either `stage` (the config is that one stage) or `pipeline`,
    an ordered tuple of names of sections that each have a `stage`, and a `seed` where it
    is not the config's. In any string of a section `{workdir}` stands for the workdir.
    Models get the date and time of the run's first start, which run.json keeps.

    Args:
      config: the config.
      workdir: folder that holds a folder for each stage.
      only: name of the one stage to run, afresh if it was complete. Later stages that read
        from it run afresh the next time.

    Raises:
      UserError: bad input, anywhere in a stage.
    """
    root = _checked_workdir(workdir)
    sections = stage_sections(config)
    _check_hosts(config, root, only)
    if only is not None:
        if only not in sections:
            raise UserError(f"--only={only}: the config has {', '.join(sections)}.")
        sections = {only: sections[only]}
    left: dict[str, Record] = {}
    for name, section in sections.items():
        values, folder = _settings(section, root, "", config.seed), root / name
        reads = {*preflight.stages_read(values, root)} & left.keys()
        complete = (folder / "done.json").is_file() and not _changed(folder, values)
        if only is not None or reads or not complete:
            left[name] = values
    # The first of several checks itself at once.
    first, to_make = (0, {}) if only is not None else (1, left)
    preflight.check([*left.values()][first:], to_make, root)
    date = hosts.from_first(lambda: _date(root))
    if only is not None:
        values = _settings(sections[only], root, date, config.seed)
        hosts.from_first(lambda: _set_aside(root / only, values))
    for name, section in sections.items():
        hosts.stop_if_asked()
        _run_stage(name, _settings(section, root, date, config.seed), root)


def stage_sections(config: ConfigDict) -> dict[str, ConfigDict]:
    """Name -> config of every stage, in order.

    Raises:
      UserError: neither `stage` nor `pipeline`, a name without section, or a section
        with unknown or missing keys.
    """
    settings.resolve(config)
    if "seed" not in config:
        raise UserError("config: the key 'seed' is missing.")
    check_value("config.seed", NonNegativeInt, config.seed)
    if "stage" in config:
        section = ConfigDict(config.to_dict())
        del section.seed
        return {_checked_stage(section, "config"): section}
    if "pipeline" not in config:
        raise UserError("config: needs a 'stage', or a 'pipeline' of section names.")
    check_value("config.pipeline", Sequence[str], config.pipeline)
    if not config.pipeline or len({*config.pipeline}) < len(config.pipeline):
        raise UserError(
            f"config.pipeline={config.pipeline}: one or more different names."
        )
    for name in config.pipeline:
        if name not in config:
            raise UserError(
                f"config.pipeline names {name!r}, config.{name} is missing."
            )
        _checked_stage(config[name], f"config.{name}")
    return {name: config[name] for name in config.pipeline}


def _checked_stage(section: Any, where: str) -> str:
    """The stage of a section; all keys are checked now, before any stage works."""
    if not isinstance(section, ConfigDict):
        raise UserError(f"{where} is {section!r}, not the section of a stage.")
    values = section.to_dict()
    stage = values.pop("stage", None)
    check_value(f"{where}.seed", NonNegativeInt, values.pop("seed", 0))
    check_choice(f"{where}.stage", stage, STAGES)
    if renamed := _renamed(values):
        raise UserError(f"{where}.{renamed[0]} is now called {renamed[1]}.")
    settings.check(preflight.module_of(stage).SECTIONS, values, where)
    return stage


def _renamed(values: settings.Section) -> tuple[str, str] | None:
    """The first key that an earlier version named otherwise, and its name now."""
    students = values.get("students")
    if isinstance(students, Mapping) and "path" not in students:
        return "students", "ensemble, and `student` is now `students`"
    for old, new in RENAMED.items():
        part, _, key = old.rpartition(".")
        section = values.get(part) if part else values
        if isinstance(section, Mapping) and key in section:
            return old, new
    return None


def explain_override(arguments: Sequence[str], error: Exception) -> str:
    """Why a setting on the command line does not fit the config."""
    for old, new in RENAMED.items():
        pattern = rf"--config\.(\w+\.)?{re.escape(old)}[.=\[]"
        if any(re.match(pattern, argument) for argument in arguments):
            return f"has an old name: {old} is now called {new}."
    is_setting = re.compile(r"--?(?:no)?config\.([^=]+)")
    others = [x for x in arguments if not is_setting.match(x)]
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=parsed, sys_argv=others)
    parsed(others, known_only=True)
    known = _keys(parsed.config)
    for key in (found[1] for found in map(is_setting.match, arguments) if found):
        if not any(re.match(rf"{re.escape(key)}($|[.\[])", one) for one in known):
            same = [one for one in known if one.split(".")[-1] == key.split(".")[-1]]
            near = difflib.get_close_matches(key, same or known, 1, 0 if same else 0.6)
            meant = f" (did you mean --config.{near[0]}?)" if near else ""
            return f"has a key the config lacks: --config.{key}{meant}"
    reason = error.args[0] if isinstance(error.args[0], LookupError) else error
    return f"does not fit the config: {' '.join(str(reason.args[0]).split())}"


def _keys(config: ConfigDict) -> list[str]:
    """Keys of all settings, as the command line names them."""
    leaves = jax.tree_util.tree_leaves_with_path(
        json.loads(config.to_json_best_effort()), is_leaf=lambda x: not x
    )
    names = (jax.tree_util.keystr(path) for path, _ in leaves)
    return [re.sub(r"\['(.*?)'\]", r".\1", name)[1:] for name in names]


def _run_stage(name: str, values: Record, root: Path) -> None:
    folder = root / name
    if hosts.from_first(lambda: _is_complete(name, folder, values)):
        LOG.info("stage %s is complete, skipped", name)
        return
    if not (folder / "settings.json").is_file():
        raise UserError(
            f"{folder}, which process 0 has made, is not visible on this host: --workdir "
            "has to be in a file system that all hosts share."
        )
    stage = values["stage"]
    LOG.info("stage %s (%s) begins", name, stage)
    reset_peak()
    start = time.monotonic()
    config = ConfigDict(values)
    del config.seed, config.stage
    try:
        summary = preflight.module_of(stage).run(config, folder, values["seed"])
    except UserError:
        if hosts.is_first():
            _remove_untouched(folder)
        raise
    costs = {"seconds": time.monotonic() - start, "peak_gib": peak_gib()}
    done = {"stage": stage, "finished": _now(), **costs, "summary": summary}
    hosts.from_first(lambda: _complete(folder, done))
    LOG.info("stage %s took %.0f s", name, costs["seconds"])


def _is_complete(name: str, folder: Path, values: Record) -> bool:
    """Whether a stage has nothing to do; else its folder is there, with its settings."""
    how = ""
    if renamed := _renamed(_read_json(folder / "settings.json")):
        change = "{} is now called {}".format(*renamed)
        how = f"by an earlier version of rlt_jax ({change}). Its models still load"
    elif difference := _difference(folder, values):
        how = f"with other settings ({difference})"
    if how:
        raise UserError(
            f"stage {name}: {folder} was made {how}. Use another --workdir, or "
            f"--only={name} to run this stage afresh."
        )
    if changed := _changed(folder, values):
        LOG.info(f"stage {name}: {changed[0]}, which it reads, was run afresh")
        _keep_aside(folder)
    if (folder / "done.json").is_file():
        return True
    begun, inputs = _read_json(folder / SESSIONS), _inputs(folder, values)
    # One that died told nobody how long it was.
    sessions = begun.get("sessions", int((folder / "settings.json").is_file())) + 1
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SESSIONS, {"sessions": sessions, "inputs": inputs})
    write_json(folder / "settings.json", values)
    return False


def _changed(folder: Path, values: Record) -> list[str]:
    """Stages that were run afresh since a stage has read from them."""
    complete, inputs = (folder / "done.json").is_file(), _inputs(folder, values)
    begun = _read_json(folder / ("done.json" if complete else SESSIONS))
    known = begun.get("inputs", inputs)  # earlier versions did not keep them
    return sorted(dict(known.items() ^ inputs.items()))


def _inputs(folder: Path, values: Record) -> dict[str, str]:
    """Complete stages that a stage reads -> when they were complete."""
    read = preflight.stages_read(values, folder.parent)
    if values["stage"] == "report":  # it has their names
        read += re.findall(r'"(\w+)"', json.dumps(values))
    times = {
        name: _read_json(folder.with_name(name) / "done.json").get("finished")
        for name in {*read} - {folder.name}
    }
    return {name: time for name, time in times.items() if time}


def _complete(folder: Path, done: Record) -> None:
    """Writes `done.json`; its seconds are those of the last of `sessions`."""
    write_json(folder / "done.json", finite(done) | _read_json(folder / SESSIONS))
    (folder / SESSIONS).unlink(missing_ok=True)


def _checked_workdir(workdir: str | Path) -> Path:
    """The workdir, if files in it can be appended to and renamed."""
    address = re.match(r"(\w\w+):/+([^/]*)/?(.*)", str(workdir))
    if address is None:
        return Path(workdir)
    scheme, bucket, folder = address.groups()
    mount = (
        "mount the bucket on every host, `gcsfuse --implicit-dirs "
        "--rename-dir-limit=100000 --metadata-cache-ttl-secs=0 "
        f"--metadata-cache-negative-ttl-secs=0 {bucket} DIR`, and name DIR/{folder}; "
        "launch/tpu_pod.sh and launch/hosts.sh do it by themselves."
    )
    raise UserError(
        f"--workdir={workdir}: a run appends to files and renames folders, which needs a "
        f"file system; {mount if scheme == 'gs' else 'name a folder in one.'}"
    )


def _check_hosts(config: ConfigDict, root: Path, only: str | None) -> None:
    """Several processes have to do the same."""
    values = _flat(config.to_dict(), "config")
    flags = {"--workdir": str(root), "--only": only}
    package = Path(__file__).parents[1]
    sources = (file.read_bytes() for file in sorted(package.rglob("*.py")))
    hosts.agree_on_items("the code of rlt_jax", sources)
    hosts.agree("libraries", {"the version of jax": jax.__version__})
    hosts.agree("config and flags", flags | values)
    # Later, as counting starts the devices.
    hosts.agree("the devices", {"their number": jax.local_device_count()})


def _date(root: Path) -> str:
    """Date and time of the run's first start: chat templates may have them in prompts."""
    if not (root / RUN).is_file():
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / RUN, {"date": _now()})
    return _read_json(root / RUN)["date"]


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat()


def _settings(section: ConfigDict, root: Path, date: str, seed: int) -> Record:
    """The section as plain JSON values, `{workdir}` and dates of models filled in."""
    folder = json.dumps(str(root))[1:-1]
    values = json.loads(section.to_json().replace("{workdir}", folder))
    models = [values.get(name) for name in preflight.MODELS]
    if isinstance(values.get("teaching"), dict):
        models.append(values["teaching"].get("teacher"))
    for model in (*models, *(values.get("students") or ())):
        if isinstance(model, dict):
            model["date"] = model.get("date") or date
    return {"seed": seed, **values}


def _difference(folder: Path, values: Record) -> str | None:
    """The first key in which the folder's settings differ from these."""
    before, now = _flat(_read_json(folder / "settings.json")), _flat(values)
    for key in sorted(before.keys() | now.keys()) if before else ():
        if before.get(key) != now.get(key):
            return f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
    return None


def _read_json(file: Path) -> Record:
    """The values in a file; {} where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _flat(values: Any, prefix: str = "") -> Record:
    if not isinstance(values, dict) or (prefix and not values):
        return {prefix: values}
    return {
        key: leaf
        for name, item in values.items()
        for key, leaf in _flat(item, f"{prefix}.{name}" if prefix else name).items()
    }


def _set_aside(folder: Path, values: Record) -> None:
    """Renames the folder of a complete stage, or of one with other settings."""
    if (folder / "done.json").is_file() or _difference(folder, values) is not None:
        _keep_aside(folder)


def _keep_aside(folder: Path) -> None:
    """Renames a folder, so that the stage begins afresh and what it did is kept."""
    number = 1
    while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(kept)
    LOG.info("the earlier %s is kept as %s", folder, kept)


def _remove_untouched(folder: Path) -> None:
    """Removes a stage's folder without any work in it: a mended config may use it."""
    if {path.name for path in folder.iterdir()} == {"settings.json", SESSIONS}:
        shutil.rmtree(folder)
        if [path.name for path in folder.parent.iterdir()] == [RUN]:
            (folder.parent / RUN).unlink()
