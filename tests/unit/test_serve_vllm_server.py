"""serve.vllm.server and its supervisor: what is started ends with its starter."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from core.runtime.load.servers import write_config
from tests.vllm_recordings import stand_in_config

# Far above what anything here takes, even on a busy machine.
TIMEOUT_S = 120.0
STARTER = """
import sys, time
from core.config import load_config
from serve.vllm.replica import VllmReplica
replica = VllmReplica(load_config(sys.argv[1], []))
print(replica._server.folder, flush=True)
time.sleep(1000)
"""


def gone(pid: int) -> bool:
    """Whether it no longer runs; what nobody has waited for yet does not count."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def wait_until_gone(*pids: int) -> None:
    wait_until(lambda: all(map(gone, pids)))


@pytest.fixture
def started(tmp_path: Path) -> tuple[subprocess.Popen[str], Path, list[int]]:
    """A process with a replica, the replica's folder, the server and what that has started."""
    pids = tmp_path / "pids"
    write_config(stand_in_config(tmp_path, "--child", str(pids)), tmp_path / "config.yaml")
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path / "config.yaml")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    folder = next(line for line in starter.stdout if line.startswith("/"))
    return starter, Path(folder.strip()), [int(pid) for pid in pids.read_text().split()]


def test_nothing_outlives_a_replica_that_is_killed(
    started: tuple[subprocess.Popen[str], Path, list[int]],
) -> None:
    starter, folder, pids = started
    assert folder.is_dir() and not any(map(gone, pids))
    (supervisor,) = psutil.Process(starter.pid).children()
    starter.kill()
    starter.wait()
    wait_until_gone(*pids, supervisor.pid)
    wait_until(lambda: not folder.exists())


def test_what_a_dead_server_had_started_does_not_outlive_it(
    started: tuple[subprocess.Popen[str], Path, list[int]],
) -> None:
    starter, folder, (child, server) = started
    psutil.Process(server).send_signal(signal.SIGKILL)
    wait_until_gone(child, server)
    wait_until(lambda: not folder.exists())
    starter.kill()
    starter.wait()


def test_the_server_ends_when_its_supervisor_is_killed(
    started: tuple[subprocess.Popen[str], Path, list[int]],
) -> None:
    starter, _, (child, server) = started
    (supervisor,) = psutil.Process(starter.pid).children()
    supervisor.kill()
    wait_until_gone(server)
    psutil.Process(child).kill()
    starter.kill()
    starter.wait()
