"""regenerate_responses as a job: whose words it writes, what it goes on with, what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from core.config import GenerateConfig
from core.data.conversations import Conversation, Message
from core.data.formats import read_record
from core.data.template import encode_prompt
from core.decode.answering import Answerer
from core.models.target import Target
from jobs.regenerate_responses import main

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
MAX_NEW_TOKENS = 24
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "conversations.json"
    records = [
        {
            "id": f"c{number}",
            "conversations": [
                turn
                for question in range(1 + number % 3)
                for turn in (
                    {"from": "human", "value": f"Question {question} of {number}" + "?" * number},
                    {"from": "gpt", "value": "Somebody else's answer."},
                )
            ],
        }
        for number in range(24)
    ]
    path.write_text(json.dumps(records))
    return path


def _arguments(target: Path, output: Path, *more: str) -> list[str]:
    # Random weights seldom end a turn, so cut answers are kept; bytes need not be UTF-8.
    return [
        f"target.path={target}",
        f"output={output}",
        "target.dtype=float32",
        f"generate.max_new_tokens={MAX_NEW_TOKENS}",
        "generate.shard_conversations=8",
        "generate.batch_size=5",
        *more,
    ]


def _answers(target: Path, data: Path, output: Path, *more: str) -> list[str]:
    given = ("generate.keep_cut=true", f"data.path={data}", "generate.temperature=0")
    return _arguments(target, output, *given, *more)


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None,
    tmp_path_factory: pytest.TempPathFactory,
    conversations: Path,
    tiny_target_folder: Path,
) -> Path:
    """A whole run that nothing disturbed, of two replicas."""
    output = tmp_path_factory.mktemp("answers") / "out"
    assert main(_answers(tiny_target_folder, conversations, output)) == 0
    return output


def _records(output: Path) -> list[dict[str, Any]]:
    lines = (output / "conversations.jsonl").read_text("utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _report(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "report.json").read_text()))


@torch.inference_mode()
def _alone(target: Target, messages: list[Message]) -> str:
    """One greedy answer, without a cache or neighbours."""
    ids = encode_prompt(target.tokenizer, messages)
    new: list[int] = []
    while len(new) < MAX_NEW_TOKENS:
        token = int(target.model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in target.eos_token_ids:
            break
        new.append(token)
    return str(target.tokenizer.decode(new, skip_special_tokens=True)).strip()


def test_answers_are_the_targets_own_each_on_top_of_those_before(
    finished: Path, tiny_target: Target
) -> None:
    records = _records(finished)
    assert len(records) == 24
    answers = 0
    for record in records:
        messages: list[Message] = []
        for asked, answered in zip(*[iter(record["conversations"])] * 2, strict=True):
            assert (asked["from"], answered["from"]) == ("human", "gpt")
            messages.append(Message("user", asked["value"]))
            assert answered["value"] == _alone(tiny_target, messages)
            messages.append(Message("assistant", answered["value"]))
            answers += 1
    report = _report(finished)
    assert report["answers"] == answers == 48
    assert report["conversations"] == report["conversations_in"] == 24
    assert (report["shards"], report["replicas"]) == (3, 2)
    assert report["cut_share"] == report["cut"] / report["generated"]
    assert report["generated"] == answers + report["empty"]
    assert report["tokens_per_second"] > 0


def test_what_is_written_is_what_prepare_data_reads(finished: Path) -> None:
    read = [read_record(record, "source") for record in _records(finished)]
    assert len(read) == 24
    assert {name for name, _ in read} == {"sharegpt"}


def test_a_missing_shard_is_made_alone_by_one_replica(
    finished: Path,
    conversations: Path,
    tiny_target_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = (finished / "conversations.jsonl").read_bytes()
    times = {p.name: p.stat().st_mtime_ns for p in (finished / "shards").glob("*.jsonl")}
    (finished / "shards" / "shard-00001.jsonl").unlink()
    for name in ("report.json", "conversations.jsonl"):
        (finished / name).unlink()
    again = _answers(tiny_target_folder, conversations, finished, "generate.num_replicas=1")
    assert main(again) == 0
    assert "2 of 3 answered shards were finished before" in capsys.readouterr().out
    assert (finished / "conversations.jsonl").read_bytes() == whole
    after = {p.name: p.stat().st_mtime_ns for p in (finished / "shards").glob("*.jsonl")}
    assert [name for name in times if times[name] != after[name]] == ["shard-00001.jsonl"]


@pytest.mark.soak
def test_a_killed_run_goes_on_to_the_same_bytes(
    finished: Path, conversations: Path, tiny_target_folder: Path, tmp_path: Path
) -> None:
    """In smaller shards, too: what is answered together must not matter."""
    output = tmp_path / "out"
    arguments = _answers(
        tiny_target_folder, conversations, output, "generate.shard_conversations=2"
    )
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "jobs.regenerate_responses", *arguments]
    with (tmp_path / "driver.log").open("w") as log:
        driver = subprocess.Popen(
            [*command, f"cluster.address={address}"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not list((output / "shards").glob("*.json")):
                assert driver.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    assert not (output / "report.json").exists(), "the kill came too late to show anything"
    assert main(arguments) == 0
    contents = [(folder / "conversations.jsonl").read_bytes() for folder in (finished, output)]
    assert contents[0] == contents[1]


def test_prompts_are_made_up_filtered_and_answered(
    ray_cluster: None, tiny_target_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    made_up = (
        "generate.synthesize=40",
        "generate.keep_cut=true",
        "generate.min_prompt_words=1",
        "generate.max_prompt_tokens=300",
        "generate.shard_conversations=20",
    )
    arguments = _arguments(tiny_target_folder, output, *made_up)
    # Nonsense of random weights: what matters is that each stage gets what the one before kept.
    code = main(arguments)
    said = capsys.readouterr()
    texts = [
        json.loads(line)
        for path in sorted((output / "prompts").glob("*.jsonl"))
        for line in path.read_text("utf-8").split("\n")[:-1]
    ]
    assert [record["id"] for record in texts] == [f"synthetic-{n:07d}" for n in range(40)]
    assert len({record["text"] for record in texts}) > 30
    if code:
        assert "none of 40 made-up prompts is of use" in said.err
        return
    report = _report(output)
    synthesis = report["synthesis"]
    assert synthesis["kept"] + sum(synthesis["dropped"].values()) == synthesis["prompts"] == 40
    assert report["conversations_in"] == synthesis["kept"]
    given = {record["id"]: record["text"] for record in texts}
    for record in _records(output):
        asked, _ = record["conversations"]
        assert asked["value"] in given[record["id"]]


def test_inspect_prints_both_sides(
    finished: Path,
    conversations: Path,
    tiny_target_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*_answers(tiny_target_folder, conversations, finished), "--inspect", "1"]) == 0
    printed = capsys.readouterr().out
    record = _records(finished)[0]
    assert record["id"] in printed and f"human: {record['conversations'][0]['value']}" in printed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "data.path is not set; give"),
        (["generate.synthesize=5", "data.path=x.json"], "leave one of them out"),
        (["data.path=x.json", "data.max_length=24"], "leaves no room for a prompt"),
    ],
)
def test_settings_that_exclude_each_other(
    tiny_target_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    said: str,
) -> None:
    assert main([*_arguments(tiny_target_folder, tmp_path / "out"), *given]) == 2
    assert said in capsys.readouterr().err


def test_turns_without_an_answer_end_their_conversation(tiny_target: Target) -> None:
    """Here all answers are cut, or there is no room for the second question."""
    turns = (Message("user", "One?"), Message("assistant", "x"), Message("user", "Two?" * 30))
    asked = [Conversation("c", turns, "test")]
    config = GenerateConfig(temperature=0, max_new_tokens=4, batch_size=2)
    cut = Answerer(tiny_target, config, context=400)
    assert cut.answer(asked) == []
    assert cut.counts == {"generated": 1, "cut": 1}
    config = GenerateConfig(temperature=0, max_new_tokens=4, batch_size=2, keep_cut=True)
    short = Answerer(tiny_target, config, context=80)
    (kept,) = short.answer(asked)
    assert [message.role for message in kept.messages] == ["user", "assistant"]
    assert kept.messages[0] == turns[0] and kept.messages[1] != turns[1]
    assert short.counts["no_room"] == 1
