"""Fine-tuning on nodes that are taken away: announced, or done without."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from core.config import Config
from core.runtime.job import run_stage
from core.runtime.workers import FAILURES
from core.tracking import read_json_lines, read_metrics
from jobs.finetune_target import JOB
from tests.killing import PATIENCE_SECONDS, last_step
from tests.tiny_targets import save_tiny, write_tiny_examples

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.soak]

STORE, NOTICE_SECONDS = 80_000_000, 30


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of one CPU each; it sees soon that one is gone."""
    quick = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 20,
    }
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": quick})
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
    ray.init(address=cluster.address, logging_level="warning")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def _config(folder: Path, cluster: Cluster, **train: Any) -> Config:
    target = save_tiny(folder / "target", "llama")
    examples = write_tiny_examples(folder / "examples", examples=40, held_out=4)
    settings = {
        "parallelism": "zero2",
        "num_workers": 2,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "max_length": 20,
        "warmup_steps": 5,
        "epochs": 10_000,
        "eval_every": 100_000,
        **train,
    }
    return Config().replace(
        output=str(folder / "out"),
        target={"path": str(target)},
        data={"examples": str(examples)},
        train=settings,
        tracking={"wandb": "disabled"},
        cluster={"address": cluster.address},
    )


class _Run(threading.Thread):
    """The job, beside what happens to its nodes."""

    def __init__(self, config: Config) -> None:
        super().__init__(daemon=True)
        self.report: dict[str, Any] = {}
        self.output, self._config = Path(str(config.output)), config
        self.start()

    def run(self) -> None:
        self.report = dict(run_stage(JOB, self._config))

    def wait_for(self, what: str, there: Any) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not there():
            assert self.is_alive(), f"the run ended before {what}"
            assert time.monotonic() < deadline, f"no {what} after {PATIENCE_SECONDS} s"
            time.sleep(0.1)


def test_a_run_goes_on_without_a_lost_node(cluster: Cluster, tmp_path: Path) -> None:
    """With one worker, from the last checkpoint, and with the sequences that it would have had."""
    config = _config(tmp_path, cluster, min_workers=1, max_steps=1000, checkpoint_every=50)
    run = _Run(config)
    run.wait_for("step 100", lambda: last_step(run.output) >= 100)
    cluster.remove_node(sorted(cluster.worker_nodes, key=lambda n: n.node_id)[0], False)
    run.join(PATIENCE_SECONDS)
    assert (run.report["steps"], run.report["workers"]) == (1000, 1)
    assert len(read_json_lines(run.output / FAILURES)) >= 1
    records = [record for record in read_metrics(run.output) if "loss" in record]
    assert [record["step"] for record in records] == [1, *range(10, 1001, 10)]
    tokens = [record["tokens"] for record in records]
    assert tokens == sorted(tokens) and tokens[-1] == run.report["train_tokens"]


def test_an_announced_loss_is_preceded_by_a_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    """And does not count as a failure, of which none is allowed here."""
    config = _config(
        tmp_path, cluster, max_steps=3000, checkpoint_every=100_000, on_notice=True, max_failures=0
    )
    run = _Run(config)
    run.wait_for("step 50", lambda: last_step(run.output) >= 50)
    doomed = sorted(cluster.worker_nodes, key=lambda n: n.node_id)[0]
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + NOTICE_SECONDS) * 1000)
    taken, _ = GcsClient(address=cluster.address).drain_node(
        doomed.node_id, reason, "a spot instance is taken back", deadline
    )
    assert taken
    kept = run.output / "ray_train" / "target"
    run.wait_for("a checkpoint", lambda: list(kept.glob("step-*")))
    (checkpoint,) = kept.glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert 50 <= step < 3000
    # When the time is up Ray takes the workers from the node, and needs another.
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    run.join(PATIENCE_SECONDS)
    assert (run.report["steps"], run.report["workers"]) == (3000, 2)
