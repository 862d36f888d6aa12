"""Trains reinforcement-learned teachers: runs the stage or pipeline of a config.

    python -m rlt_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Any value of the config can be set on the command line:

    python -m rlt_jax.main --config=configs/quickstart.py --workdir=runs/other \\
        --config.seed=1 --config.rl.loop.steps=20

Each stage works in <workdir>/<name>/; a complete one is skipped, one that was cut off goes
on from its last checkpoint. --only=NAME runs one afresh; those that read from it follow the
next time. Ctrl-C or SIGTERM saves and stops. `chat --help`: how to try a model.

The exit status is 0 when all is done; 1 for bad input, which has to be mended; 75 when a
disk, a network or another process failed; 143 and 130 after SIGTERM and Ctrl-C. After 75
and 143 a scheduler gives the same command again, which resumes.

On several hosts run it on each; a TPU pod, GKE and Slurm tell the processes about each
other, elsewhere --coordinator_address, --num_processes and --process_id do.
"""

import logging
import sys

from absl import app, flags
from absl import logging as absl_logging

from rlt_jax import command_line
from rlt_jax.errors import keep_telling

flags.adopt_module_key_flags(command_line)  # --help shows them


def main(argv: list[str]) -> None:
    """Runs the config; the exit status is one of those above."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown argument {argv[1]!r}; all settings are flags.")
    # The libraries' own progress messages stay out of sight, ours are shown.
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Imported late, so that --help and bad flags answer at once.
    from rlt_jax import watchdog
    from rlt_jax.stages import run_pipeline
    from rlt_jax.training import hosts
    from rlt_jax.training.compilation import keep_programs

    given = flags.FLAGS

    def run() -> None:
        hosts.connect(
            given.coordinator_address,
            given.num_processes,
            given.process_id,
            given.init_timeout,
            given.heartbeat_timeout,
        )
        hosts.listen()
        if given.stall_timeout:
            watchdog.start(given.stall_timeout, given.stall_exit)
        keep_programs(given.compilation_cache)
        if hosts.is_first():
            logging.getLogger("rlt_jax").setLevel(logging.INFO)
        run_pipeline(given.config, given.workdir, given.only, given.resume_with_changes)

    hosts.guard(run)


def cli() -> None:
    """Entry point of the console script."""
    if sys.stderr is not None and sys.stderr is sys.__stderr__:
        keep_telling()
    if sys.argv[1:2] == ["chat"]:
        from rlt_jax import chat

        return chat.main(sys.argv[1:])
    try:
        app.run(main, flags_parser=command_line.parse_flags)
    except KeyboardInterrupt:  # before signals are listened to
        print("rlt_jax: stopped before anything began.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cli()
