"""The HTTP service on Ray Serve, as the OpenAI client, curl and `aerie chat` use it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from core.models.target import Target, load_target
from tests.descriptions import parsed_answer
from tests.e2e.serving import (
    ADMIN_KEY,
    MAX_CONTEXT,
    PROMPTS,
    ROOT,
    Served,
    greedy_answer,
    one_thread,
    prompt_ids,
)

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow]

NUM_TOKENS = 48
CHAT = "/v1/chat/completions"
# Far above what any answer here takes, far below the answers that are given up.
TIMEOUT_S = 60.0
# More than half of the cache.
ENDLESS = 50_000
HALF_A_SURROGATE_PAIR = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'


@dataclass(frozen=True)
class Expected:
    """What the target alone answers to a prompt."""

    prompt_tokens: int
    text: str


@pytest.fixture(scope="module")
def expected(served: Served) -> dict[str, Expected]:
    with one_thread():
        target = load_target(served.config.target)
        return {prompt: expected_answer(target, prompt) for prompt in PROMPTS}


def expected_answer(target: Target, prompt: str) -> Expected:
    tokens = greedy_answer(target, prompt, NUM_TOKENS)
    text = target.tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str)
    return Expected(len(prompt_ids(target, prompt)), text)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
    ) as client:
        yield client


def create(
    client: openai.OpenAI | openai.AsyncOpenAI, prompt: str = PROMPTS[0], **settings: Any
) -> Any:
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": prompt}],
        **{"max_tokens": NUM_TOKENS, **settings},
    )


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def test_it_says_what_it_serves(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    assert httpx.get(f"{served.url}/health").json() == {
        "status": "ok",
        "replicas": 1,
        "models": {"tiny": {"status": "ok", "replicas": 1}},
    }


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_whole_and_target_alone_agree(
    client: openai.OpenAI, expected: dict[str, Expected], prompt: str
) -> None:
    whole = create(client, prompt)
    assert whole.choices[0].message.content == expected[prompt].text
    assert whole.choices[0].finish_reason == "length"
    assert text_of(create(client, prompt, stream=True)) == expected[prompt].text


def test_it_answers_as_evaluate_draft_does(
    served: Served, client: openai.OpenAI, tmp_path: Path
) -> None:
    prompts = [
        {"id": prompt, "task": "chat", "messages": [{"role": "user", "content": prompt}]}
        for prompt in PROMPTS
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    settings = {**served.config.model_dump(mode="json"), "output": str(tmp_path / "evaluation")}
    settings["eval"] = {
        "prompts": str(tmp_path / "prompts.jsonl"),
        "max_new_tokens": NUM_TOKENS,
        "fixed_total_tokens": [16],
        "untrained_prompts": 0,
        "hf_generate_prompts": 0,
        "cpus": 1,
    }
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "jobs.evaluate_draft"]
    done = subprocess.run(
        [*command, "--config", str(tmp_path / "evaluate.yaml")],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "evaluation" / "outputs.jsonl").read_text("utf-8").split("\n")[:-1]
    evaluated = {values["id"]: values["text"] for values in map(json.loads, lines)}
    assert evaluated == {p: text_of(create(client, p, stream=True)) for p in PROMPTS}


def test_the_asynchronous_client_waits_and_streams(
    served: Served, expected: dict[str, Expected]
) -> None:
    """All prompts at once, each both ways."""

    async def whole(client: openai.AsyncOpenAI, prompt: str) -> str:
        answer = await create(client, prompt)
        return str(answer.choices[0].message.content)

    async def in_parts(client: openai.AsyncOpenAI, prompt: str) -> str:
        chunks = [chunk async for chunk in await create(client, prompt, stream=True)]
        assert len(chunks) > 2
        return text_of(chunks)

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        ) as client:
            works = [way(client, prompt) for way in (whole, in_parts) for prompt in PROMPTS]
            return await asyncio.gather(*works)

    answers = asyncio.run(all_of_them())
    assert answers == [expected[prompt].text for prompt in PROMPTS] * 2


def test_curl_makes_the_calls_of_tgi_that_the_readme_shows(served: Served) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```sh\n(curl [^`]*/generate_stream[^`]*)```", readme)
    calls = [f"curl {rest}" for rest in script.split("curl ")[1:]]
    answers = []
    for call in calls:
        command = call.replace("http://127.0.0.1:8000", served.url).replace("curl", "curl -sS", 1)
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert (done.returncode, done.stderr) == (0, "")
        answers.append(done.stdout)
    body = json.loads(answers[0])
    parsed_answer("/generate", body)
    tokens = body["details"]["tokens"]
    assert (body["details"]["finish_reason"], len(tokens)) == ("length", 20)

    lines = answers[1].split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data:") for line in lines)
    events = [json.loads(line.removeprefix("data:")) for line in lines]
    for event in events:
        parsed_answer("/generate_stream", event, chunk=True)
    assert [event["token"]["id"] for event in events] == [token["id"] for token in tokens]
    assert [event["generated_text"] for event in events] == [None] * 19 + [body["generated_text"]]


def test_usage(client: openai.OpenAI, expected: dict[str, Expected]) -> None:
    usage = create(client).usage
    assert usage.prompt_tokens == expected[PROMPTS[0]].prompt_tokens
    assert usage.completion_tokens == NUM_TOKENS
    assert usage.total_tokens == usage.prompt_tokens + NUM_TOKENS
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == usage
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_spans_show_what_the_draft_head_guessed(
    client: openai.OpenAI, expected: dict[str, Expected]
) -> None:
    chunks = list(create(client, stream=True, extra_body={"aerie": {"spans": True}}))
    rounds = [c.choices[0].aerie for c in chunks if hasattr(c.choices[0], "aerie")]
    spans = [span for one in rounds for span in one["spans"]]
    assert "".join(text for text, _ in spans) == expected[PROMPTS[0]].text
    assert {drafted for _, drafted in spans} == {True, False}
    assert sum(one["tokens"] for one in rounds) == NUM_TOKENS
    # The prompt's pass drafts nothing.
    assert [one["tree_size"] for one in rounds[:2]] == [0, 16]
    figures = chunks[-1].aerie
    # Each later pass gives at least one token, the head's right guesses more.
    assert figures["rounds"] < NUM_TOKENS - 1
    assert figures["accepted_length"] > 1
    assert figures["tokens_per_second"] > 0

    whole = create(client, extra_body={"aerie": {"spans": True}})
    assert whole.choices[0].aerie["spans"] == spans
    assert whole.aerie["accepted_length"] == figures["accepted_length"]


def test_no_extension_unless_asked_for(client: openai.OpenAI) -> None:
    whole = create(client)
    assert not hasattr(whole, "aerie")
    assert not hasattr(whole.choices[0], "aerie")


def test_a_seed_repeats_a_sampled_answer(
    client: openai.OpenAI, expected: dict[str, Expected]
) -> None:
    def sampled(seed: int) -> str:
        answer = create(client, temperature=1.0, top_p=0.95, seed=seed)
        return str(answer.choices[0].message.content)

    first = sampled(1)
    assert first == sampled(1)
    assert len({first, sampled(2), expected[PROMPTS[0]].text}) == 3


def test_a_stop_string_ends_the_answer(
    client: openai.OpenAI, expected: dict[str, Expected]
) -> None:
    text = expected[PROMPTS[0]].text
    stop = text[10:12]
    for stream in (False, True):
        answer = create(client, stop=["not in there", stop], stream=stream)
        chunks = list(answer) if stream else [answer]
        shown = text_of(chunks) if stream else answer.choices[0].message.content
        assert shown == text[: text.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_several_clients_get_their_own_answers(
    client: openai.OpenAI, expected: dict[str, Expected]
) -> None:
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda p: text_of(create(client, p, stream=True)), PROMPTS * 2))
    assert answers == [expected[prompt].text for prompt in PROMPTS * 2]


@pytest.mark.parametrize(
    ("status", "code", "param", "settings"),
    [
        (404, "model_not_found", "model", {"model": "gpt"}),
        (400, "unsupported_parameter", "tools", {"tools": [{"type": "function"}]}),
        (400, None, "temperature", {"temperature": -1}),
        (400, None, "messages", {"messages": []}),
        (400, None, "top-k", {"extra_body": {"top-k": 5}}),
        (400, "context_length_exceeded", "messages", {"max_tokens": MAX_CONTEXT}),
    ],
)
def test_refusals(
    client: openai.OpenAI, status: int, code: str | None, param: str, settings: dict[str, Any]
) -> None:
    defaults = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(**{**defaults, **settings}, stream=stream)
        assert caught.value.status_code == status
        assert (caught.value.code, caught.value.param) == (code, param)
        assert caught.value.type == "invalid_request_error"


def test_too_long_a_context_names_both_lengths(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, "a" * MAX_CONTEXT)
    message = str(caught.value.body["message"])
    longest, taken, wanted = map(int, re.findall(r"\d+", message))
    assert longest < MAX_CONTEXT < taken
    assert wanted == NUM_TOKENS


@pytest.mark.parametrize(
    ("status", "method", "path", "body"),
    [
        (400, "POST", CHAT, b"{"),
        (400, "POST", CHAT, b"\xff\xfe"),
        (400, "POST", CHAT, b"[" * 100_000),
        (400, "POST", CHAT, b'["a list"]'),
        (400, "POST", CHAT, HALF_A_SURROGATE_PAIR),
        (405, "GET", CHAT, b""),
        (404, "GET", "/v1/nothing", b""),
    ],
)
def test_every_error_has_the_shape_of_openai(
    served: Served, status: int, method: str, path: str, body: bytes
) -> None:
    response = httpx.request(
        method,
        served.url + path,
        content=body,
        headers={"Content-Type": "application/json"},
        timeout=TIMEOUT_S,
    )
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def first_text(stream: Any) -> str:
    """Waits for the decoder: the chunk before is sent without it."""
    return next(text for chunk in stream if (text := chunk.choices[0].delta.content))


def test_a_client_that_leaves_a_stream_frees_the_replica(client: openai.OpenAI) -> None:
    """The cache holds one such answer: the second begins when the first one's rows are free."""
    for _ in range(2):
        stream = create(client, stream=True, max_tokens=ENDLESS)
        assert first_text(stream), "it is decoded, and neither refused nor failed"
        stream.close()


def test_a_client_that_stops_waiting_frees_the_replica(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        create(client, max_tokens=ENDLESS, timeout=1.0)
    stream = create(client, stream=True, max_tokens=ENDLESS)
    assert first_text(stream)
    stream.close()


def test_a_head_is_swapped_under_load(
    served: Served, client: openai.OpenAI, expected: dict[str, Expected], tmp_path: Path
) -> None:
    """Every answer on the way is whole; a bad head changes nothing."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    for copy in (good, bad):
        shutil.copytree(served.config.draft.path or "", copy)
    (bad / "model.safetensors").write_bytes(b"damaged")
    done = threading.Event()

    def answers() -> list[tuple[str, str]]:
        found = []
        while not done.is_set():
            for prompt in PROMPTS:
                found.append((prompt, text_of(create(client, prompt, stream=True))))
        return found

    def bring(folder: Path) -> httpx.Response:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        url = f"{served.url}/admin/draft"
        return httpx.post(url, json={"path": str(folder)}, headers=headers, timeout=TIMEOUT_S)

    with ThreadPoolExecutor(3) as threads:
        running = [threads.submit(answers) for _ in range(3)]
        try:
            refused, promoted = bring(bad), bring(good)
        finally:
            done.set()
        found = [one for answered in running for one in answered.result(TIMEOUT_S)]
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "draft_refused")
    assert (promoted.status_code, promoted.json()["state"]) == (200, "promoted")
    assert len(found) >= 9
    assert all(text == expected[prompt].text for prompt, text in found)


def test_the_controller_hears_how_fast_the_replicas_are(
    served: Served, client: openai.OpenAI
) -> None:
    create(client)
    log = Path(served.config.serve.autoscaling_log or "")
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        last = json.loads(log.read_text().splitlines()[-1])
        if last["tokens_per_second"]:
            break
        assert time.monotonic() < deadline, last
        time.sleep(0.2)
    assert (last["replicas"], last["wanted"], last["serve_default"]) == (1, 1, 1)


def test_the_terminal_chat(served: Served, expected: dict[str, Expected]) -> None:
    command = [sys.executable, "-m", "serve.chat", "--url", served.url]
    chat = subprocess.run(
        [*command, "--max-tokens", str(NUM_TOKENS)],
        input=f"/stats\n{PROMPTS[0]}\n/stats\n/reset\n/quit\n".encode(),
        capture_output=True,
        cwd=ROOT,
        timeout=TIMEOUT_S,
    )
    output = chat.stdout.decode()
    assert chat.returncode == 0, chat.stderr.decode()
    assert "no answer yet" in output
    assert "accepted length" in output
    # The terminal shows control characters in its own way.
    letters = "".join(filter(str.isalpha, expected[PROMPTS[0]].text))
    assert letters in "".join(filter(str.isalpha, output))
