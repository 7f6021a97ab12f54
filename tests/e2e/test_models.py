"""Several models behind one address: heads, adapters and replicas of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from playwright.sync_api import BrowserContext, expect

from core.config import Config, FinetuneConfig
from core.models.adapters import load_for_training, save_adapters
from tests.e2e.browsing import limit_answers, needs_chromium, send, tab_to
from tests.e2e.serving import (
    ADMIN_KEY,
    PROMPTS,
    ROOT,
    Served,
    expected_text,
    make_models,
    one_thread,
    serving,
)

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.slow]

NUM_TOKENS = 24
TIMEOUT_S = 120.0


def make_adapter(config: Config, folder: Path) -> Path:
    """Adapters that change what the target says; as long as it, answers do not end."""
    target, finetune = Path(config.target.path or ""), FinetuneConfig(method="lora", rank=4)
    with one_thread():
        model = load_for_training(target, finetune, torch.float32)
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    weights = {n: w + 0.05 if "lora_B" in n else w for n, w in weights.items()}
    save_adapters(folder, weights, finetune, target, str(target))
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The tiny model with its head, without one, and with adapters."""
    folder = tmp_path_factory.mktemp("models")
    config = make_models(folder)
    adapter = make_adapter(config, folder / "adapter")
    models = {
        "tiny": None,
        "team/plain": {"draft": {"path": None}, "decode": {"total_tokens": "auto"}},
        "adapted": {"target": {"adapter": str(adapter)}, "decode": {"total_tokens": 4}},
    }
    config = config.replace(
        serve={"models": models, "model_name": "aerie", "cpus_per_replica": 0.5}
    )
    with serving(config, folder) as served:
        yield served


def ask(served: Served, model: str, prompt: str) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": NUM_TOKENS,
        "aerie": {"spans": True},
    }
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
    return answer.raise_for_status().json()


def text_of(body: dict[str, Any]) -> str:
    text: str = body["choices"][0]["message"]["content"]
    return text


def test_each_says_what_its_own_target_does(several: Served) -> None:
    with one_thread():
        models = several.config.served_models()
        wanted = {
            name: [expected_text(one.target, prompt, NUM_TOKENS) for prompt in PROMPTS]
            for name, one in models.items()
        }
    assert wanted["tiny"] == wanted["team/plain"] != wanted["adapted"]
    for name in models:
        assert [text_of(ask(several, name, prompt)) for prompt in PROMPTS] == wanted[name]


def test_each_drafts_with_its_own_head(several: Served) -> None:
    lengths = {
        name: ask(several, name, PROMPTS[0])["aerie"]["accepted_length"]
        for name in several.config.served_models()
    }
    assert lengths["tiny"] > lengths["team/plain"] == 1


def test_all_are_listed_counted_and_healthy(several: Served) -> None:
    names = list(several.config.served_models())
    listed = httpx.get(f"{several.url}/v1/models", timeout=TIMEOUT_S).json()
    assert [one["id"] for one in listed["data"]] == names == ["tiny", "team/plain", "adapted"]
    health = httpx.get(f"{several.url}/health", timeout=TIMEOUT_S).json()
    assert health["status"] == "ok" and health["replicas"] == 3
    assert {name: one["replicas"] for name, one in health["models"].items()} == dict.fromkeys(
        names, 1
    )
    metrics = httpx.get(f"{several.url}/metrics", timeout=TIMEOUT_S).text
    assert set(re.findall(r'^vllm:num_requests_running\{model_name="(.*?)"\}', metrics, re.M)) == (
        set(names)
    )


def test_the_desk_of_a_model_is_asked_by_its_name(several: Served) -> None:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    paths = {
        name: httpx.get(
            f"{several.url}/admin/draft", params={"model": name}, headers=headers, timeout=TIMEOUT_S
        ).json()["current"]["path"]
        for name in several.config.served_models()
    }
    head = several.config.draft.path
    assert paths == {"tiny": head, "team/plain": None, "adapted": head}


@needs_chromium
@pytest.mark.browser
def test_the_page_has_them_to_choose_from(several: Served, browser: BrowserContext) -> None:
    page = browser.new_page()
    page.goto(several.url)
    expect(page.locator("#model")).to_have_text("tiny")
    tab_to(page, "Settings")
    page.keyboard.press("Enter")
    tab_to(page, "Model")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#model")).to_have_text("adapted")
    limit_answers(page, NUM_TOKENS)
    send(page, PROMPTS[0])
    expect(page.locator("#status")).to_contain_text("The answer is complete")
    wanted = text_of(ask(several, "adapted", PROMPTS[0]))
    assert page.locator(".turn.assistant .body").text_content() == wanted
    page.close()


@pytest.mark.parametrize(("name", "code"), [("adapted", 0), ("no", 1)])
def test_the_terminal_talks_to_the_one_that_is_named(several: Served, name: str, code: int) -> None:
    command = [sys.executable, "-m", "serve.chat", "--url", several.url, "--name", name]
    command += ["--max-tokens", str(NUM_TOKENS)]
    done = subprocess.run(
        command, input=f"{PROMPTS[0]}\n/quit\n", cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code
    if code:
        assert "--name no" in done.stderr and "tiny, team/plain, adapted" in done.stderr
    else:
        assert f"adapted at {several.url}" in done.stdout.replace("\n", "")
