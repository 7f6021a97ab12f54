"""SmolLM2 served by vLLM behind Aerie's own HTTP, with the published draft head.

AERIE_VLLM_PYTHON=/opt/vllm/bin/python make soak ARGS="tests/e2e/test_vllm.py"
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest

from core.config import load_config
from core.decode.engine import SpeculativeDecoder
from core.models.target import load_target
from core.runtime.conversion import with_converted_target
from tests.e2e.serving import ROOT, Served, one_thread, prompt_ids, serving

VARIABLE = "AERIE_VLLM_PYTHON"
PYTHON = os.environ.get(VARIABLE, "")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.soak,
    pytest.mark.skipif(
        not PYTHON, reason=f"{VARIABLE} names no Python of an environment with vLLM"
    ),
]
MODEL = "smollm2-135m-instruct"
QUESTION = "How do bees find their way home?"
NUM_TOKENS = 20
# Until another replica has started, on a busy machine.
TIMEOUT_S = 600.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # Whoever has the target already may name it.
    overrides = [
        "serve.backend=vllm",
        f"serve.vllm_python={PYTHON}",
        "decode.depth=2",
        "decode.cache_tokens=4096",
        *(f"target.path={path}" for path in [os.environ.get("AERIE_SMOLLM2")] if path),
    ]
    config = load_config(str(ROOT / "configs" / "serve_smollm2.yaml"), overrides)
    with serving(with_converted_target(config), tmp_path_factory.mktemp("vllm")) as served:
        yield served
        last = servers(served)
    assert last and not any(one.is_running() for one in last), "vLLM outlives the service"


@pytest.fixture(scope="module")
def wanted(served: Served) -> str:
    """The target's own greedy answer, by Aerie."""
    with one_thread():
        target = load_target(served.config.target)
        decoder = SpeculativeDecoder(target, None, served.config.decode)
        rounds = decoder.generate(prompt_ids(target, QUESTION), max_new_tokens=NUM_TOKENS)
        tokens = [token for one in rounds for token in one.tokens]
        return str(target.tokenizer.decode(tokens, skip_special_tokens=True))


def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=TIMEOUT_S)


def ask(served: Served, **settings: object) -> openai.types.chat.ChatCompletion:
    return client(served).chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=NUM_TOKENS,
        **settings,
    )


def servers(served: Served) -> list[psutil.Process]:
    """vLLM's own, below the decoder replicas."""
    return [
        process
        for process in psutil.Process(served.server.process.pid).children(recursive=True)
        if "vllm.entrypoints.openai.api_server" in process.cmdline()
        and not any("supervisor.py" in word for word in process.cmdline())
    ]


def test_the_text_is_the_targets_own(served: Served, wanted: str) -> None:
    answer = ask(served, extra_body={"aerie": {"spans": True}})
    assert answer.choices[0].message.content == wanted
    assert answer.usage is not None and answer.usage.completion_tokens == NUM_TOKENS
    figures = (answer.model_extra or {})["aerie"]
    assert figures["accepted_length"] >= 1 and figures["rounds"] < NUM_TOKENS
    assert "seconds" not in figures, "vLLM does not tell them"
    spans = (answer.choices[0].model_extra or {})["aerie"]["spans"]
    assert "".join(text for text, _ in spans) == wanted
    assert {guessed for _, guessed in spans} == {None}


def test_a_stream_and_its_logprobs(served: Served, wanted: str) -> None:
    stream = client(served).chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=NUM_TOKENS,
        logprobs=True,
        top_logprobs=2,
        stream=True,
    )
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == wanted
    told = [token for one in chunks if one.logprobs for token in one.logprobs.content or []]
    assert len(told) == NUM_TOKENS
    assert all(len(token.top_logprobs) == 2 for token in told)


def test_drafts_are_counted_under_vllms_names(served: Served) -> None:
    ask(served)
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    (drafts,) = (one for one in lines if one.startswith("vllm:spec_decode_num_drafts_total{"))
    assert float(drafts.rpartition(" ")[2]) > 0


def test_what_it_cannot_do_is_refused_by_name(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, temperature=0.7)
    assert caught.value.param == "temperature"


def test_when_its_server_is_killed_another_replica_answers(served: Served, wanted: str) -> None:
    async def work() -> openai.types.chat.ChatCompletion:
        asking = asyncio.create_task(asyncio.to_thread(ask, served))
        (server,) = servers(served)
        below = [server, *server.children(recursive=True)]
        await asyncio.sleep(0.5)
        server.kill()
        deadline = time.monotonic() + TIMEOUT_S
        while any(one.is_running() and one.status() != "zombie" for one in below):
            assert time.monotonic() < deadline, "it left something behind"
            await asyncio.sleep(0.2)
        return await asking

    assert asyncio.run(work()).choices[0].message.content == wanted
