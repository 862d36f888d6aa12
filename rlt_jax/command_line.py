"""Reads the command line: a config that is missing or lacks a key is one message."""

import re
import sys
import traceback

from absl import flags
from ml_collections import config_flags

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


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser; a config that is missing or lacks a key is one message, too."""
    try:
        arguments = flags.FLAGS(argv)
        config.value.lock()  # a file that could not be read shows on its first use
        return arguments
    except flags.Error as error:
        # An error in the config file itself keeps its traceback.
        ours = r"(?s).*\n *(rlt_jax\S+UserError: |TypeError: (?=get_config\(\)))"
        sys.exit(f"rlt_jax: {re.sub(ours, '--config: ', str(error).strip())}")
    except OSError as error:
        sys.exit(f"rlt_jax: --config: {str(error).splitlines()[-1].strip()}")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if all(frame.filename != config_flags.config_path.__file__ for frame in frames):
            raise  # an error in the config file itself keeps its traceback
        from rlt_jax.stages import explain_override

        named = [x for x in argv if "config.=" not in x]
        sys.exit(f"rlt_jax: a --config.KEY=VALUE {explain_override(named, error)}")
