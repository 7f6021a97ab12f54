"""Replicas come and go with the load, by a policy of Aerie's own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from jobs import load_test
from tests.e2e.serving import PROMPTS, ROOT, Served, expected_text, make_models, one_thread, serving
from tests.e2e.under_load import TIMEOUT_S

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.soak]


def test_one_replica_three_and_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    config = str(ROOT / "configs" / "load_autoscaling.yaml")
    assert load_test.main(["--config", config, f"output={tmp_path / 'run'}"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert all(report["kept"].values()), report["kept"]
    assert "replicas went 1 → 3 → 1" in capsys.readouterr().out
    # Few long requests: Serve's own policy would have left it at one replica.
    assert any(one["wanted"] > one["serve_default"] for one in report["otherwise"])
    assert (tmp_path / "run" / "autoscaling.png").stat().st_size > 10_000


def test_a_model_nobody_asks_has_no_replica(tmp_path: Path) -> None:
    config = make_models(tmp_path)
    with one_thread():
        wanted = expected_text(config.target, PROMPTS[0], 24)
    config = config.replace(
        # The second one has no room beside the first: they take turns.
        serve={"replicas": 0, "models": {"tiny": {}, "other": {}}, "downscale_delay_s": 2.0,
               "model_name": "tiny"},
        cluster={"num_cpus": 1},
    )  # fmt: skip
    with serving(config, tmp_path) as served:
        assert health(served) == {"status": "idle", "replicas": 0}
        for model in ("tiny", "other", "tiny"):
            assert answer(served, model, 24) == wanted
            # A stream that takes longer than the delay keeps its replica.
            assert len(answer(served, model, 400)) > len(wanted)
            until(lambda: health(served) == {"status": "idle", "replicas": 0})


def answer(served: Served, model: str, max_tokens: int) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPTS[0]}],
        "max_tokens": max_tokens,
    }
    reply = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
    text: str = reply.raise_for_status().json()["choices"][0]["message"]["content"]
    return text


def health(served: Served) -> dict[str, object]:
    body = httpx.get(f"{served.url}/health", timeout=TIMEOUT_S).raise_for_status().json()
    return {name: body[name] for name in ("status", "replicas")}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.5)
