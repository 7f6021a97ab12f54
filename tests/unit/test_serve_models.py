"""serve.models: requests go to the model that they name, in front of real replicas of two."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch

from core.config import Config
from core.models.tiny import save_tiny_target
from serve.api import build_api
from serve.desk import HeadDesk
from serve.generation import Event, Generation, Prompt, Rejected, Tokens
from serve.keys import key_hash
from serve.models import Served
from serve.replica import DecoderReplica
from tests.in_process import CHAT, HELLO, TEXT, TGI, Direct, Json

ADMIN = {"Authorization": "Bearer for /admin"}
NAMES = ("one", "org/other")


@dataclass
class Pair:
    """Two models behind one address, and how often each was asked."""

    config: Config
    backends: dict[str, Direct]
    runner: asyncio.Runner

    def call(self, method: str, path: str, /, **settings: Any) -> httpx.Response:
        served = [
            Served(name, self.backends[name], self.backends[name].desk, one.serve)
            for name, one in self.config.served_models().items()
        ]
        transport = httpx.ASGITransport(build_api(served, self.config.serve))
        client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)
        return self.runner.run(client.request(method, path, **settings))

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.call("POST", path, json={**HELLO[path], **fields})

    def configured(self, models: Json, **serve: Any) -> Pair:
        config = self.config.replace(serve={"models": models, **serve})
        return Pair(config, self.backends, self.runner)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("models")
    for place in range(len(NAMES)):
        save_tiny_target(folder / str(place), seed=place)
    config = Config().replace(
        target={"path": str(folder / "0"), "dtype": "float32"},
        decode={"max_context": 400},
        serve={
            "cpus_per_replica": 1,
            "admin_keys": (key_hash("for /admin"),),
            "models": {NAMES[0]: {}, NAMES[1]: {"target": {"path": str(folder / "1")}}},
        },
    )
    threads = torch.get_num_threads()
    with asyncio.Runner() as runner:
        backends = {
            name: Direct(DecoderReplica(one), HeadDesk(one.draft.path, rounds=20, gain=0.0))
            for name, one in config.served_models().items()
        }
        yield Pair(config, backends, runner)
    torch.set_num_threads(threads)


def text_of(body: Json) -> str:
    (choice,) = body["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_each_answers_to_its_name(pair: Pair, path: str) -> None:
    bodies = [pair.post(path, model=name).json() for name in NAMES]
    assert [body["model"] for body in bodies] == list(NAMES)
    assert text_of(bodies[0]) != text_of(bodies[1])


def test_who_names_none_asks_the_first(pair: Pair) -> None:
    first, second = (text_of(pair.post(TEXT, model=name).json()) for name in NAMES)
    assert pair.post(TGI).json()["generated_text"] == first
    others = pair.configured(pair.config.serve.models, model_name=NAMES[1])
    assert others.post(TGI).json()["generated_text"] == second
    assert "data" in (listed := others.call("GET", "/v1/models").json())
    assert [one["id"] for one in listed["data"]] == [NAMES[1], NAMES[0]]
    for path in ("/tokenize", "/detokenize"):
        for model in (None, *NAMES):
            assert pair.post(path, model=model).status_code == 200


def test_an_unknown_name_is_a_404_that_tells_those_there_are(pair: Pair) -> None:
    asked = [pair.post(path, model="no") for path in (CHAT, TEXT, "/tokenize", "/detokenize")]
    for response in (*asked, pair.call("GET", "/v1/models/no")):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "model_not_found")
        assert error["message"].endswith("this server has 'one', 'org/other'")


def test_the_list_of_models(pair: Pair) -> None:
    listed = pair.call("GET", "/v1/models").json()
    assert [one["id"] for one in listed["data"]] == list(NAMES)
    assert pair.call("GET", "/v1/models/org/other").json()["id"] == "org/other"


def test_requests_are_counted_by_model(pair: Pair) -> None:
    async def asked() -> str:
        served = [
            Served(name, pair.backends[name], pair.backends[name].desk, pair.config.serve)
            for name in NAMES
        ]
        transport = httpx.ASGITransport(build_api(served, pair.config.serve))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for name, tokens in zip(NAMES, (3, 4), strict=True):
                body = {**HELLO[TEXT], "model": name, "max_tokens": tokens}
                assert (await client.post(TEXT, json=body)).status_code == 200
            return (await client.get("/metrics")).text

    text = pair.runner.run(asked())
    counted = re.findall(r'^vllm:generation_tokens_total\{model_name="(.*?)"\} (\S+)', text, re.M)
    assert {name: float(value) for name, value in counted} == {"one": 3, "org/other": 4}


def test_heads_are_a_models_own(pair: Pair) -> None:
    asked = {"path": "/somewhere", "canary": 0.5}
    for model in (None, "org/other"):
        pair.runner.run(pair.backends[model or "one"].desk.propose(f"/of/{model}", 0.5))
        where = {} if model is None else {"params": {"model": model}}
        shown = pair.call("GET", "/admin/draft", headers=ADMIN, **where).json()
        assert shown["trial"]["path"] == f"/of/{model}"
        # One is on trial there already.
        body = asked if model is None else {**asked, "model": model}
        refused = pair.call("POST", "/admin/draft", headers=ADMIN, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "trial_running")
        assert f"/of/{model} is on trial" in refused.json()["error"]["message"]
    body = {**asked, "model": "no"}
    assert pair.call("POST", "/admin/draft", headers=ADMIN, json=body).status_code == 404


class Absent(Direct):
    """A model without a replica; whoever asks it waits."""

    async def running(self) -> int:
        return 0

    async def generate(self, request: Generation) -> AsyncGenerator[Event, None]:
        await asyncio.sleep(60)
        yield Rejected("never")

    async def tokenize(self, prompt: Prompt, field: str) -> Tokens | Rejected:
        await asyncio.sleep(60)
        return Rejected("never")


@pytest.mark.parametrize(
    ("absent", "may_be", "status", "state"),
    [
        ((), False, 200, "ok"),
        (("org/other",), False, 503, "starting"),
        (("org/other",), True, 200, "ok"),
        (NAMES, True, 200, "idle"),
    ],
)
def test_health_is_that_of_all(
    pair: Pair, absent: tuple[str, ...], may_be: bool, status: int, state: str
) -> None:
    some = pair.configured(pair.config.serve.models, replicas=0 if may_be else 1)
    some.backends = {
        name: Absent(one.replica, one.desk) if name in absent else one
        for name, one in pair.backends.items()
    }
    response = some.call("GET", "/health")
    body = response.json()
    assert (response.status_code, body["status"]) == (status, state)
    assert body["replicas"] == 2 - len(absent)
    of_the_other = body["models"]["org/other"]
    if absent:
        state = "idle" if may_be else "starting"
        assert of_the_other == {"status": state, "replicas": 0}


def test_who_waits_for_a_replica_is_not_kept_for_ever(pair: Pair) -> None:
    models = {**pair.config.serve.models, "one": {"serve": {"deadline_s": 0.05}}}
    some = pair.configured(models)
    one = pair.backends["one"]
    some.backends = {**pair.backends, "one": Absent(one.replica, one.desk)}
    for path in (TEXT, "/tokenize"):
        response = some.post(path, model="one")
        assert (response.status_code, response.json()["error"]["code"]) == (
            504,
            "deadline_exceeded",
        )
    assert some.post(TEXT, model="org/other").status_code == 200
