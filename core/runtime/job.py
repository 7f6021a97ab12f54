"""What all jobs share: the command line, the run folder, skipping, exit codes."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray.exceptions import RayTaskError

from core.config import Config, describe, load_config
from core.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, ConfigError, UserError
from core.progress import say
from core.provenance import RunFolder
from core.runtime.connect import connect, on_cluster, return_to_working_directory
from core.runtime.resources import Resources, check_resources, describe_resources

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A stage of the flow, as `python -m jobs.<name>` runs it.

    Attributes:
        name: the module's name in `jobs`.
        summary: what it does, for `--help`.
        sections: the config sections, or single fields (`section.field`), that it reads; they
            make up the run's identity.
        counted: of these sections, the ones that count for a config; None where all always do.
        inputs: resolves the input paths (config field → path) or raises InputError.
        run: does the work, given the started run folder, and returns the report.
        resources: what it needs at one time.
        uses_ray: whether `run` needs a Ray connection.
        of_parts: whether it is made of other jobs, each with a run folder of its own.
        actions: further flags, such as `--verify`, each a function of the config and the flag's
            value (None for a switch) that prints.
        show: prints what the report says, at the end of its command line.
    """

    name: str
    summary: str
    sections: tuple[str, ...]
    inputs: Callable[[Config], Mapping[str, Path]]
    run: Callable[[Config, RunFolder], Report]
    resources: Callable[[Config], Resources] = lambda config: Resources()
    uses_ray: bool = True
    of_parts: bool = False
    actions: Mapping[str, Action] = field(default_factory=dict)
    counted: Callable[[Config], tuple[str, ...]] | None = None
    show: Callable[[Report], None] | None = None


@dataclass(frozen=True)
class Action:
    """A flag that looks at a job's results instead of making them."""

    help: str
    run: Callable[[Config, int], None]
    metavar: str | None = None


def run_stage(job: Job, config: Config) -> Report:
    """Run a job, or return the report of the same run if it has finished before.

    Raises:
        UserError: a wrong config or input, before any expensive work.
    """
    return_to_working_directory()
    check_output(config)
    _check_target(config)
    # Workers may have another working directory.
    config = config.replace(output=str(Path(config.output or "").expanduser().absolute()))
    sections = job.sections if job.counted is None else job.counted(config)
    folder = RunFolder(job.name, config, sections, job.inputs(config))
    if folder.finished and not job.of_parts:
        say(job.name, f"finished before, skipped: {folder.path}")
        return folder.report()
    if job.uses_ray:
        connect(config.cluster)
    check_resources(job.resources(config), config, job.name)
    with folder.held():
        if folder.finished and not job.of_parts:
            # By the run that held it until now.
            return folder.report()
        folder.start(of_parts=job.of_parts)
        say(job.name, f"→ {folder.path}")
        try:
            return folder.finish(job.run(config, folder))
        except UserError:
            # Nothing was made yet: the corrected command must not be taken for another run.
            folder.abandon_if_empty()
            raise


INPUT_FIELDS = (
    ("convert", "source"),
    ("target", "path"),
    ("data", "path"),
    ("data", "examples"),
    ("features", "path"),
    ("draft", "path"),
    ("eval", "prompts"),
)


def _with_absolute_inputs(config: Config) -> Config:
    # What does not exist here stays as it is: hub ids, addresses, mistakes.
    for section, name in INPUT_FIELDS:
        value = getattr(getattr(config, section), name)
        if isinstance(value, str):
            config = config.replace(**{section: {name: _absolute(value)}})
        elif value is not None:
            config = config.replace(**{section: {name: [_absolute(one) for one in value]}})
    return config


def _absolute(location: str) -> str:
    here = "://" not in location and Path(location).exists()
    return str(Path(location).absolute()) if here else location


def check_output(config: Config) -> None:
    """An output must be set, and be the same place on every node."""
    if not config.output:
        raise ConfigError("output is not set; pass output=<folder>")
    if "://" in config.output:
        raise ConfigError(
            f"output={config.output}: object-store addresses are not supported yet; "
            "give an absolute path on a file system that every node mounts"
        )
    if on_cluster(config.cluster) and not Path(config.output).expanduser().is_absolute():
        raise ConfigError(
            f"output={config.output} is relative, which on a cluster means a throw-away copy of "
            "the working directory; give an absolute path that every node mounts"
        )


def _check_target(config: Config) -> None:
    """A stage's inputs are folders, whose content says whether it is finished."""
    if config.target.adapter is not None:
        raise ConfigError(
            f"target.adapter={config.target.adapter} is for serving; merge it into a folder of its "
            "own for a job (python -m jobs.convert_model convert.source=<adapter> output=…), and "
            "name that as target.path"
        )


def main(job: Job, argv: Sequence[str] | None = None) -> int:
    """Command line of one job; returns the exit code (0 done, 2 user error, 1 failure)."""
    arguments = parse(job, argv)
    return guarded(lambda: act(job, arguments, load(arguments)), job.name)


def parse(job: Job, argv: Sequence[str] | None) -> argparse.Namespace:
    """The job's command line; `--help` and a wrong flag end the process here."""
    # Intermixed: an override may stand behind a flag.
    return _parser(job).parse_intermixed_args(argv)


def load(arguments: argparse.Namespace) -> Config:
    """The config that a parsed command line gives; inputs that exist here by their full path."""
    return _with_absolute_inputs(load_config(arguments.config, arguments.overrides))


def guarded(work: Callable[[], int | None], name: str) -> int:
    """Run `work` and turn what it raises into an exit code and, for a user error, one message.

    What `work` returns, if anything, is the exit code of a run that raised nothing.
    """
    try:
        return work() or EXIT_DONE
    except UserError as error:
        # What a worker raised arrives with its traceback; the message is in the cause.
        message = error.cause if isinstance(error, RayTaskError) else error
        print(f"{name}: error: {message}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on", file=sys.stderr, flush=True)
        return EXIT_FAILURE
    except Exception:
        traceback.print_exc()
        print(f"{name}: failed; the same command goes on", file=sys.stderr, flush=True)
        return EXIT_FAILURE


def act(job: Job, arguments: argparse.Namespace, config: Config) -> None:
    """Do what a parsed command line says."""
    for name, action in job.actions.items():
        value = getattr(arguments, name)
        if value is not None and value is not False:
            action.run(config, value)
            return
    if arguments.dry_run:
        _dry_run(job, config)
        return
    report = run_stage(job, config)
    if job.show is not None:
        job.show(report)


def _dry_run(job: Job, config: Config) -> None:
    check_output(config)
    inputs = job.inputs(config)
    shown = {"output": config.output, **config.shown(job.sections)}
    print(yaml.safe_dump(shown, sort_keys=False), end="")
    print("inputs:" + ("" if inputs else " none"))
    for name, path in inputs.items():
        print(f"  {name}: {path}")
    if job.uses_ray and on_cluster(config.cluster):
        connect(config.cluster)
    print("resources:")
    print(describe_resources(job.resources(config), config))
    check_resources(job.resources(config), config, job.name)


def _parser(job: Job) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{job.name}",
        description=job.summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="configuration (YAML sections; override as section.field=value):\n"
        + describe((*job.sections, "cluster") if job.uses_ray else job.sections)
        + "\n\nexit codes: 0 done, 2 bad configuration or input, 1 failure (run it again to go on)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--config", metavar="FILE", help="YAML file; see configs/")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and the resource check"
    )
    for name, action in job.actions.items():
        flag = f"--{name.replace('_', '-')}"
        if action.metavar:
            parser.add_argument(flag, dest=name, type=int, metavar=action.metavar, help=action.help)
        else:
            parser.add_argument(flag, dest=name, action="store_true", help=action.help)
    return parser
