"""Updates of a service that answers meanwhile: nobody notices, and what is bad is not taken."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config import Config
from core.runtime.load.servers import write_config
from tests.e2e.serving import ADMIN_KEY, Served, make_models, serving
from tests.e2e.under_load import REPLICAS, TIMEOUT_S, UnderLoad, until, wanted_texts

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.soak]

NUM_TOKENS = 100
IN_SERVICE = "the new configuration is in service"


@pytest.mark.parametrize(("replicas", "cpus"), [(2, 3), (1, 1)], ids=["with room", "without"])
def test_a_rolling_update_loses_no_request(tmp_path: Path, replicas: int, cpus: int) -> None:
    config = make_models(tmp_path).replace(
        serve={"replicas": replicas, "max_replicas": replicas}, cluster={"num_cpus": cpus}
    )
    wanted = wanted_texts(config, NUM_TOKENS)

    async def work(served: Served) -> None:
        async with UnderLoad(served, wanted, NUM_TOKENS, clients=8) as load:
            await load.answered(4)
            before = served.server.processes()[REPLICAS]
            await renew(served, tmp_path, decode={"total_tokens": 8})
            after = served.server.processes()[REPLICAS]
            assert len(before) == len(after) == replicas and not set(before) & set(after)
            await load.answered(12)
            # What cannot be used changes nothing.
            for section in ({"draft": {"path": str(tmp_path / "nowhere")}}, {"serve": {"port": 9}}):
                said = await renew(served, tmp_path, **section)
                assert "nothing is changed: " in said
            assert served.server.processes()[REPLICAS] == after
        whole(load)

    with serving(config, tmp_path) as served:
        asyncio.run(work(served))


async def renew(served: Served, folder: Path, **changes: Any) -> str:
    """Change the configuration's file and say so; what the server says to it."""
    port = int(served.url.rpartition(":")[2])
    serve = {"host": "127.0.0.1", "port": port, **changes.pop("serve", {})}
    log = folder / "serve.log"
    before = len(log.read_text())
    write_config(served.config.replace(serve=serve, **changes), folder / "serve.yaml")
    served.server.process.send_signal(signal.SIGHUP)
    said = ""

    def done() -> bool:
        nonlocal said
        said = log.read_text()[before:]
        return IN_SERVICE in said or "nothing is changed" in said or "does not start" in said

    await until(done)
    return said


def test_heads_are_swapped_and_bad_ones_never_take_requests(tmp_path: Path) -> None:
    config = make_models(tmp_path).replace(
        serve={"replicas": 2, "max_replicas": 2}, cluster={"num_cpus": 2}
    )
    wanted = wanted_texts(config, NUM_TOKENS)
    heads = make_heads(config, tmp_path)

    async def work(served: Served) -> None:
        async with UnderLoad(served, wanted, NUM_TOKENS, clients=8) as load:
            for name in ("of another target", "with nan", "damaged"):
                await load.answered(4)
                answer = await bring(served, heads[name])
                assert answer.status_code == 400, name
                assert answer.json()["error"]["code"] == "draft_refused", name
                assert (await status(served))["current"]["path"] == config.draft.path
            for name in ("good", "better"):
                await load.answered(4)
                answer = await bring(served, heads[name])
                assert (answer.status_code, answer.json()["state"]) == (200, "promoted")
                assert (await status(served))["current"]["path"] == str(heads[name])
            await load.answered(12)
        whole(load)

    with serving(config, tmp_path) as served:
        asyncio.run(work(served))


def whole(load: UnderLoad) -> None:
    assert [reply.error for reply in load.replies if reply.error] == []
    load.check()
    print(f"{len(load.replies)} answers, all whole")


def make_heads(config: Config, folder: Path) -> dict[str, Path]:
    """Two good ones, and others that each have something wrong."""
    heads = {}
    for name in ("good", "better", "of another target", "with nan", "damaged"):
        heads[name] = folder / name.replace(" ", "_")
        shutil.copytree(config.draft.path or "", heads[name])
    record = heads["of another target"] / "aerie.json"
    record.write_text(
        json.dumps({**json.loads(record.read_text()), "target_fingerprint": "another"})
    )
    weights = load_file(heads["with nan"] / "model.safetensors")
    weights["fc.weight"][0, 0] = torch.nan
    save_file(weights, heads["with nan"] / "model.safetensors")
    (heads["damaged"] / "model.safetensors").write_bytes(b"damaged")
    return heads


async def bring(served: Served, head: Path) -> httpx.Response:
    async with admin(served) as client:
        return await client.post("/admin/draft", json={"path": str(head)})


async def status(served: Served) -> dict[str, Any]:
    async with admin(served) as client:
        return (await client.get("/admin/draft")).json()


def admin(served: Served) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    return httpx.AsyncClient(base_url=served.url, headers=headers, timeout=TIMEOUT_S)
