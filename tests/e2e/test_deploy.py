"""`serve deploy` and `serve run`, Ray Serve's own tools, on a Ray that runs already."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.deploying import BIN, ENVIRONMENT, TIMEOUT_S, Deployed, deploy, ray_head
from tests.e2e.serving import ADMIN_KEY, ROOT, Served, make_models
from tests.e2e.under_load import REPLICAS, UnderLoad, until, wanted_texts

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.soak]

NUM_TOKENS = 100


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("deploy")
    config = make_models(folder).replace(serve={"cpus_per_replica": 0.5})
    with ray_head(folder, num_cpus=2) as head:
        deployed = deploy(head, config, folder)
        status = head.settled()
        assert status["status"] == "RUNNING", status["message"]
        yield deployed


def head_in_use(served: Served) -> str:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    answer = httpx.get(f"{served.url}/admin/draft", headers=headers, timeout=TIMEOUT_S)
    path: str = answer.raise_for_status().json()["current"]["path"]
    return path


def test_a_second_deploy_brings_a_head_and_loses_no_request(
    deployed: Deployed, tmp_path: Path
) -> None:
    served = deployed.served
    wanted = wanted_texts(served.config, NUM_TOKENS)
    shutil.copytree(served.config.draft.path or "", tmp_path / "new")

    async def work() -> UnderLoad:
        async with UnderLoad(served, wanted, NUM_TOKENS, clients=4) as load:
            await load.answered(4)
            before = served.server.processes()[REPLICAS]
            user_config = {"path": str(tmp_path / "new")}
            changes = [{"name": "Heads", "user_config": user_config}]
            await asyncio.to_thread(deployed.deploy, changes)
            await until(lambda: head_in_use(served) == user_config["path"])
            await load.answered(8)
            assert served.server.processes()[REPLICAS] == before
        return load

    load = asyncio.run(work())
    assert [reply.error for reply in load.replies if reply.error] == []
    load.check()


def test_other_arguments_replace_the_replicas_and_lose_no_request(deployed: Deployed) -> None:
    served = deployed.served
    wanted = wanted_texts(served.config, NUM_TOKENS)

    async def work() -> UnderLoad:
        async with UnderLoad(served, wanted, NUM_TOKENS, clients=4) as load:
            await load.answered(4)
            before = set(served.server.processes()[REPLICAS])
            await asyncio.to_thread(deployed.deploy, [], decode={"total_tokens": 8})
            await until(lambda: not before & set(served.server.processes()[REPLICAS]))
            await load.answered(8)
        return load

    load = asyncio.run(work())
    assert [reply.error for reply in load.replies if reply.error] == []
    load.check()


def test_what_cannot_be_served_is_said_and_changes_nothing(deployed: Deployed) -> None:
    before = deployed.served.server.processes()[REPLICAS]
    deployed.deploy([], target={"path": "/nowhere"})
    status = deployed.head.settled()
    assert status["status"] == "DEPLOY_FAILED"
    assert "target.path=/nowhere: no such folder" in status["message"]
    assert "Traceback" not in status["message"]
    assert httpx.get(f"{deployed.served.url}/health", timeout=TIMEOUT_S).json()["status"] == "ok"
    assert deployed.served.server.processes()[REPLICAS] == before
    deployed.deploy([])
    assert deployed.head.settled()["status"] == "RUNNING"


def test_serve_run_takes_arguments_as_a_command_line_does(
    deployed: Deployed, tmp_path: Path
) -> None:
    """Beside the other application, whose HTTP server it shares."""
    config = deployed.served.config
    command = [str(BIN / "serve"), "run", "serve.app:build_app", "--address", deployed.head.address]
    command += ["--name", "second", "--route-prefix", "/second"]
    command += [f"target.path={config.target.path}", "target.dtype=float32"]
    command += ["serve.model_name=second", "serve.cpus_per_replica=0.5"]
    with (tmp_path / "run.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=ENVIRONMENT, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    try:
        asyncio.run(until(lambda: models_of(f"{deployed.served.url}/second") == ["second"]))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def models_of(url: str) -> list[str]:
    answer = httpx.get(f"{url}/v1/models", timeout=TIMEOUT_S)
    return [] if answer.is_error else [one["id"] for one in answer.json()["data"]]
