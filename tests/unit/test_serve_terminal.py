"""serve.chat: what the terminal chat makes of what is no answer."""

from __future__ import annotations

import httpx
import pytest

from serve import chat

PROXY = "<html><body>502\n  Bad Gateway</body></html>"


def client(response: httpx.Response) -> httpx.Client:
    transport = httpx.MockTransport(lambda request: response)
    return httpx.Client(transport=transport, base_url="http://test")


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (httpx.Response(400, json={"error": {"message": "too long"}}), "^too long$"),
        (httpx.Response(502, text=PROXY), "^502 Bad Gateway: <html><body>502 Bad Gateway"),
        (httpx.Response(404, text="Path '/v1' not found."), "^404 Not Found: Path '/v1'"),
        (httpx.Response(503), "^503 Service Unavailable: no reason is given$"),
        (httpx.Response(500, json={"error": "a text"}), '^500 Internal Server Error: {"error"'),
        (httpx.Response(500, json=["a list"]), "^500 Internal Server Error"),
    ],
)
def test_a_refusal_is_one_line(response: httpx.Response, said: str) -> None:
    talk = chat.Chat(client(response), "tiny", {})
    with pytest.raises(httpx.HTTPError, match=said):
        list(talk.ask("Hello!"))
    assert talk.messages == []


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(200, json={"data": []}),
        httpx.Response(200, json=[]),
        httpx.Response(502, text=PROXY),
    ],
)
def test_what_is_no_server_is_said(
    response: httpx.Response, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = client(response)
    monkeypatch.setattr(httpx, "Client", lambda **settings: made)
    assert chat.main([]) == 1
    assert "no server at http://127.0.0.1:8000" in capsys.readouterr().err
