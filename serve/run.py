"""Host a speculative decoder over HTTP: `python -m serve.run --config configs/serve_….yaml`."""

from __future__ import annotations

import argparse
import logging
import queue
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from core.config import Config, describe, load_config
from core.errors import ConfigError, UserError
from core.progress import say
from core.runtime.connect import connect
from core.runtime.conversion import with_converted_target
from core.runtime.job import guarded
from serve.app import application
from serve.checks import NAME, check, check_machine, check_room, surge_that_fits

SECTIONS = ("convert", "target", "draft", "decode", "serve", "cluster")
APPLICATION = "aerie"
# For which running answers are waited for at the end, and how often it is looked.
DRAIN_S, LOOK_EVERY_S = 60.0, 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 stopped, 2 bad configuration or input, 1 failure)."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: serve(lambda: load_config(arguments.config, arguments.overrides)), NAME)


def serve(read: Callable[[], Config]) -> None:
    """Serve until SIGINT or SIGTERM, then finish the running answers and stop.

    SIGHUP reads the configuration again and replaces the replicas by new ones, one after the
    other; no request is lost. A configuration that cannot be used changes nothing.

    Args:
        read: gives the configuration.
    Raises:
        UserError: a missing or mismatched model, too few CPUs, or a port that is taken.
    """
    config = check(with_converted_target(read()))
    connect(config.cluster, metrics=True)
    try:
        # After connecting, since Ray sets handlers of its own.
        signals = _Signals()
        check_machine(config)
        start(config)
        signals.ready = True
        print(_how_to_use(config), flush=True)
        while signals.wait() == signal.SIGHUP:
            config = _renewed(config, read)
        say(NAME, "finishing running answers, a minute at most; Ctrl-C again stops at once")
        drained = drain()
        if not drained:
            say(NAME, "some answers take longer and are cut off")
        # Not `shutdown`: a cluster may serve other applications.
        ray_serve.delete(APPLICATION, _blocking=drained)
    except TimeoutError:
        say(NAME, "the replicas take long to stop and are left to Ray Serve")
    except KeyboardInterrupt:
        pass
    finally:
        ray.shutdown()
    say(NAME, "stopped")


def start(config: Config) -> None:
    """Deploy on the connected Ray; returns when the replicas are ready."""
    ray_serve.start(
        http_options=HTTPOptions(host=config.serve.host, port=config.serve.port),
        logging_config=_logging(config),
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    deploy(config)


def deploy(config: Config) -> None:
    """Bring a configuration into service, in place of another one if there is one."""
    for name, one in config.served_models().items():
        own = one.serve.backend == "aerie"
        measuring = own and one.draft.path and one.decode.total_tokens == "auto"
        adapted = f" with {one.target.adapter}" if one.target.adapter else ""
        say(
            NAME,
            (f"{name}: " if config.serve.models else "")
            + f"loading {one.target.path}{adapted} ({one.target.dtype})"
            + (", then measuring which draft tree pays" if measuring else "")
            + ("" if one.serve.replicas else ", when it is asked for"),
        )
    app = application(surge_that_fits(config))
    ray_serve.run(app, name=APPLICATION, logging_config=_logging(config))


def drain() -> bool:
    """Have new requests refused (503), and wait for those that run; whether all have ended.

    Ray Serve itself forgets the route of an application that is deleted at once, so clients would
    read of a path that is not found while others' answers still run.
    """
    until = time.monotonic() + DRAIN_S
    try:
        ingress = ray_serve.get_app_handle(APPLICATION)
        while ingress.drain.remote().result(timeout_s=DRAIN_S):
            if time.monotonic() > until:
                return False
            time.sleep(LOOK_EVERY_S)
    except Exception as error:
        # Whatever it is: the server is to stop.
        say(NAME, f"the ingress does not answer ({type(error).__name__}), so it is not waited for")
        return False
    return True


def _logging(config: Config) -> LoggingConfig:
    # The guard writes a line a request, which says more than Serve's own.
    return LoggingConfig(log_level=config.serve.log_level, enable_access_log=False)


def _renewed(config: Config, read: Callable[[], Config]) -> Config:
    """The configuration that is in service after an attempt to change it."""
    try:
        new = check(with_converted_target(read()))
        _check_change(config, new)
        check_room(new)
    except UserError as error:
        say(NAME, f"nothing is changed: {error}")
        return config
    except Exception as error:
        # Whatever it is, a conversion that fails or a damaged model: the server is to go on.
        say(NAME, f"nothing is changed: {type(error).__name__}: {error}")
        return config
    try:
        deploy(new)
    except Exception as error:
        # Whatever it is: those who are served now must not notice.
        say(NAME, f"the new configuration does not start, back to the one before: {error}")
        deploy(config)
        return config
    say(NAME, "the new configuration is in service")
    return new


def _check_change(old: Config, new: Config) -> None:
    for name in ("host", "port"):
        if getattr(old.serve, name) != getattr(new.serve, name):
            raise ConfigError(f"serve.{name} cannot change while it serves; stop it and start anew")
    if old.cluster != new.cluster:
        raise ConfigError("the section cluster cannot change while it serves; stop it first")


class _Signals:
    """What a process is told by signals, one after the other.

    Attributes:
        ready: whether it serves; before, and once it stops, a signal ends it at once.
    """

    def __init__(self) -> None:
        """Set the handlers; in the main thread."""
        self.ready = False
        # Its `put` may be called in a handler that has interrupted its `get`.
        self._told: queue.SimpleQueue[int] = queue.SimpleQueue()
        signal.signal(signal.SIGHUP, self._renew)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def wait(self) -> int:
        """The next signal."""
        return self._told.get()

    def _renew(self, number: int, frame: FrameType | None) -> None:
        if self.ready:
            self._told.put(number)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self.ready:
            raise KeyboardInterrupt
        self.ready = False
        self._told.put(number)


def _how_to_use(config: Config) -> str:
    url, names = f"http://{config.serve.host}:{config.serve.port}", list(config.served_models())
    body = (
        f'{{"model": "{names[0]}", "stream": true, '
        '"messages": [{"role": "user", "content": "Hello!"}]}'
    )
    return (
        f"\nReady: {url}  (chat page), {url}/v1  (OpenAI API). Ctrl-C stops.\n"
        + (f"Models: {', '.join(names)}\n\n" if len(names) > 1 else "\n")
        + f"  curl -N {url}/v1/chat/completions \\\n"
        "    -H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'\n\n"
        f"  aerie chat --url {url}\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve.run",
        description="Host a speculative decoder over HTTP with Ray Serve.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="configuration (YAML sections; override as section.field=value):\n"
        + describe(SECTIONS)
        + "\n\nexit codes: 0 stopped, 2 bad configuration or input, 1 failure",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--config", metavar="FILE", help="YAML file; see configs/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
