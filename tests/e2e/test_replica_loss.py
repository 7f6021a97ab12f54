"""A decoder replica is killed while it answers: the other one finishes what it had begun."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from core.models.target import load_target
from tests.e2e.serving import PROMPTS, Served, greedy_answer, make_models, one_thread, serving

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow]

NUM_TOKENS = 300
REPLICA = "ray::ServeReplica:aerie:Decoder"
# The replica that is left answers all, beside the start of a new one.
TIMEOUT_S = 180.0


def replicas_of(parent: psutil.Process) -> list[int]:
    """Process ids of the decoder replicas that some process started."""
    found = []
    for process in parent.children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(REPLICA):
                found.append(process.pid)
        except psutil.Error:
            continue  # it has ended meanwhile
    return found


def ask(served: Served, prompt: str, begun: threading.Event, stream: bool) -> str:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
    ) as client:
        answer: Any = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=NUM_TOKENS,
            stream=stream,
        )
        if not stream:
            return str(answer.choices[0].message.content)
        text = ""
        for chunk in answer:
            text += chunk.choices[0].delta.content or ""
            if text:
                begun.set()
        return text


def test_every_answer_is_whole_though_replicas_are_killed(tmp_path: Path) -> None:
    config = make_models(tmp_path)
    config = config.replace(serve={"replicas": 2, "max_replicas": 2})
    with one_thread():
        target = load_target(config.target)
        wanted = {
            prompt: target.tokenizer.decode(
                greedy_answer(target, prompt, NUM_TOKENS), skip_special_tokens=True
            )
            for prompt in PROMPTS
        }
    with serving(config, tmp_path) as served, ThreadPoolExecutor(12) as threads:
        for number in range(2):
            begun = threading.Event()
            replicas = replicas_of(psutil.Process())
            assert len(replicas) == 2
            answers = [
                (prompt, threads.submit(ask, served, prompt, begun, stream))
                for prompt in PROMPTS
                for stream in (False, True, False, True)
            ]
            assert begun.wait(TIMEOUT_S)
            os.kill(replicas[number], signal.SIGKILL)
            for prompt, answer in answers:
                assert answer.result(TIMEOUT_S) == wanted[prompt]
            wait_for_replicas(served, replicas[number])
        counted = httpx.get(f"{served.url}/metrics").text
    line = next(one for one in counted.splitlines() if one.startswith("aerie:request_restarted_t"))
    assert float(line.rpartition(" ")[2]) > 0, "the killed replica had answers in work"


def wait_for_replicas(served: Served, killed: int) -> None:
    """Until the one that was killed has been replaced."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        alive = replicas_of(psutil.Process())
        health = httpx.get(f"{served.url}/health").json()
        if killed not in alive and len(alive) == 2 and health["replicas"] == 2:
            return
        time.sleep(0.5)
    pytest.fail("the killed replica was not replaced")
