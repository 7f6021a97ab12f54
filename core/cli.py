"""The console script `aerie`: finds jobs and the server by module name."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence

from core.errors import EXIT_USER_ERROR, ConfigError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """`aerie run|submit <job> …`, `aerie serve …`, `aerie chat …`."""
    parser = argparse.ArgumentParser(
        prog="aerie",
        description=__doc__,
        epilog=f"jobs: {', '.join(job_names())}; `aerie run <job> --help` explains each",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, what in (("run", "run a job from here"), ("submit", "run a job on a cluster")):
        command = commands.add_parser(name, help=what, add_help=False)
        command.add_argument("job")
        if name == "submit":
            command.add_argument("--address", help="of the cluster's dashboard")
    commands.add_parser("serve", help="serve a speculative decoder over HTTP", add_help=False)
    commands.add_parser("chat", help="talk to a served model in the terminal", add_help=False)
    known, rest = parser.parse_known_args(argv)
    try:
        if known.command == "run":
            return _main_of(f"jobs.{_checked(known.job)}")(rest)
        if known.command == "submit":
            from core.runtime.job import guarded
            from core.runtime.submit import submit

            module = f"jobs.{_checked(known.job)}"
            return guarded(lambda: submit(module, rest, known.address), "submit")
        return _main_of("serve.run" if known.command == "serve" else "serve.chat")(rest)
    except UserError as error:
        print(f"aerie: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def job_names() -> list[str]:
    """The modules in `jobs`."""
    jobs = importlib.import_module("jobs")
    return sorted(module.name for module in pkgutil.iter_modules(jobs.__path__))


def _checked(job: str) -> str:
    if job not in job_names():
        raise ConfigError(f"no job {job!r}; there are {', '.join(job_names())}")
    return job


def _main_of(module: str) -> Callable[[Sequence[str]], int]:
    function: Callable[[Sequence[str]], int] = importlib.import_module(module).main
    return function


if __name__ == "__main__":
    sys.exit(main())
