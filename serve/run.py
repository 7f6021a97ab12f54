"""Host a speculative decoder over HTTP: `python -m serve.run --config configs/serve_….yaml`."""

from __future__ import annotations

import argparse
import logging
import queue
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from transformers import AutoConfig

from core.config import Config, describe, load_config
from core.draft.folder import load_head
from core.errors import ConfigError, InputError, ResourceError, UserError
from core.models.target import target_fingerprint, target_folder, target_location
from core.paths import PACKAGE_SCHEME, resolve_path
from core.progress import say
from core.runtime.connect import connect, on_cluster
from core.runtime.conversion import with_converted_target
from core.runtime.job import guarded
from serve.app import build_app
from serve.keys import admin_key_hashes, key_hashes

NAME = "serve"
SECTIONS = ("convert", "target", "draft", "decode", "serve", "cluster")
APPLICATION = "aerie"
# Of Ray Serve itself; the application's is `serve.log_level`.
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
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
        logging_config=LOGGING,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    deploy(config)


def deploy(config: Config) -> None:
    """Bring a configuration into service, in place of another one if there is one."""
    measuring = config.draft.path and config.decode.total_tokens == "auto"
    say(
        NAME,
        f"loading {config.target.path} ({config.target.dtype})"
        + (", then measuring which draft tree pays" if measuring else ""),
    )
    app = build_app(_with_surge_that_fits(config))
    logs = LoggingConfig(log_level=config.serve.log_level, enable_access_log=False)
    ray_serve.run(app, name=APPLICATION, logging_config=logs)


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


def _renewed(config: Config, read: Callable[[], Config]) -> Config:
    """The configuration that is in service after an attempt to change it."""
    try:
        new = check(with_converted_target(read()))
        _check_change(config, new)
        check_room(new)
    except UserError as error:
        say(NAME, f"nothing is changed: {error}")
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


def _with_surge_that_fits(config: Config) -> Config:
    """Where a further replica has no room, an old one has to stop before its successor starts."""
    settings, resources = config.serve, ray.cluster_resources()
    most = settings.max_replicas + 1
    fits = most * settings.cpus_per_replica <= resources.get(
        "CPU", 0.0
    ) and most * settings.gpus_per_replica <= resources.get("GPU", 0.0)
    if fits or on_cluster(config.cluster):
        return config
    return config.replace(serve={"max_surge_percent": 0})


def check(config: Config) -> Config:
    """Read what the replicas will load; returns the config as other nodes can use it.

    Raises:
        InputError: the target or the head does not exist, or keys are not as they should be.
        MismatchError: the head was trained for another target.
    """
    try:
        target = target_folder(config.target.path)
        head = config.draft.path and resolve_path(config.draft.path, field="draft.path")
    except UserError as error:
        raise InputError(
            f"{error}\n  set target.path and draft.path to what is there; "
            "configs/serve_smollm2.yaml needs nothing but itself"
        ) from error
    key_hashes(config.serve)
    admin_key_hashes(config.serve)
    location = target_location(str(config.target.path))
    if not head:
        say(NAME, "draft.path is not set: the target alone, without speculation")
        return config.replace(target={"path": location})
    load_head(
        head,
        target_fingerprint=target_fingerprint(target),
        target_config=AutoConfig.from_pretrained(target),
    )
    # An address in a package is looked up by each node, a path here has to be the full one.
    path = str(config.draft.path)
    if not path.startswith(PACKAGE_SCHEME):
        path = str(head.absolute())
    return config.replace(target={"path": location}, draft={"path": path})


def check_machine(config: Config) -> None:
    """Refuse what could never start; on a cluster, which may grow, nothing is refused.

    Raises:
        ResourceError: fewer CPUs or GPUs than the replicas ask for, or the port is taken.
    """
    check_room(config)
    if not on_cluster(config.cluster):
        check_port(config.serve.host, config.serve.port)


def check_room(config: Config) -> None:
    """The same for the replicas alone.

    Raises:
        ResourceError: fewer CPUs or GPUs than they ask for.
    """
    if on_cluster(config.cluster):
        return
    settings, resources = config.serve, ray.cluster_resources()
    for name, each in (("CPU", settings.cpus_per_replica), ("GPU", settings.gpus_per_replica)):
        wanted, there = settings.replicas * each, resources.get(name, 0.0)
        if wanted > there:
            raise ResourceError(
                f"serve.replicas={settings.replicas} × serve.{name.lower()}s_per_replica={each:g} "
                f"need {wanted:g} {name}s, {there:g} are there; lower one of them"
            )


def check_port(host: str, port: int) -> None:
    """Listen for a moment, as the HTTP server will do for long.

    Raises:
        ResourceError: it cannot.
    """
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ResourceError(
            f"serve.host={host} serve.port={port}: cannot listen there ({error.strerror}); "
            "choose another serve.port, or stop what uses it"
        ) from error


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
    url = f"http://{config.serve.host}:{config.serve.port}"
    body = (
        f'{{"model": "{config.serve.model_name}", "stream": true, '
        '"messages": [{"role": "user", "content": "Hello!"}]}'
    )
    return (
        f"\nReady: {url}  (chat page), {url}/v1  (OpenAI API). Ctrl-C stops.\n\n"
        f"  curl -N {url}/v1/chat/completions \\\n"
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
