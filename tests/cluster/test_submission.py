"""Where the quick start runs: submitted to the Ray that it starts, or beside it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from core.runtime import chain
from core.runtime.connect import JOBS_AGENT_PORT
from core.runtime.job import Job

pytestmark = pytest.mark.cluster


@contextmanager
def agent_port_taken() -> Iterator[None]:
    """By this process, or by whoever has it already."""
    try:
        server = socket.create_server(("", JOBS_AGENT_PORT))
    except OSError:
        yield
    else:
        with server:
            yield


def test_a_ray_that_takes_no_jobs_does_the_work_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another Ray takes the agent's port after it was found free and before ours binds it."""
    monkeypatch.setattr(chain, "jobs_api_is_free", lambda: True)
    monkeypatch.setattr(chain, "AGENT_PATIENCE", 3.0)
    job = Job(
        name="quickstart",
        summary="",
        sections=("train",),
        inputs=lambda config: {},
        run=lambda config, folder: {"on_ray": ray.is_initialized()},
    )
    with agent_port_taken():
        assert chain.main(job, [f"output={tmp_path / 'out'}", "cluster.num_cpus=2"]) == 0
    assert "Running right here instead" in capsys.readouterr().out
    assert '"on_ray": true' in (tmp_path / "out" / "report.json").read_text()
    assert not ray.is_initialized()
