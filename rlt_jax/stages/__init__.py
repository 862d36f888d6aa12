"""The stages by name, and the pipeline that runs them in order.

A stage is a module with `SECTIONS`, the owners of the keys of its config, and
`run(config, workdir, seed)`, which is given that config, the folder of the stage and the
seed of everything random, and returns a summary that goes into `done.json`, beside the
seconds and the peak memory of the stage (on accelerators, of all stages so far). One with
`prepare(config, seed)` is checked before the first stage of a run works, see `preflight`.
"""

import contextlib
import difflib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
from ml_collections import ConfigDict

from rlt_jax import settings, stores, watchdog
from rlt_jax.errors import LOG, UserError, as_user_error
from rlt_jax.ranges import Condition, NonNegativeInt, OneOf, check_value
from rlt_jax.records import Record
from rlt_jax.stages import folder as folders
from rlt_jax.stages import lock, preflight
from rlt_jax.training import accelerators, hosts, private_jax
from rlt_jax.training.metrics import peak_gib, reset_peak

# Of a stage, as it is the name of a folder, too.
NAME = Condition("1-60 letters, digits, _-.", re.compile(r"\w[\w.-]{,59}").fullmatch)
DIFFERENT = Condition("one or more different names", lambda x: len({*x}) == len(x) > 0)
STAGES = ("sft", "rl", "collect", "score", "evaluate", "plan", "export", "report")


def run_pipeline(
    config: ConfigDict,
    workdir: str | Path,
    only: str | None = None,
    with_changes: bool = False,
) -> None:
    """Runs every stage of the config that is not complete.

    A config has `seed` and either `stage` (the config is that one stage) or `pipeline`,
    an ordered tuple of names of sections that each have a `stage`, and a `seed` where it
    is not the config's. In any string of a section `{workdir}` stands for the workdir.
    Models get the date and time of the run's first start, which run.json keeps.

    Args:
      config: the config.
      workdir: folder that holds a folder for each stage, or the URL of one.
      only: name of the one stage to run, afresh if it was complete. Later stages that read
        from it run afresh the next time.
      with_changes: whether a stage that was begun may continue with another learning rate,
        number of steps, mesh and the like; changes.jsonl in its folder keeps them.

    Raises:
      UserError: bad input, anywhere in a stage.
      StorageError: a file cannot be written.
    """
    _check_workdir(workdir)
    with stores.workdir(workdir) as root:
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
            todo = not folders.is_done(folder) or folders.changed_inputs(folder, values)
            if only is not None or with_changes or reads or todo:
                left[name] = values
        # The first of several checks itself at once, but changes are checked before any
        # is made.
        first = 0 if only is not None or with_changes else 1
        to_make = {} if only is not None else left
        preflight.check([*left.values()][first:], to_make, root)
        date = hosts.from_first(lambda: folders.date_of_run(root))
        for name, section in sections.items():
            hosts.stop_if_asked()
            values = _settings(section, root, date, config.seed)
            _run_stage(name, values, root, with_changes, afresh=only is not None)


def stage_sections(config: ConfigDict) -> dict[str, ConfigDict]:
    """Name -> config of every stage, in order.

    Raises:
      UserError: neither `stage` nor `pipeline`, a name without section, or a section
        with unknown or missing keys.
    """
    settings.resolve(config)
    check_value("config.seed", NonNegativeInt, config.get("seed"))
    if "stage" in config:
        section = ConfigDict(config.to_dict())
        del section.seed
        return {_checked_stage(section, "config"): section}
    if "pipeline" not in config:
        raise UserError("config: needs a 'stage', or a 'pipeline' of section names.")
    check_value("config.pipeline", Annotated[Sequence[str], DIFFERENT], config.pipeline)
    for name in config.pipeline:
        check_value("a name in config.pipeline", Annotated[str, NAME], name)
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
    check_value(f"{where}.stage", Annotated[str, OneOf(STAGES)], stage)
    settings.check(preflight.module_of(stage).SECTIONS, values, where)
    return stage


def explain_override(config: ConfigDict, given: Sequence[str], error: Exception) -> str:
    """Why a setting on the command line does not fit the config."""
    matches = (re.match(r"--?(?:no)?config\.([^=]*)", one) for one in given)
    keys, known = [x[1] for x in matches if x], folders.flat(config.to_dict())
    for key in keys:
        where, *index = re.split(r"\[(.*?)\]", key)[:2]
        if not any(f"{one}.".startswith(f"{where}.") for one in known):
            same = [one for one in known if one.split(".")[-1] == key.split(".")[-1]]
            near = difflib.get_close_matches(key, same or known, 1, 0 if same else 0.6)
            meant = f"did you mean --config.{near[0]}?" if near else ", ".join(config)
            return f"has a key the config lacks: --config.{key} ({meant})"
        count = len(known[where]) if isinstance(known.get(where), list | tuple) else 0
        if index and index[0] not in map(str, range(-count, count)):
            return f"has a wrong index: --config.{key} (entries of {where}: {count})"
    told = " ".join(str(error).replace("\\n", " ").split())
    return f"does not fit the config: --config.{', --config.'.join(keys)} ({told})"


def _run_stage(
    name: str, values: Record, root: Path, with_changes: bool, afresh: bool
) -> None:
    folder = root / name
    with contextlib.ExitStack() as locked:

        def has_work() -> bool:
            locked.enter_context(lock.held(root, name))
            if afresh:
                folders.set_aside(name, folder, values, with_changes)
            return folders.begin(name, folder, values, with_changes)

        if not hosts.from_first(has_work):
            LOG.info("stage %s is complete, skipped", name)
            return
        _work(name, values, folder)
        stores.push()


def _work(name: str, values: Record, folder: Path) -> None:
    if not (folder / folders.SETTINGS).is_file():
        raise UserError(
            f"{folder}, which process 0 has made, is not visible on this host: --workdir "
            "has to be in a file system that all hosts share."
        )
    stage = values["stage"]
    LOG.info("stage %s (%s) begins", name, stage)
    watchdog.progress(f"stage {name} begins")
    reset_peak()
    start = time.monotonic()
    config = ConfigDict(values)
    del config.seed, config.stage
    try:
        summary = preflight.module_of(stage).run(config, folder, values["seed"])
    except UserError:
        if hosts.is_first():
            folders.remove_untouched(folder)
        raise
    costs = {"seconds": time.monotonic() - start, "peak_gib": peak_gib()}
    done = {"stage": stage, "finished": folders.now(), **costs, "summary": summary}
    hosts.from_first(lambda: folders.complete(folder, done))
    LOG.info("stage %s took %.0f s", name, costs["seconds"])


def _check_workdir(workdir: str | Path) -> None:
    """A URL has a mirror on one host; several append to the same files.

    Raises:
      UserError: it is no place for a run.
    """
    several = (private_jax.num_processes() or 1) > 1
    if stores.is_url(workdir) and (several or re.match("hf:|http|file:", f"{workdir}")):
        raise UserError(
            f"--workdir={workdir}: this run cannot work there. Name a folder by its path, "
            "or gs://, s3:// and the like in a run of one process. For several hosts mount "
            "the bucket with gcsfuse and name the folder: docs/pods.md, Workdir."
        )
    with as_user_error(f"--workdir={str(workdir)[:99]}", OSError, ValueError):
        there = next(filter(Path.exists, (Path(workdir), *Path(workdir).parents)))
    if not str(workdir) or not (stores.is_url(workdir) or there.is_dir()):
        raise UserError(f"--workdir={workdir}: name a folder; {there} is none.")


def _check_hosts(config: ConfigDict, root: Path, only: str | None) -> None:
    """Several processes have to do the same."""
    given = {"--workdir": str(root), "--only": only}
    package = Path(__file__).parents[1]
    sources = (file.read_bytes() for file in sorted(package.rglob("*.py")))
    hosts.agree_on_items("the code of rlt_jax", sources)
    hosts.agree("libraries", {"the version of jax": jax.__version__})
    hosts.agree("config and flags", given | folders.flat(config.to_dict(), "config"))
    # Later, as counting starts the devices.
    hosts.agree("the devices", {"their number": jax.local_device_count()})
    if (
        hosts.is_first()
    ):  # after all have started theirs, for which they need each other
        accelerators.warn_of_unused()


def _settings(section: ConfigDict, root: Path, date: str, seed: int) -> Record:
    """The section as plain JSON values, `{workdir}` and dates of models filled in."""
    folder = json.dumps(str(root))[1:-1]
    what = f"{section.stage}: give plain JSON values"
    with as_user_error(what, TypeError, ValueError):
        values = json.loads(section.to_json().replace("{workdir}", folder))

    def dated(model: settings.Section) -> Record:
        return {**model, "date": model.get("date") or date}

    return {"seed": int(seed), **preflight.with_models(values, dated)}
