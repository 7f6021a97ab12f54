"""Servers that are started for a measurement, as a user would start them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import yaml

from core.config import Config
from core.errors import InputError, StageError
from core.progress import say

START_TIMEOUT_S = 600.0
# Of Linux's prctl: the signal that a process gets when its parent has ended.
PR_SET_PDEATHSIG = 1
STOP_TIMEOUT_S = 120.0
# Ray names its processes after what they do; what it adds behind is left out.
KINDS = {
    "decoder replicas": "ray::ServeReplica:aerie:Decoder",
    "ingress": "ray::ServeReplica:aerie:Ingress",
    "heads": "ray::ServeReplica:aerie:Heads",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        url: without /v1.
        model: its name there.
        process: that was started.
    """

    url: str
    model: str
    process: subprocess.Popen[bytes]

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Those of an Aerie server that its work goes through, by kind."""
        found: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue  # it has ended meanwhile
            for kind, prefix in KINDS.items():
                if title.startswith(prefix):
                    found[kind].append(process)
        return found

    def resident_mb(self) -> dict[str, float]:
        """Memory of these processes in MB, by kind."""
        sizes: Counter[str] = Counter()
        for kind, processes in self.processes().items():
            for process in processes:
                try:
                    sizes[kind] += process.memory_info().rss // 10**4
                except psutil.Error:
                    continue
        return {kind: size / 100 for kind, size in sizes.items()}


@contextmanager
def aerie_server(config: Config, folder: Path, name: str = "serve") -> Iterator[Server]:
    """`python -m serve.run` with a config, on a free port; its output is `<name>.log`.

    Raises:
        StageError: it did not start, or did not end in good order.
    """
    config = config.replace(serve={"host": "127.0.0.1", "port": free_port()})
    write_config(config, folder / f"{name}.yaml")
    command = [sys.executable, "-m", "serve.run", "--config", str(folder / f"{name}.yaml")]
    # Of what Aerie starts, nothing waits for a model hub that may be out of reach.
    with _running(command, folder / f"{name}.log", {"HF_HUB_OFFLINE": "1"}) as process:
        model = next(iter(config.served_models()))
        server = Server(f"http://127.0.0.1:{config.serve.port}", model, process)
        log = folder / f"{name}.log"
        _wait(process, log, lambda: "Ready: " in log.read_text(errors="replace"))
        yield server
    if process.returncode:
        raise StageError(f"the server ended with {process.returncode}; see {log}")


def write_config(config: Config, path: Path) -> None:
    """As `load_config` reads it."""
    # In its order, which says which model comes first.
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


@contextmanager
def vllm_server(python: str, config: Config, folder: Path) -> Iterator[Server]:
    """vLLM's OpenAI server with the same target in the same dtype, in its own environment.

    Raises:
        InputError: there is no such Python.
        StageError: it did not start.
    """
    if not Path(python).is_file():
        raise InputError(f"load.vllm_python={python}: no such file; give that environment's Python")
    port, target = free_port(), str(config.target.path)
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    command += ["--served-model-name", config.serve.model_name, "--port", str(port)]
    command += ["--dtype", config.target.dtype, "--host", "127.0.0.1"]
    command += ["--max-num-seqs", str(config.decode.batch_size)]
    command += ["--max-model-len", str(config.decode.max_context)]
    # Compiling takes minutes, and on a CPU brings nothing.
    command += ["--enforce-eager"]
    cores = max(1, int(config.serve.cpus_per_replica))
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with _running(command, folder / "vllm.log", environment) as process:
        server = Server(f"http://127.0.0.1:{port}", config.serve.model_name, process)
        _wait(process, folder / "vllm.log", lambda: _answers(f"{server.url}/health"))
        yield server


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _running(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            # A group of its own, so that all of it can be ended; and it ends with this process.
            process_group=0,
            preexec_fn=_end_with_parent,
        )
    try:
        yield process
        process.send_signal(signal.SIGINT)
        process.wait(STOP_TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(process: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool]) -> None:
    """Until the server is ready, or StageError with the end of what it said."""
    say("load_test", f"starting a server; its log is {log}")
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        time.sleep(0.3)
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-2000:]
            raise StageError(f"the server did not start; {log} ends with\n{said}")


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False
