"""serve.autoscaling: from what the replicas tell to how many there should be."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve.autoscaling import BacklogPolicy, Fleet, decide, fleet_of
from serve.pace import Load, Pace

DEPLOYMENT = DeploymentID("Decoder", "aerie")
IDLE = Load(0, 0, 0, 1000, 0, 50.0, 100.0)
FLEET = Fleet(
    replicas=1,
    target=1,
    requests=10,
    backlog_tokens=500,
    refused=0,
    produced_per_second=50,
    tokens_per_second=50,
    full_tokens_per_second=100,
)


def context(
    loads: Sequence[Sequence[Load]], *, queued: float = 0, target: int | None = None, now: float = 0
) -> AutoscalingContext:
    """Of each replica its figures, one a second."""
    replicas = [ReplicaID(str(number), DEPLOYMENT) for number in range(len(loads))]
    raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for replica, of_replica in zip(replicas, loads, strict=True):
        for second, load in enumerate(of_replica):
            for name, value in asdict(load).items():
                points = raw.setdefault(name, {}).setdefault(replica, [])
                points.append(TimeStampedValue(second, value))
    ongoing = sum(one[-1].running + one[-1].waiting for one in loads if one) + queued
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="Decoder",
        app_name="aerie",
        current_num_replicas=len(loads),
        target_num_replicas=target or len(loads),
        running_replicas=replicas,
        total_num_requests=ongoing,
        total_queued_requests=queued,
        aggregated_metrics={},
        raw_metrics=raw,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now,
        config=AutoscalingConfig(max_replicas=8, target_ongoing_requests=16),
    )


@pytest.mark.parametrize(
    ("changes", "replicas"),
    [
        ({}, 1),
        # 60 seconds of work: three replicas have 20 each.
        ({"backlog_tokens": 3000}, 3),
        ({"backlog_tokens": 3001}, 4),
        # The same in a decoder of twice the speed.
        ({"backlog_tokens": 3000, "tokens_per_second": 100}, 2),
        # A replica without a request is no help.
        ({"backlog_tokens": 3000, "requests": 1}, 1),
        ({"backlog_tokens": 0, "requests": 0, "replicas": 3, "target": 3}, 1),
        # What is refused is in no backlog.
        ({"refused": 2}, 2),
        ({"refused": 2, "replicas": 4, "target": 4}, 5),
        # Little is left to do, but a hundred tokens a second come in, and one replica has 80.
        ({"produced_per_second": 100, "replicas": 3, "target": 3}, 2),
        # That keeps replicas and adds none: a batch that was never full says little of a full one.
        ({"produced_per_second": 100}, 1),
        ({"tokens_per_second": 0, "replicas": 2, "target": 2}, 2),
        ({"tokens_per_second": 0, "requests": 0, "backlog_tokens": 0}, 1),
    ],
)
def test_the_number_follows_from_work_and_speed(
    changes: Mapping[str, float], replicas: int
) -> None:
    assert decide(replace(FLEET, **changes), 20.0).replicas == replicas  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "replicas"),
    [
        ({"requests": 0, "backlog_tokens": 0, "produced_per_second": 0}, 0),
        # Of late there was enough to do for one.
        ({"requests": 0, "backlog_tokens": 0}, 1),
        ({}, 1),
        # The first request of all.
        ({"replicas": 0, "target": 0, "requests": 1, "tokens_per_second": 0}, 1),
        ({"replicas": 0, "target": 0, "requests": 0, "backlog_tokens": 0,
          "tokens_per_second": 0, "produced_per_second": 0}, 0),
    ],
)  # fmt: skip
def test_none_is_wanted_where_nobody_asks(changes: Mapping[str, float], replicas: int) -> None:
    fleet = replace(FLEET, **changes)  # type: ignore[arg-type]
    assert decide(fleet, 20.0, least=0).replicas == replicas


def test_a_fleet_is_the_sum_of_its_replicas() -> None:
    first = [replace(IDLE, tokens=tokens) for tokens in (1000, 1030, 1060)]
    second = [
        Load(0, 0, 0, 0, 0, 0, 0),
        Load(4, 2, 300, 10, 1, 30.0, 60.0),
        Load(4, 4, 400, 40, 3, 30.0, 60.0),
    ]
    fleet = fleet_of(context([first, second, []], queued=2, target=4))
    assert fleet == Fleet(
        replicas=3,
        target=4,
        requests=10,
        # Two that wait for a replica, of fifty tokens as the eight others.
        backlog_tokens=500,
        refused=3,
        produced_per_second=50,
        tokens_per_second=40,
        full_tokens_per_second=80,
    )
    assert fleet.backlog_s == 12.5


def test_serves_own_policy_decides_otherwise_and_that_is_written_down(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    policy = BacklogPolicy(20.0, str(log))
    few_long = [[Load(4, 0, 4000, 100, 0, 50.0, 50.0)]]
    many_short = [[Load(16, 32, 96, 100, 0, 50.0, 50.0)]]
    assert policy(context(few_long, now=1))[0] == 4
    assert policy(context(many_short, now=2))[0] == 1
    first, second = map(json.loads, log.read_text().splitlines())
    assert (first["wanted"], first["serve_default"]) == (4, 1)
    assert (second["wanted"], second["serve_default"]) == (1, 3)
    assert first["backlog_s"] == 80 and "80.0 s of work" in first["reason"]


def test_a_decision_that_stays_is_written_down_once_a_second(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    policy = BacklogPolicy(20.0, str(log))
    for tick in range(31):
        policy(context([[IDLE]], now=100 + tick / 10))
    policy(context([[IDLE]], target=2, now=103.1))
    times = [json.loads(line)["time"] for line in log.read_text().splitlines()]
    assert times == [100, 101, 102, 103, 103.1]


def test_serves_controller_needs_nothing_else_of_the_code(tmp_path: Path) -> None:
    made = AutoscalingPolicy(policy_function=BacklogPolicy, policy_kwargs={"target_backlog_s": 5})
    (tmp_path / "policy").write_bytes(made.get_serialized_policy_def() or b"")
    program = (
        "import sys, pathlib, ray.cloudpickle as pickle\n"
        "policy = pickle.loads(pathlib.Path('policy').read_bytes())(target_backlog_s=5)\n"
        "print(policy.__class__.__name__, {'serve', 'core'} & set(sys.modules))\n"
    )
    # Not where the code is: -P keeps the folder out of the path, too.
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "BacklogPolicy set()", done.stderr


def test_a_pace_is_tokens_over_the_time_at_work() -> None:
    pace = Pace()
    assert pace.tokens_per_second == pace.full_tokens_per_second == 0
    for _ in range(200):
        pace.note(1, 3, 0.1)
    assert math.isclose(pace.tokens_per_second, 30)
    assert math.isclose(pace.full_tokens_per_second, 30)
    for _ in range(1000):
        pace.note(5, 10, 0.1)
    assert math.isclose(pace.tokens_per_second, 100, rel_tol=0.01)
    for _ in range(1000):
        pace.note(2, 4, 0.1)
    assert math.isclose(pace.tokens_per_second, 40, rel_tol=0.01)
    assert math.isclose(pace.full_tokens_per_second, 100), "of the rounds with up to eight"
    assert pace.tokens == 600 + 10_000 + 4_000


def test_answers_take_as_much_of_their_limit_as_earlier_ones() -> None:
    pace = Pace()
    assert pace.left(0, 500) == 500, "nothing is known yet"
    pace.ended(4, 10)
    pace.ended(60, 100)
    assert pace.left(0, 1000) == 500, "though none was so long yet"
    assert pace.left(900, 1000) == 50
    assert pace.left(1000, 1000) == 1, "there is always one more"
