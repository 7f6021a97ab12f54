"""A Ray of its own, and Ray Serve's command line upon it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from core.config import Config
from core.runtime.load.servers import Server, free_port
from tests.e2e.serving import ROOT, Served

BIN = Path(sys.executable).parent
# Far above what anything here takes, even on a busy machine.
TIMEOUT_S = 300.0
# Ray's workers would give way to everything else on a busy machine.
ENVIRONMENT = {
    **os.environ,
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "PYTHONPATH": str(ROOT),
}


@dataclass(frozen=True)
class Head:
    """A Ray that `ray start` has started; its dashboard takes `serve deploy`."""

    process: subprocess.Popen[bytes]
    address: str
    dashboard: str

    def serve(self, *arguments: str) -> str:
        """Output of `serve …`."""
        command = [str(BIN / "serve"), *arguments, "--address", self.dashboard]
        done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self) -> dict[str, Any]:
        """Of the one application."""
        answer = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=TIMEOUT_S)
        application: dict[str, Any] = answer.raise_for_status().json()["applications"]["aerie"]
        return application

    def settled(self) -> dict[str, Any]:
        """The status, when nothing is on its way any more."""
        deadline = time.monotonic() + TIMEOUT_S
        while (status := self.status())["status"] in ("DEPLOYING", "NOT_STARTED"):
            assert time.monotonic() < deadline, status
            time.sleep(0.5)
        return status


@contextmanager
def ray_head(folder: Path, num_cpus: int) -> Iterator[Head]:
    """`ray start --head`, with ports of its own; what it writes of itself is in `ray.log`."""
    ports = {
        name: free_port()
        for name in (
            "port",
            "dashboard-port",
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "runtime-env-agent-port",
            "ray-client-server-port",
        )
    }
    command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += [f"--num-cpus={num_cpus}", "--object-store-memory=100000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=log, stderr=log)
    try:
        _wait_for(dashboard, process)
        yield Head(process, f"127.0.0.1:{ports['port']}", dashboard)
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def _wait_for(dashboard: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "Ray did not start; see ray.log"
        try:
            httpx.get(f"{dashboard}/api/serve/applications/", timeout=5).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.5)
    pytest.fail("Ray's dashboard does not answer")


@dataclass(frozen=True)
class Deployed:
    """An application that `serve deploy` has brought."""

    head: Head
    served: Served
    file: Path

    def deploy(self, deployments: list[dict[str, Any]], **changes: Any) -> None:
        """Once more, with other settings of deployments or other sections."""
        config = self.served.config.replace(**changes)
        write(self.file, config, int(self.served.url.rpartition(":")[2]), deployments)
        self.head.serve("deploy", str(self.file))


def deploy(head: Head, config: Config, folder: Path) -> Deployed:
    """Bring a service, as a user would."""
    port, file = free_port(), folder / "deploy.yaml"
    url, model = f"http://127.0.0.1:{port}", next(iter(config.served_models()))
    deployed = Deployed(head, Served(url, config, Server(url, model, head.process)), file)
    deployed.deploy([])
    return deployed


def write(file: Path, config: Config, port: int, deployments: list[dict[str, Any]]) -> None:
    """A file for `serve deploy`."""
    sections = config.model_dump(mode="json", include={"target", "draft", "decode", "serve"})
    application = {
        "name": "aerie",
        "route_prefix": "/",
        "import_path": "serve.app:build_app",
        "args": sections,
        "deployments": deployments,
    }
    about = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "proxy_location": "HeadOnly",
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [application],
    }
    file.write_text(yaml.safe_dump(about, sort_keys=False))
