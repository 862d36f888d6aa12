"""Trains reinforcement-learned teachers: runs the stage or pipeline of a config.

    python -m rlt_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Any value of the config can be set on the command line:

    python -m rlt_jax.main --config=configs/quickstart.py --workdir=runs/other \\
        --config.seed=1 --config.rl.loop.steps=20

Each stage works in <workdir>/<name>/; a complete one is skipped, one that was cut off goes
on from its last checkpoint. --only=NAME runs one afresh; those that read from it follow the
next time. Ctrl-C or SIGTERM saves and stops. `chat --help`: how to try a model.

On several hosts run it on each; a TPU pod, GKE and Slurm tell the processes about each
other, elsewhere --coordinator_address, --num_processes and --process_id do.
"""

import logging
import sys
import traceback

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A Python file with get_config(); `file.py:arg` passes it an arg."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything a run writes.")
_ONLY = flags.DEFINE_string("only", None, "Run this stage of the pipeline alone.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where there are several."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
_TIMEOUT = flags.DEFINE_integer(
    "init_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "Seconds until a silent process is dead.", lower_bound=1
)
_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "Folder of compiled programs; none by default on CPUs."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Runs the config; bad input ends in one message and exit status 1, a stop in 143."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown argument {argv[1]!r}; all settings are flags.")
    # The libraries' own progress messages stay out of sight, ours are shown.
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Imported late, so that --help and bad flags answer at once.
    from rlt_jax.stages import run_pipeline
    from rlt_jax.training import hosts
    from rlt_jax.training.compilation import keep_programs

    def run() -> None:
        members = (_COORDINATOR, _PROCESSES, _PROCESS, _TIMEOUT, _HEARTBEAT)
        hosts.connect(*(flag.value for flag in members))
        hosts.listen()
        keep_programs(_CACHE.value)
        if hosts.is_first():
            logging.getLogger("rlt_jax").setLevel(logging.INFO)
        run_pipeline(_CONFIG.value, _WORKDIR.value, _ONLY.value)

    hosts.guard(run)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser; a config that is missing or lacks a key is one message, too."""
    try:
        arguments = app.parse_flags_with_usage(argv)
        _CONFIG.value.lock()  # a file that could not be read shows on its first use
        return arguments
    except OSError as error:
        sys.exit(f"rlt_jax: --config: {str(error).splitlines()[-1].strip()}")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if all(frame.filename != config_flags.config_path.__file__ for frame in frames):
            raise  # an error in the config file itself keeps its traceback
        from rlt_jax.stages import explain_override

        sys.exit(f"rlt_jax: a --config.KEY=VALUE {explain_override(argv, error)}")


def cli() -> None:
    """Entry point of the console script."""
    if sys.argv[1:2] == ["chat"]:
        from rlt_jax import chat

        return chat.main(sys.argv[1:])
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    cli()
