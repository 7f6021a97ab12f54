"""A server that is stopped ends its running answers and tells new clients to come later."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.serving import make_models, serving

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow, pytest.mark.soak]

CHAT = "/v1/chat/completions"
TIMEOUT_S = 60.0
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Hello!"}]}
# Some seconds on an idle machine, and less than a server waits for on a busy one.
NUM_TOKENS = 1000


def test_running_answers_end_and_new_requests_are_refused(tmp_path: Path) -> None:
    with serving(make_models(tmp_path), tmp_path) as served:
        running = {**ASKED, "stream": True, "max_tokens": NUM_TOKENS}
        with httpx.Client(base_url=served.url, timeout=TIMEOUT_S) as client:
            with client.stream("POST", CHAT, json=running) as response:
                lines = response.iter_lines()
                assert next(lines).startswith("data: ")
                served.server.process.send_signal(signal.SIGTERM)
                refused = until_refused(client)
                assert refused.json()["error"]["code"] == "shutting_down"
                assert int(refused.headers["retry-after"]) >= 1
                assert client.get("/health").json()["status"] == "draining"
                assert client.get("/live").status_code == 200
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]", "it ends as if nothing had been"
        assert served.server.process.wait(TIMEOUT_S) == 0
    log = (tmp_path / "serve.log").read_text()
    assert '"status": 503' in log, "requests are logged as it comes"


def until_refused(client: httpx.Client) -> httpx.Response:
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        response = client.post(CHAT, json={**ASKED, "max_tokens": 1})
        if response.status_code == 503:
            return response
        assert response.status_code == 200, response.text
    pytest.fail("new requests are still answered")
