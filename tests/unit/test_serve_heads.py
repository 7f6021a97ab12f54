"""Draft heads that come and go while a real replica answers: serve.heads, serve.desk, /admin."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config import Config
from core.draft.base import TargetGeometry, build_head
from core.draft.folder import save_head
from core.draft.vocabulary import DraftVocabulary
from core.models.target import Target
from serve import desk as desk_module
from serve import heads as heads_module
from serve.canary import Tally, judge
from serve.desk import Head, HeadDesk, Report
from serve.keys import key_hash
from tests.in_process import CHAT, HELLO, Json, Service, in_process

KEY = {"Authorization": "Bearer admin"}
ASKED = {**HELLO[CHAT], "aerie": {"spans": True}, "max_tokens": 40, "logit_bias": {"2": -100}}
TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (desk_module, heads_module):
        monkeypatch.setattr(module, "REPORT_EVERY_S", 0.02)


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Service]:
    with in_process(folder, **settings) as service:
        service.run(service.replica.check_health())
        yield service.configured(admin_keys=(key_hash("admin"),))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with serving(tmp_path) as service:
        yield service


def head_of(target: Target, folder: Path) -> str:
    """A head of random weights."""
    torch.manual_seed(1)
    geometry = TargetGeometry.of(target.model.config)
    head = build_head(Config().draft, geometry, DraftVocabulary.whole(target.vocab_size))
    save_head(folder, head, {"target_fingerprint": target.fingerprint})
    return str(folder)


def with_nan(folder: str) -> None:
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    weights["fc.weight"][3, 4] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


def of_another_target(folder: str) -> None:
    file = Path(folder) / "aerie.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "target_fingerprint": "another"}))


def bring(service: Service, path: str, **fields: Any) -> httpx.Response:
    return service.run(
        service.client.post("/admin/draft", json={"path": path, **fields}, headers=KEY)
    )


def status(service: Service) -> Json:
    return service.run(service.client.get("/admin/draft", headers=KEY)).json()


def rounds_of(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return response.json()["aerie"]["rounds"]


def test_a_new_head_takes_new_requests_and_the_old_one_ends_its_own(
    service: Service, tmp_path: Path
) -> None:
    wanted = service.call(CHAT, **ASKED).json()["choices"][0]["message"]
    path = head_of(service.replica._target, tmp_path / "head")
    old = service.replica.heads.current.lane

    async def work() -> tuple[httpx.Response, httpx.Response, bool]:
        post = service.client.post
        running = asyncio.create_task(post(CHAT, json={**ASKED, "max_tokens": 300}))
        while not service.replica._loop._turns:
            await asyncio.sleep(0.001)
        before = service.replica._loop._turns[0]
        swapped = await post("/admin/draft", json={"path": path}, headers=KEY)
        at_work = before.open
        while service.replica.heads.current.lane is old:
            await asyncio.sleep(0.01)
        await running
        assert before.lane is old and running.result().status_code == 200
        return swapped, await post(CHAT, json=ASKED), at_work

    swapped, answer, at_work = service.run(work())
    assert (swapped.status_code, swapped.json()["state"]) == (200, "promoted")
    assert status(service)["current"]["path"] == path
    assert answer.json()["choices"][0]["message"] == wanted
    decoder = service.replica.heads.current.lane.decoder
    assert decoder.head is not None and decoder.plan.total_tokens == heads_module.FIRST_TREE
    assert not old.decoder.busy
    figures = answer.json()["aerie"]
    assert figures["tree_size"] > 1 and figures["seconds"]["draft"] > 0
    assert at_work, "the answer was not long enough to see"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (with_nan, "fc.weight holds 1 values that are NaN or infinite"),
        (of_another_target, "was trained for target another"),
        (lambda folder: (Path(folder) / "model.safetensors").unlink(), "model.safetensors"),
    ],
)
def test_a_bad_head_never_takes_a_request(
    service: Service, tmp_path: Path, harm: Any, reason: str
) -> None:
    path = head_of(service.replica._target, tmp_path / "head")
    harm(path)
    before = service.replica.heads.current
    for fields in ({}, {"canary": 0.5}):
        response = bring(service, path, **fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "draft_refused")
        assert reason in error["message"]
    found = status(service)
    assert found["trial"] is None and found["current"]["path"] is None
    assert [one["outcome"] for one in found["decisions"]] == ["refused"] * 2
    assert service.replica.heads.current is before
    good = head_of(service.replica._target, tmp_path / "good")
    assert bring(service, good).json()["state"] == "promoted"


def test_paths_and_keys(service: Service, tmp_path: Path) -> None:
    assert bring(service, str(tmp_path / "nowhere")).status_code == 400
    for path in ("relative", ""):
        assert bring(service, path).json()["error"]["param"] == "path"
    for headers in ({}, {"Authorization": "Bearer other"}):
        response = service.run(service.client.get("/admin/draft", headers=headers))
        assert response.status_code == 401
    closed = service.configured(admin_keys=())
    assert closed.run(closed.client.get("/admin/draft", headers=KEY)).status_code == 403


def test_a_canary_is_promoted_by_its_accepted_length(service: Service, tmp_path: Path) -> None:
    path = head_of(service.replica._target, tmp_path / "head")
    response = bring(service, path, canary=0.5)
    assert (response.status_code, response.json()["state"]) == (200, "canary")
    assert bring(service, path).status_code == 409
    assert status(service)["trial"]["share"] == 0.5
    decision = decided(service)
    assert decision["outcome"] == "promoted" and "accepted length" in decision["reason"]
    assert min(decision["current"]["rounds"], decision["new"]["rounds"]) >= 20
    assert decision["current"]["accepted_length"] == 1


def end_trial(service: Service) -> httpx.Response:
    return service.run(service.client.delete("/admin/draft", headers=KEY))


def test_a_canary_without_traffic_can_be_ended(service: Service, tmp_path: Path) -> None:
    assert end_trial(service).status_code == 404
    before = service.replica.heads.current
    path = head_of(service.replica._target, tmp_path / "head")
    number = bring(service, path, canary=0.5).json()["number"]
    assert bring(service, path).status_code == 409
    ended = end_trial(service)
    assert (ended.status_code, ended.json()["outcome"]) == (200, "aborted")
    found = status(service)
    assert found["trial"] is None and found["current"]["path"] is None
    assert (found["decisions"][0]["number"], found["decisions"][0]["outcome"]) == (
        number,
        "aborted",
    )

    async def let_go() -> None:
        while service.replica.heads.trial is not None:
            await asyncio.sleep(0.01)

    service.run(asyncio.wait_for(let_go(), TIMEOUT_S))
    assert service.replica.heads.current is before
    assert bring(service, path).json()["state"] == "promoted", "and the next one comes"


def test_ending_a_trial_needs_the_key(service: Service) -> None:
    assert service.run(service.client.delete("/admin/draft")).status_code == 401


def test_a_replica_starts_though_the_promoted_head_has_vanished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("ray.serve")
    # Once Ray Serve is imported, its logger hands nothing on to the root's handlers.
    logger.addHandler(caplog.handler)
    with in_process(tmp_path) as fresh:
        gone = Head(10**12, str(tmp_path / "gone"))
        # Another replica has it: so the desk learns of it, as one that starts again does.
        fresh.run(fresh.backend.desk.report(Report("another", None, gone)))
        fresh.run(asyncio.wait_for(fresh.replica.check_health(), TIMEOUT_S))
        assert fresh.replica.heads.current.head == Head(0, None)
        assert fresh.call(CHAT).status_code == 200
        (line,) = [one.message for one in caplog.records if "CANNOT BE USED" in one.message]
        assert str(gone.path) in line
        # It takes the next one all the same.
        service = fresh.configured(admin_keys=(key_hash("admin"),))
        fresh.backend.desk._seen.pop("another")
        good = head_of(fresh.replica._target, tmp_path / "good")
        assert bring(service, good).json()["state"] == "promoted"

        async def taken() -> None:
            while fresh.replica.heads.current.head.path != good:
                await asyncio.sleep(0.01)

        fresh.run(asyncio.wait_for(taken(), TIMEOUT_S))
    logger.removeHandler(caplog.handler)


def test_a_canary_that_does_not_gain_is_rolled_back(tmp_path: Path) -> None:
    with serving(tmp_path, canary_gain=9.0) as service:
        before = service.replica.heads.current
        bring(service, head_of(service.replica._target, tmp_path / "head"), canary=0.5)
        assert decided(service)["outcome"] == "rolled back"
        assert service.replica.heads.current is before and service.replica.heads.trial is None


def test_a_canary_that_fails_is_rolled_back_and_its_requests_are_answered(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(service, head_of(service.replica._target, tmp_path / "head"), canary=0.99)
    trial = service.replica.heads.trial
    assert trial is not None

    def fail() -> None:
        raise RuntimeError("a broken kernel")

    monkeypatch.setattr(trial.lane.decoder, "step", fail)
    decision = decided(service)
    assert decision["outcome"] == "rolled back" and "failed" in decision["reason"]


def decided(service: Service) -> Json:
    """Ask until the trial is over; every request is answered."""
    for number in range(60):
        rounds_of(service.call(CHAT, **ASKED, seed=number))
        service.run(asyncio.sleep(0.05))
        found = status(service)
        if found["trial"] is None:
            return found["decisions"][0]
    pytest.fail(f"no decision: {found}")


def test_user_config_does_as_the_call_does_and_mistakes_in_it_are_shown(
    service: Service, tmp_path: Path
) -> None:
    desk, path = service.backend.desk, head_of(service.replica._target, tmp_path / "head")
    service.run(desk.reconfigure({"path": "relative"}))
    assert "full path" in status(service)["decisions"][0]["reason"]
    service.run(desk.reconfigure({"path": path}))
    number = status(service)["trial"]["number"]
    service.run(desk.reconfigure({"path": path}))
    assert service.run(desk.settled(number, TIMEOUT_S)).outcome == "promoted"
    service.run(desk.reconfigure({"path": path}))
    assert status(service)["trial"] is None


# --- The desk alone ------------------------------------------------------------


def test_a_desk_waits_for_all_replicas_and_counts_them_together() -> None:
    async def work() -> None:
        desk = HeadDesk("/a", rounds=100, gain=0.0)
        first, second = (Report(name, "/a", Head(0, "/a")) for name in "xy")
        await desk.report(first)
        await desk.report(second)
        head = await desk.propose("/b", 0.25)
        order = await desk.report(ready(first, head.number))
        assert (order.trial, order.share) == (head, 0.0), "the other one is still loading"
        assert (await desk.report(ready(second, head.number))).share == 0.25
        half = (Tally(60, 120, 300), Tally(60, 180, 600))
        assert (await desk.report(ready(first, head.number, *half))).trial == head
        order = await desk.report(ready(second, head.number, *half))
        assert (order.current, order.trial) == (head, None)

    asyncio.run(work())


def ready(
    report: Report, number: int, old: Tally | None = None, new: Tally | None = None
) -> Report:
    return Report(
        report.replica, report.origin, report.current, number, None, old or Tally(), new or Tally()
    )


def test_a_desk_that_starts_again_learns_what_is_in_use() -> None:
    async def work() -> None:
        desk = HeadDesk("/a", rounds=100, gain=0.0)
        late = Head(10**12, "/b")
        assert (await desk.report(Report("x", "/a", late))).current == late
        assert (await desk.report(Report("y", "/a", Head(0, "/a")))).current == late
        assert (await desk.propose("/c")).number > late.number
        # A replica of another configuration stays as it is.
        other = Head(5, "/other")
        assert (await desk.report(Report("z", "/other", other))).current == other

    asyncio.run(work())


def test_a_desk_that_starts_again_with_a_user_config_keeps_what_is_in_use() -> None:
    """Ray Serve gives it its `user_config` once more before any replica reports."""

    async def work() -> None:
        desk = HeadDesk("/a", rounds=100, gain=0.0)
        await desk.reconfigure({"path": "/b"})
        late = Head(10**12, "/b")
        order = await desk.report(Report("x", "/a", late))
        assert (order.current, order.trial) == (late, None), "it is there, and is not loaded again"
        assert (await desk.propose("/c")).number > late.number
        # A head that came by a call since then is kept while the other one is tried.
        desk = HeadDesk("/a", rounds=100, gain=0.0)
        await desk.reconfigure({"path": "/b"})
        called = Head(10**12, "/called")
        order = await desk.report(Report("x", "/a", called))
        assert order.current == called and order.trial is not None

    asyncio.run(work())


@pytest.mark.parametrize(
    ("old", "new", "keep"),
    [
        (Tally(1000, 2000, 5000), Tally(1000, 2100, 5300), True),
        (Tally(1000, 2000, 5000), Tally(1000, 1900, 4600), False),
        (Tally(1000, 2000, 5000), Tally(99, 300, 1000), None),
        (Tally(60, 180, 600), Tally(60, 60, 60), False),
        (Tally(60, 60, 60), Tally(60, 180, 600), None),
        (Tally(), Tally(1, 1, 1, failures=1), False),
        (Tally(), Tally(500, 900, 2000), None),
    ],
)
def test_verdicts(old: Tally, new: Tally, keep: bool | None) -> None:
    verdict = judge(old, new, rounds=100, gain=0.0)
    assert (verdict.keep if verdict else None) is keep
