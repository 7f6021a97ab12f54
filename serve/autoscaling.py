"""How many decoder replicas there should be: by the work in hand and the speed at which it is done.

Ray Serve's own policy counts requests. A decoder's requests are of very unlike sizes, and many at
once cost it little more than one, so what counts here is how long the replicas will be at what
they have: tokens that are still to come, over measured tokens a second.

The controller runs this without the rest of Aerie's code, so it imports nothing of that.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

# A replica is taken away only if the others would then be this busy at most.
MOST_BUSY = 0.8
# Decisions are made many times a second; one is written down when it changes, and so often.
LOG_EVERY_S = 1.0

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Fleet:
    """What is known of all replicas; the replicas' own figures are `serve.pace.Load`'s.

    Attributes:
        replicas: that run.
        target: how many there should be, as decided last.
        requests: that are decoded, wait in a replica, or wait for one.
        backlog_tokens: that they will likely still be given.
        refused: requests that found a full queue, of late.
        produced_per_second: tokens, of all replicas, idle time included.
        tokens_per_second: of a replica, while it works.
        full_tokens_per_second: of a replica in its fullest rounds.
    """

    replicas: int
    target: int
    requests: float
    backlog_tokens: float
    refused: float
    produced_per_second: float
    tokens_per_second: float
    full_tokens_per_second: float

    @property
    def backlog_s(self) -> float:
        """Seconds in which one replica would do all that there is to do."""
        return self.backlog_tokens / self.tokens_per_second if self.tokens_per_second else 0.0


@dataclass(frozen=True)
class Wanted:
    """How many replicas there should be, and why."""

    replicas: int
    reason: str


def decide(fleet: Fleet, target_backlog_s: float, least: int = 1) -> Wanted:
    """The number of replicas for a fleet.

    Args:
        fleet: as it is.
        target_backlog_s: seconds for which each replica should have work, at most.
        least: replicas that are wanted without a request, 0 or 1.
    """
    if not fleet.tokens_per_second and fleet.requests:
        return Wanted(max(1, fleet.target), "no speed was measured yet")
    wanted = math.ceil(fleet.backlog_s / target_backlog_s)
    reason = f"{fleet.backlog_s:.1f} s of work for one replica"
    if fleet.refused and fleet.replicas >= wanted:
        wanted, reason = fleet.replicas + 1, f"{fleet.refused:.0f} requests were refused"
    if wanted > fleet.requests:
        wanted = math.ceil(fleet.requests)
        reason += f", but no more than {fleet.requests:.0f} requests"
    busy = MOST_BUSY * fleet.full_tokens_per_second
    needed = math.ceil(fleet.produced_per_second / busy) if busy else 0
    if wanted < min(needed, fleet.target):
        wanted = min(needed, fleet.target)
        reason = f"{fleet.produced_per_second:.0f} tokens/s are asked for"
    return Wanted(max(1 if fleet.requests else least, wanted), reason)


class BacklogPolicy:
    """The policy as Ray Serve calls it; Serve applies its delays and bounds to what it says."""

    def __init__(self, target_backlog_s: float, log: str | None = None) -> None:
        """Remember the settings.

        Args:
            target_backlog_s: see `decide`.
            log: file to which inputs and decisions are appended, a JSON line each.
        """
        self._target_backlog_s, self._log = target_backlog_s, log
        self._logged: tuple[float, Any] = (0.0, None)

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """How many replicas there should be."""
        fleet = fleet_of(ctx)
        least = min(1, ctx.capacity_adjusted_min_replicas or 0)
        wanted = decide(fleet, self._target_backlog_s, least)
        self._write(ctx, fleet, wanted)
        return wanted.replicas, {}

    def _write(self, ctx: AutoscalingContext, fleet: Fleet, wanted: Wanted) -> None:
        serve_default, _ = replica_queue_length_autoscaling_policy(ctx)
        now = float(ctx.current_time or 0.0)
        decision = (fleet.replicas, fleet.target, wanted.replicas)
        then, before = self._logged
        if decision == before and now - then < LOG_EVERY_S:
            return
        self._logged = (now, decision)
        line = json.dumps(
            {
                "time": now,
                "deployment": ctx.deployment_name,
                **{name: round(value, 3) for name, value in asdict(fleet).items()},
                "backlog_s": round(fleet.backlog_s, 3),
                "wanted": wanted.replicas,
                "reason": wanted.reason,
                "serve_default": math.ceil(serve_default),
            }
        )
        if before is not None and decision[1] != before[1]:
            logger.warning("decoder replicas: %d instead of %d; %s", *decision[1::-1], line)
        if self._log is not None:
            with Path(self._log).open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def fleet_of(ctx: AutoscalingContext) -> Fleet:
    """What Ray Serve has gathered of a deployment."""
    series = {
        name: {replica: points for replica, points in of_replicas.items() if points}
        for name, of_replicas in (ctx.raw_metrics or {}).items()
    }

    def latest(name: str) -> list[float]:
        return [points[-1].value for points in series.get(name, {}).values()]

    backlog, running = sum(latest("backlog_tokens")), sum(latest("running"))
    requests = running + sum(latest("waiting"))
    # Those that wait for a replica are likely as long as the others.
    queued = float(ctx.total_queued_requests or 0.0)
    each = backlog / requests if requests else 0.0
    return Fleet(
        replicas=ctx.current_num_replicas,
        target=ctx.target_num_replicas,
        requests=requests + queued,
        backlog_tokens=backlog + queued * each,
        refused=sum(_grown(points)[0] for points in series.get("refused", {}).values()),
        produced_per_second=_rate(series.get("tokens", {})),
        tokens_per_second=_mean(latest("tokens_per_second")),
        full_tokens_per_second=_mean(latest("full_tokens_per_second")),
    )


def _rate(counters: Mapping[Any, Any]) -> float:
    grown = [_grown(points) for points in counters.values()]
    return sum(growth / seconds for growth, seconds in grown if seconds)


def _grown(points: Any) -> tuple[float, float]:
    """By how much a counter has grown in the time that is looked back at, and its seconds."""
    first, last = points[0], points[-1]
    return last.value - first.value, last.timestamp - first.timestamp


def _mean(values: Iterable[float]) -> float:
    """Of the replicas that have measured any."""
    known = [value for value in values if value]
    return sum(known) / len(known) if known else 0.0
