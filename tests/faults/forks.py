"""Runs the command again and again, in forks of a process that has imported what it needs.

Reads a line of JSON for every run: `arguments`, `environment`, and the file that gets
standard error as `errors`; writes its exit status. A shim that is preloaded reads its
settings in every fork.
"""

import ctypes
import importlib
import json
import os
import pkgutil
import runpy
import sys

import rlt_jax


def run(arguments: list[str], environment: dict[str, str], errors: str) -> None:
    """Becomes the command; in a fork of its own."""
    os.environ.update(environment)
    ctypes.CDLL(None).failing_disk_begin()
    opened = os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(opened, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["rlt_jax.main", *arguments]
    runpy.run_module("rlt_jax.main", run_name="__main__", alter_sys=True)


def main() -> None:
    """Imports the package, then serves."""
    for module in pkgutil.walk_packages(rlt_jax.__path__, "rlt_jax."):
        if module.name != "rlt_jax.main":
            importlib.import_module(module.name)
    for line in sys.stdin:
        if not (child := os.fork()):
            return run(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if __name__ == "__main__":
    main()
