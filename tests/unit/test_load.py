"""core.runtime.load: a client, ways to ask, and what comes of it, against a real application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.config import Config, LoadConfig, load_config
from core.errors import ConfigError, InputError
from core.runtime.load.autoscaling import _otherwise, autoscaling
from core.runtime.load.client import Client, Question, Reply
from core.runtime.load.drive import Questions, closed_loop, lasting, open_loop
from core.runtime.load.equality import check_equality
from core.runtime.load.figures import figures
from core.runtime.load.prompts import load_prompts
from core.runtime.load.servers import free_port
from core.runtime.load.soak import _drifts, _spread
from serve.keys import key_hash
from tests.in_process import Service, in_process, listening

TOKENS = 12
PROMPT = "Hello!"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with in_process(tmp_path_factory.mktemp("load")) as service:
        yield service


def ask(url: str, *questions: Question) -> list[Reply]:
    async def work() -> list[Reply]:
        async with Client(url, "tiny") as client:
            return list(await asyncio.gather(*(client.ask(one) for one in questions)))

    return asyncio.run(work())


def reply(**changes: Any) -> Reply:
    values = {"began": 0.0, "seconds": 1.0, "status": 200, "tokens": 10, "text": "x"}
    question = Question(changes.pop("prompt", PROMPT), TOKENS)
    return Reply(question, **{**values, **changes})


def test_an_answer_is_the_same_whole_and_streamed(service: Service) -> None:
    with listening(service) as url:
        streamed, whole = ask(url, Question(PROMPT, TOKENS), Question(PROMPT, TOKENS, stream=False))
    for one in (streamed, whole):
        assert (one.status, one.error, one.tokens) == (200, None, TOKENS)
    assert streamed.text == whole.text != ""
    assert streamed.first_token_s is not None and streamed.first_token_s <= streamed.seconds
    assert whole.first_token_s is None


def test_what_goes_wrong_is_in_the_reply(service: Service) -> None:
    with listening(service.configured(api_keys=(key_hash("secret"),))) as url:
        (refused,) = ask(url, Question(PROMPT, TOKENS))
    assert refused.status == 401 and refused.failed and "no valid API key" in (refused.error or "")
    (lost,) = ask(f"http://127.0.0.1:{free_port()}", Question(PROMPT, TOKENS))
    assert lost.status == 0 and lost.failed and "ConnectError" in (lost.error or "")


def test_clients_ask_one_after_the_other_and_rates_wait_for_nobody(service: Service) -> None:
    async def work(url: str) -> tuple[list[Reply], list[Reply]]:
        questions = Questions([PROMPT, "And then?"], 3)
        async with Client(url, "tiny") as client:
            seen: list[Reply] = []
            closed = await closed_loop(client, questions, 3, lambda: len(seen) < 9, seen.append)
            assert closed == seen
            return closed, await open_loop(client, questions, 20.0, 0.5)

    with listening(service) as url:
        closed, opened = asyncio.run(work(url))
    # Those at work when the ninth came are waited for.
    assert 9 <= len(closed) <= 11
    assert len(opened) == 10
    assert {one.question.prompt for one in closed} == {PROMPT, "And then?"}
    assert {one.question.stream for one in closed} == {True, False}
    assert not any(one.error for one in (*closed, *opened))
    begins = sorted(one.began for one in opened)
    assert begins[-1] - begins[0] >= 0.4, "a twentieth of a second apart, or more"


def test_figures_count_what_was_refused_apart_from_what_failed() -> None:
    found = figures(
        [
            reply(began=0, seconds=2, first_token_s=0.5),
            reply(began=1, seconds=3),
            reply(began=2, seconds=0.1, status=429, error="busy", tokens=0),
            reply(began=2, seconds=0.3, status=500, error="broken", tokens=0),
        ]
    )
    assert [found[name] for name in ("requests", "answered", "refused", "failed")] == [4, 2, 1, 1]
    assert found["failures"] == {"500: broken": 1}
    assert found["tokens_per_second"] == 20 / 4
    assert found["latency_p50_s"] == 2.5 and found["latency_max_s"] == 3
    assert found["first_token_p50_s"] == 0.5
    assert found["refusal_p95_s"] == 0.1
    assert figures([])["latency_p50_s"] is None


def test_answers_are_held_against_the_target_alone(service: Service) -> None:
    with listening(service) as url:
        prompts = (PROMPT, "Tell me more.", "Why?")
        good = ask(url, *(Question(prompt, TOKENS) for prompt in prompts))
    first = good[0].text
    wrong = Reply(good[0].question, 0, 1, 200, text=first[:3] + "#" + first[4:])
    found = check_equality(service.config, [wrong, *good[1:]], threads=1)
    assert (found["total"], found["identical"], found["near_tie"]) == (3, 2, 0)
    (difference,) = found["differences"]
    assert (difference["served"], difference["plain"]) == (wrong.text, first)
    assert difference["gap"] > 1e-4


def test_prompts_are_read_once_each_and_not_too_long(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(text) + "\n" for text in ("a", "b" * 50, "a", "c")))
    config = LoadConfig(prompts=str(file), max_prompt_characters=10)
    assert load_prompts(config) == ["a", "c"]
    file.write_text('"long"\n')
    with pytest.raises(InputError, match=r"load\.max_prompt_characters=1; raise it"):
        load_prompts(config.model_copy(update={"max_prompt_characters": 1}))


def test_sharegpts_questions_are_there(sharegpt_path: Path) -> None:
    found = load_prompts(LoadConfig())
    assert len(found) > 500 and len(set(found)) == len(found)


def test_memory_is_compared_by_medians_of_the_ends() -> None:
    memory = [{"seconds": n, "proxy": 100.0 + n, "ingress": 50.0} for n in range(20)]
    found = _drifts(memory)
    assert found["proxy"]["first_mb"] == 100.5 and found["proxy"]["last_mb"] == 118.5
    assert found["ingress"]["drift"] == 0
    assert found["all together"]["drift"] == pytest.approx(18 / 150.5)


def test_a_sample_is_of_different_questions_spread_over_the_time() -> None:
    replies = [reply(prompt=f"{n % 50}", began=float(n)) for n in range(100)]
    replies.append(reply(prompt="failed", began=100.0, error="no"))
    chosen = _spread(replies, 10)
    assert [int(one.question.prompt) for one in chosen] == list(range(0, 50, 5))
    assert len(_spread(replies, 80)) == 50, "there are no more questions"
    assert _spread(replies, 0) == []


def test_policies_disagree_where_they_do_for_two_seconds() -> None:
    def decision(time: float, wanted: int, default: int) -> dict[str, Any]:
        more = {"requests": time, "backlog_s": 9.0}
        return {"at_s": time, "wanted": wanted, "serve_default": default, **more}

    decisions = [
        decision(10, 1, 1),
        *(decision(at, 2 + at % 2, 1) for at in (11, 12, 13)),
        # Above what there may be, both mean three.
        decision(14, 5, 4),
        decision(15, 1, 2),
        decision(16, 1, 1),
    ]
    (found,) = _otherwise(decisions, 3)
    assert (found["from_s"], found["to_s"], found["requests"]) == (11, 13, 13)
    assert (found["wanted"], found["serve_default"]) == (3, 1)


def test_a_profile_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs load\.profile"):
        asyncio.run(autoscaling(Config(), [PROMPT], tmp_path))


@pytest.mark.parametrize("name", ["load_autoscaling.yaml", "load_smollm2.yaml"])
def test_the_configurations_are_of_a_load_test(name: str) -> None:
    config = load_config(str(Path(__file__).parents[2] / "configs" / name), [])
    assert config.load.name in ("autoscaling", "soak")
    assert config.convert.source is not None


def test_time_passes() -> None:
    assert lasting(60)() and not lasting(0)()
