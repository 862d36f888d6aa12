"""Trains reinforcement-learned teachers: runs the stage or pipeline of a config.

    python -m rlt_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Any value of the config can be set on the command line:

    python -m rlt_jax.main --config=configs/quickstart.py --workdir=runs/other \\
        --config.seed=1 --config.rl.loop.steps=20

Each stage works in <workdir>/<name>/; a complete one is skipped, one that was cut off goes
on from its last checkpoint. --only=NAME runs one afresh; those that read from it follow the
next time. Ctrl-C, SIGTERM or a lost terminal (SIGHUP, unless `nohup` ignores it) saves and
stops. `chat --help`: how to try a model.

The exit status is 0 when all is done; 1 for bad input, which has to be mended; 75 when a
disk, a network or another process failed; 143, 130 and 129 after SIGTERM, Ctrl-C and
SIGHUP. After 75, 129 and 143 a scheduler gives the same command again, which resumes. In
`--help | head -1` SIGPIPE ends the command, without a message (141 in shells).

On several hosts run it on each; a TPU pod, GKE and Slurm tell the processes about each
other, elsewhere --coordinator_address, --num_processes and --process_id do.
"""

import os
import signal
import sys

# The other imports come after the handlers: KeyboardInterrupt breaks what is imported.


def main(argv: list[str]) -> None:
    """Runs the config; the exit status is one of those above."""
    from absl import app, flags, logging

    if len(argv) > 1:
        raise app.UsageError(f"Unknown argument {argv[1]!r}; all settings are flags.")
    # The libraries' own progress messages stay out of sight, ours are shown.
    logging.set_verbosity(logging.WARNING)
    # Imported late, so that --help and bad flags answer at once.
    from rlt_jax import errors, watchdog
    from rlt_jax.stages import run_pipeline
    from rlt_jax.training import hosts
    from rlt_jax.training.compilation import keep_programs

    given = flags.FLAGS
    # From here on it concerns the sockets of stores, too.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def run() -> None:
        who = given.coordinator_address, given.num_processes, given.process_id
        hosts.connect(*who, given.init_timeout, given.heartbeat_timeout)
        hosts.listen()
        if given.stall_timeout:
            watchdog.start(given.stall_timeout, given.stall_exit)
        keep_programs(given.compilation_cache)
        if hosts.is_first():
            errors.LOG.setLevel("INFO")
        run_pipeline(given.config, given.workdir, given.only, given.resume_with_changes)

    hosts.guard(run)


def cli() -> None:
    """Entry point of the console script."""
    stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    heeded = [number for number in stops if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _stop_at_once) for number in heeded}
    from rlt_jax.errors import keep_telling

    keep_telling()
    before[signal.SIGPIPE] = signal.SIG_DFL  # as other programs have it
    if sys.argv[1:2] == ["chat"]:
        from rlt_jax import chat

        return chat.main(sys.argv[1:], before)
    from absl import app

    from rlt_jax import command_line

    # For --help, whatever the name of the program is.
    sys.modules["__main__"].__doc__, sys.argv[0] = __doc__, command_line.__name__
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    return app.run(main, flags_parser=command_line.parse_flags)


def _stop_at_once(number: int, _: object) -> None:
    """Ends the process before `hosts.listen`, or before the model of a chat is loaded."""
    try:
        os.write(2, b"rlt_jax: stopped before anything began.\n")
    finally:  # also where standard error is closed
        os._exit(128 + number)


if __name__ == "__main__":
    cli()
