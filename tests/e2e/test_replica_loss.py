"""Processes of the service are killed while it answers: others finish what was begun."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.serving import Served, make_models, serving
from tests.e2e.under_load import REPLICAS, TIMEOUT_S, UnderLoad, until, wanted_texts

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow]

NUM_REPLICAS = 2
TWO_REPLICAS = {"replicas": NUM_REPLICAS, "max_replicas": NUM_REPLICAS}


def restarted(served: Served) -> float:
    """How often the service began a request anew."""
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    line = next(one for one in lines if one.startswith("aerie:request_restarted_t"))
    return float(line.rpartition(" ")[2])


def test_every_answer_is_whole_though_a_replica_is_killed(tmp_path: Path) -> None:
    config = make_models(tmp_path).replace(serve=TWO_REPLICAS)
    wanted = wanted_texts(config, 100)

    async def work(served: Served) -> None:
        async with UnderLoad(served, wanted, 100, clients=6) as load:
            await load.answered(6)
            replica = served.server.processes()[REPLICAS][0]
            replica.kill()
            # What was at work then, and more.
            await load.answered(20)
        assert all(reply.error is None for reply in load.replies)
        load.check()

    with serving(config, tmp_path) as served:
        asyncio.run(work(served))
        assert restarted(served) > 0, "the killed replica had answers in work"


@pytest.mark.soak
def test_replicas_controller_and_proxy_are_killed_under_load(tmp_path: Path) -> None:
    config = make_models(tmp_path).replace(serve=TWO_REPLICAS)
    num_tokens = 300
    wanted = wanted_texts(config, num_tokens)

    async def kill_replicas(served: Served, times: int) -> None:
        async with UnderLoad(served, wanted, num_tokens, clients=12) as load:
            for number in range(times):
                await load.answered(6)
                replica = served.server.processes()[REPLICAS][number % NUM_REPLICAS]
                replica.kill()
                await load.replaced(replica, NUM_REPLICAS)
        load.check()
        whole = sum(reply.error is None for reply in load.replies)
        print(f"{times} replicas killed: {whole} of {len(load.replies)} answers whole")

    async def kill_controller(served: Served) -> None:
        async with UnderLoad(served, wanted, num_tokens, clients=12) as load:
            await load.answered(6)
            (controller,) = served.server.processes()["controller"]
            controller.kill()
            await load.answered(24)
            await until(lambda: bool(set(served.server.processes()["controller"]) - {controller}))
        assert all(reply.error is None for reply in load.replies)
        load.check()

    async def kill_proxy(served: Served) -> None:
        async with UnderLoad(served, wanted, num_tokens, clients=12) as load:
            await load.answered(6)
            (proxy,) = served.server.processes()["proxy"]
            began = time.monotonic()
            proxy.kill()
            await until(lambda: answers(served))
            back = time.monotonic()
            await load.answered(24)
        load.check(besides=(began, back))
        failed = sum(reply.error is not None for reply in load.replies)
        print(f"the proxy was back after {back - began:.1f} s; {failed} requests failed meanwhile")

    with serving(config, tmp_path) as served:
        asyncio.run(kill_replicas(served, 5))
        assert restarted(served) > 0, "the killed replicas had answers in work"
        asyncio.run(kill_controller(served))
        # The one that came back looks after replicas too.
        asyncio.run(kill_replicas(served, 1))
        asyncio.run(kill_proxy(served))


def answers(served: Served) -> bool:
    try:
        return httpx.get(f"{served.url}/health", timeout=TIMEOUT_S).status_code == 200
    except httpx.HTTPError:
        return False
