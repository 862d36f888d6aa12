"""Reads the command line: whatever is wrong with it or the config file is one message."""

import runpy
import sys
import traceback

from absl import flags
from ml_collections import ConfigDict, config_flags

from rlt_jax.errors import UserError

config = config_flags.DEFINE_config_file(
    "config", None, "A Python file with get_config(); `file.py:arg` passes it an arg."
)
workdir = flags.DEFINE_string(
    "workdir",
    None,
    "Folder, or URL such as gs://bucket/run, for everything a run writes.",
)
only = flags.DEFINE_string("only", None, "Run this stage of the pipeline alone.")
resume_with_changes = flags.DEFINE_bool(
    "resume_with_changes",
    False,
    "Continue stages that were begun with another learning rate, number of steps, "
    "interval, micro-batch or mesh; changes.jsonl in their folders keeps both values.",
)
compilation_cache = flags.DEFINE_string(
    "compilation_cache", None, "Folder of compiled programs; none by default on CPUs."
)
stall_timeout = flags.DEFINE_float(
    "stall_timeout",
    1800.0,
    "Seconds without progress after which it is printed where every thread stands; 0 "
    "for never.",
)
flags.register_validator("stall_timeout", lambda x: x >= 0, "give 0 or more")  # no NaN
_SECONDS = {"lower_bound": 1, "upper_bound": 10**6}
stall_exit = flags.DEFINE_bool(
    "stall_exit",
    False,
    "End the run then, with status 75, so that it is started again.",
)
coordinator_address = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where there are several."
)
num_processes = flags.DEFINE_integer("num_processes", None, "How many there are.")
process_id = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
init_timeout = flags.DEFINE_integer(
    "init_timeout", 300, "Seconds to wait for the other processes.", **_SECONDS
)
heartbeat_timeout = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "Seconds until a silent process is dead.", **_SECONDS
)
flags.mark_flags_as_required(["config", "workdir"])


class _ConfigFile(flags.ArgumentParser):
    """Loads a config file and calls its `get_config`.

    Attributes:
      config: the last one, also where a setting on the command line does not fit it.
    """

    def parse(self, path: str) -> ConfigDict:
        """The config, locked.

        Raises:
          UserError: the file raises an error, or makes no config.
        """
        file, *argument = path.split(":", 1)
        try:
            get_config = runpy.run_path(file).get("get_config")
            if not callable(get_config):
                raise UserError("the file has no function get_config()")
            config = get_config(*argument)
            if not isinstance(config, ConfigDict):
                raise UserError(f"get_config() returns {config!r:.50}, no ConfigDict")
            # Fails if the config contains itself, or has keys of several types.
            config.to_json_best_effort(sort_keys=True)
            self.config = config.lock()
            return self.config
        except Exception as error:  # it is the user's code
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f"({file}:{x.lineno})" for x in frames if x.filename == file]
            told = f"{kind}{error}".split() + lines[-1:]
            raise UserError(" ".join(told)) from error


flags.FLAGS["config"].parser = _FILE = _ConfigFile()


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser; an error is one message, and ends the process with status 1."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"rlt_jax: {str(error).strip().removeprefix('flag ')}")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        from rlt_jax.stages import explain_override

        why = explain_override(_FILE.config, argv, error)
        sys.exit(f"rlt_jax: a --config.KEY=VALUE {why}")
