"""Host a speculative decoder over HTTP: `python -m serve.run --config configs/serve_….yaml`."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from types import FrameType

import ray
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from transformers import AutoConfig

from core.config import Config, describe, load_config
from core.draft.folder import load_head
from core.errors import InputError, ResourceError, UserError
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


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (0 stopped, 2 bad configuration or input, 1 failure)."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: serve(load_config(arguments.config, arguments.overrides)), NAME)


def serve(config: Config) -> None:
    """Serve until SIGINT or SIGTERM, then finish the running answers and stop.

    Raises:
        UserError: a missing or mismatched model, too few CPUs, or a port that is taken.
    """
    config = check(with_converted_target(config))
    ready, stop = threading.Event(), threading.Event()
    connect(config.cluster, metrics=True)
    try:
        # After connecting, since Ray sets handlers of its own.
        _stop_on_signals(ready, stop)
        check_machine(config)
        start(config)
        ready.set()
        print(_how_to_use(config), flush=True)
        stop.wait()
        say(NAME, "finishing running answers, a minute at most; Ctrl-C again stops at once")
        # Not `shutdown`: a cluster may serve other applications.
        ray_serve.delete(APPLICATION)
    except TimeoutError:
        say(NAME, "some answers took longer and are cut off")
    except KeyboardInterrupt:
        pass
    finally:
        ray.shutdown()
    say(NAME, "stopped")


def start(config: Config) -> None:
    """Deploy on the connected Ray; returns when the replicas are ready."""
    measuring = config.draft.path and config.decode.total_tokens == "auto"
    say(
        NAME,
        f"loading {config.target.path} ({config.target.dtype})"
        + (", then measuring which draft tree pays" if measuring else ""),
    )
    settings = LoggingConfig(log_level="WARNING", enable_access_log=False)
    ray_serve.start(
        http_options=HTTPOptions(host=config.serve.host, port=config.serve.port),
        logging_config=settings,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.run(build_app(config), name=APPLICATION, logging_config=settings)


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
    check_port(config.serve.host, config.serve.port)


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


def _stop_on_signals(ready: threading.Event, stop: threading.Event) -> None:
    """The first signal ends the service in good order once it runs; others end it at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set() or not ready.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


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
