"""serve.guard, serve.keys and serve.metrics, in front of a real replica."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from core.config import ServeConfig
from core.errors import ConfigError, InputError
from serve.keys import key_hash, key_hashes
from tests.in_process import CHAT, HELLO, TEXT, TGI, Service, in_process

KEY, OTHER = "sk-one", "sk-two"


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with in_process(tmp_path_factory.mktemp("guard")) as service:
        yield service


def send(service: Service, path: str, **settings) -> httpx.Response:
    return service.run(service.client.request("POST", path, **settings))


# --- Keys ----------------------------------------------------------------------


def test_who_has_no_key_is_not_let_in(service: Service) -> None:
    keyed = service.configured(api_keys=[sha256(KEY), sha256(OTHER)])
    for header in ({}, {"Authorization": KEY}, {"Authorization": "Bearer wrong"}):
        for path in (CHAT, TEXT, TGI, "/tokenize", "/nothing"):
            response = send(keyed, path, json=HELLO.get(path, {}), headers=header)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    for key in (KEY, OTHER):
        headers = {"Authorization": f"Bearer {key}"}
        assert send(keyed, CHAT, json=HELLO[CHAT], headers=headers).status_code == 200
    for path in ("/", "/health", "/live", "/metrics", "/ping"):
        assert keyed.run(keyed.client.get(path)).status_code == 200
    assert send(keyed, "/ping").status_code == 200


def test_a_prefix_of_the_server_changes_nothing(service: Service) -> None:
    """Ray Serve gives it as `root_path`, and in the path."""
    keyed = service.configured(api_keys=[sha256(KEY)], admin_keys=[sha256(OTHER)])
    transport = httpx.ASGITransport(keyed.api, root_path="/llm")
    client = httpx.AsyncClient(transport=transport, base_url="http://test/llm")

    def status(path: str, key: str | None = None) -> int:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return keyed.run(client.get(path, headers=headers)).status_code

    assert [status("/admin/draft", key) for key in (None, KEY, OTHER)] == [401, 401, 200]
    assert [status("/v1/models", key) for key in (None, KEY, OTHER)] == [401, 200, 401]
    assert [status(path) for path in ("/", "/health", "/metrics")] == [200] * 3


def test_keys_from_list_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# the team's\n{sha256('a')}  # Ann\n\n{sha256('b').upper()}\n")
    monkeypatch.setenv("SERVER_KEYS", "c, d")
    config = ServeConfig(
        api_keys=(sha256("a"),), api_keys_file=str(file), api_keys_env="SERVER_KEYS"
    )
    assert key_hashes(config) == tuple(map(sha256, "abcd"))
    assert key_hashes(ServeConfig()) == ()


def test_keys_that_cannot_be_used_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("sk-secret\n")
    with pytest.raises(InputError, match=r"line 1 is no SHA-256") as caught:
        key_hashes(ServeConfig(api_keys_file=str(tmp_path / "keys")))
    assert "sk-secret" not in str(caught.value)
    (tmp_path / "empty").write_text("# none yet\n")
    with pytest.raises(InputError, match=r"empty has no key"):
        key_hashes(ServeConfig(api_keys_file=str(tmp_path / "empty")))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"binary is not in UTF-8"):
        key_hashes(ServeConfig(api_keys_file=str(tmp_path / "binary")))
    with pytest.raises(InputError, match=r"nowhere: No such file"):
        key_hashes(ServeConfig(api_keys_file="nowhere"))
    monkeypatch.delenv("SERVER_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"SERVER_KEYS: that variable is not set"):
        key_hashes(ServeConfig(api_keys_env="SERVER_KEYS"))


# --- Size, name, time ------------------------------------------------------------


def test_a_body_that_is_too_large_is_not_read(service: Service) -> None:
    small = service.configured(max_request_bytes=2000)
    assert send(small, CHAT, json=HELLO[CHAT]).status_code == 200

    async def without_length() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    for content in (b" " * 3000, without_length()):
        headers = {"Content-Type": "application/json"}
        response = send(small, CHAT, content=content, headers=headers)
        assert response.status_code == 413
        assert "longer than 2000 bytes" in response.json()["error"]["message"]


def test_a_request_keeps_its_name(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("ray.serve")
    # Once Ray Serve is imported, its logger hands nothing on to the root's handlers.
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="ray.serve")
    headers = {"X-Request-ID": "trace-7"}
    response = send(service, CHAT, json={**HELLO[CHAT], "n": 0}, headers=headers)
    logger.removeHandler(caplog.handler)
    assert response.headers["x-request-id"] == "trace-7"
    (line,) = {one.message for one in caplog.records if "trace-7" in one.message}
    assert '"status": 400' in line
    for bad in ("", "two words", "x" * 200):
        headers = {"X-Request-ID": bad}
        response = send(service, CHAT, json=HELLO[CHAT], headers=headers)
        assert len(response.headers["x-request-id"]) == 32, "one of the server's own"


# --- Metrics ---------------------------------------------------------------------


def values(service: Service) -> dict[str, float]:
    text = service.run(service.client.get("/metrics")).text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {
        name.replace('model_name="tiny"', "").replace("{}", ""): float(v) for name, _, v in lines
    }


def test_requests_are_counted(service: Service) -> None:
    fresh = service.configured()
    fresh.answer(CHAT)
    fresh.answer(TEXT, n=2)
    assert fresh.call(TEXT, max_tokens=10_000).status_code == 400
    found = values(fresh)
    assert found["vllm:generation_tokens_total"] == 18
    assert found["vllm:time_to_first_token_seconds_count"] == 3
    # The first token is none of them.
    assert found["vllm:inter_token_latency_seconds_count"] == 15
    assert found["vllm:e2e_request_latency_seconds_count"] == 3
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    # No head, no drafts.
    assert found["vllm:spec_decode_num_drafts_total"] == 0
    assert any("aerie:request_refused_total" in name and '"400"' in name for name in found)


def test_a_client_may_ask_so_often(service: Service) -> None:
    keys = [f"key {number}" for number in range(2)]
    hashes = tuple(map(key_hash, keys))
    limited = service.configured(api_keys=hashes, requests_per_minute=3)

    def ask(key: str, path: str = "/v1/models") -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return limited.run(limited.client.get(path, headers=headers))

    assert [ask(keys[0]).status_code for _ in range(4)] == [200, 200, 200, 429]
    refused = ask(keys[0])
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["Retry-After"]) <= 20
    # The same key, however it is written.
    for written in ("bearer {}", "BEARER   {}", "Bearer {} "):
        headers = {"Authorization": written.format(keys[0])}
        response = limited.run(limited.client.get("/v1/models", headers=headers))
        assert response.status_code == 429, written
    assert ask(keys[1]).status_code == 200
    assert ask("unknown").status_code == 401
    assert ask(keys[0], "/health").status_code == 200
    by_address = service.configured(requests_per_minute=1)
    statuses = [by_address.call("/tokenize").status_code for _ in range(2)]
    assert statuses == [200, 429]
