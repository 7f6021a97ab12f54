"""evaluate_draft as a job: prompts dealt out to replicas, on one node and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from core.config import Config
from core.runtime.job import run_stage
from jobs.evaluate_draft import JOB

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SMALL = {"include_dashboard": False, "object_store_memory": 80_000_000}
QUESTIONS = [
    {"question_id": n, "category": kind, "turns": [f"Question {n}? Question {n}?", "And then?"]}
    for n, kind in enumerate(["writing", "summarization", "math", "summarization", "qa"])
]
NAMES = {f"{one['category']}/{one['question_id']}/{turn}" for one in QUESTIONS for turn in (1, 2)}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_target_folder: Path) -> Config:
    """Without a head: copies are what is drafted."""
    prompts = tmp_path_factory.mktemp("prompts") / "question.jsonl"
    prompts.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    return Config().replace(
        target={"path": str(tiny_target_folder), "dtype": "float32"},
        decode={"ngram_match": 1, "total_tokens": 8, "max_context": 512, "cache_tokens": 2048},
        eval={
            "prompts": str(prompts),
            "max_new_tokens": 12,
            "fixed_total_tokens": [4],
            "hf_generate_prompts": 1,
            "batch_sizes": [2],
            "num_replicas": 2,
            "cpus": 1.0,
        },
    )


def _run(config: Config, output: Path, nodes: int) -> dict[str, Any]:
    """On a cluster of two CPUs, of one node or of two."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    for _ in range(nodes):
        cluster.add_node(num_cpus=2 // nodes, object_store_memory=80_000_000)
    ray.init(address=cluster.address, logging_level="warning")
    try:
        cluster.wait_for_nodes()
        config = config.replace(output=str(output), cluster={"address": cluster.address})
        return dict(run_stage(JOB, config))
    finally:
        ray.shutdown()
        cluster.shutdown()


def _answers(output: Path) -> dict[str, dict[str, Any]]:
    lines = (output / "outputs.jsonl").read_text("utf-8").split("\n")[:-1]
    return {values["id"]: values["answers"] for values in map(json.loads, lines)}


@pytest.fixture(scope="module")
def shared(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shared") / "out"
    _run(config, output, nodes=1)
    return output


def test_replicas_that_share_a_node_leave_speed_out(shared: Path) -> None:
    report = json.loads((shared / "report.json").read_text())
    overall = report["overall"]
    assert (overall["prompts"], overall["timed_prompts"]) == (10, 0)
    assert overall["speedup"] is None and overall["ways"]["chosen"]["accepted_length"] >= 1
    assert overall["lossless_identical"] == overall["lossless_total"] == 20
    assert set(_answers(shared)) == NAMES
    (batch,) = report["batches"]
    # The first replica is alone again.
    assert batch["speedup"] > 0 and batch["lossless_identical"] == batch["lossless_total"] > 0
    page = (shared / "report.html").read_text()
    assert "10 prompts were answered by replicas" in page and "2 at a time" in page


def test_replicas_with_a_node_each_are_timed_and_answer_alike(
    config: Config, shared: Path, tmp_path: Path
) -> None:
    report = _run(config, tmp_path / "out", nodes=2)
    overall = report["overall"]
    assert overall["timed_prompts"] == 10 and overall["speedup"] > 0
    assert overall["speedup_interval"] is not None
    ours, theirs = _answers(tmp_path / "out"), _answers(shared)
    assert {
        name: {way: [one["token_ids"] for one in found] for way, found in answers.items()}
        for name, answers in ours.items()
    } == {
        name: {way: [one["token_ids"] for one in found] for way, found in answers.items()}
        for name, answers in theirs.items()
    }
