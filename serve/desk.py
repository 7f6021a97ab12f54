"""Which draft head all decoder replicas use, which one is on trial, and what came of earlier ones.

There is one desk. Replicas report to it about once a second and get its orders in return, so that
it need not know them, and one that starts later, or again, does as the others do. A desk that
starts again learns from their reports which head they have come to.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from core.errors import ConfigError, InputError
from core.paths import PACKAGE_SCHEME
from serve.canary import Tally, judge

REPORT_EVERY_S = 1.0
# A replica that has not reported for so long is gone, and is not waited for.
GONE_AFTER_S = 10 * REPORT_EVERY_S
# Decisions that are remembered.
MOST_DECISIONS = 50

Outcome = Literal["promoted", "rolled back", "refused", "aborted"]

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Head:
    """A draft head's folder; the number, which grows, tells two trials of one folder apart."""

    number: int
    path: str | None


@dataclass(frozen=True)
class Report:
    """What a replica tells.

    Attributes:
        replica: its name.
        origin: the folder of its configuration.
        current: the head in use there.
        ready: the number of the head on trial, when it is loaded and tried out.
        refused: the number of a head that cannot be used, and why.
        old: of the head in use, since the trial began.
        new: of the head on trial.
    """

    replica: str
    origin: str | None
    current: Head
    ready: int | None = None
    refused: tuple[int, str] | None = None
    old: Tally = field(default_factory=Tally)
    new: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class Order:
    """What a replica is to do: the head to use, the one to have beside it, and its share."""

    current: Head
    trial: Head | None = None
    share: float = 0.0


@dataclass(frozen=True)
class Decision:
    """What came of a trial."""

    head: Head
    outcome: Outcome
    reason: str
    old: Tally = field(default_factory=Tally)
    new: Tally = field(default_factory=Tally)


class Desk(Protocol):
    """What of a desk is open to those who run the service; see `HeadDesk`."""

    async def propose(self, path: str, share: float | None = None) -> Head:
        """Try a head."""

    async def abort(self) -> Decision:
        """End the trial."""

    async def settled(self, number: int, timeout_s: float) -> Decision | None:
        """Wait until a head takes requests or was refused."""

    async def status(self) -> dict[str, Any]:
        """Everything, for people."""


@dataclass(eq=False)
class _Trial:
    head: Head
    share: float | None
    ready: bool = False
    reports: dict[str, Report] = field(default_factory=dict)


class HeadDesk:
    """Decides for all replicas. Its methods are coroutines, which Ray Serve runs in one thread."""

    def __init__(
        self, path: str | None, *, rounds: int, gain: float, fixed: str | None = None
    ) -> None:
        """Begin with the head of the configuration.

        Args:
            path: its folder; None is plain decoding.
            rounds: of each head, in a canary; see `judge`.
            gain: see `judge`.
            fixed: why no other head can come; None where one can.
        """
        self._fixed = fixed
        self._origin, self._rounds, self._gain = path, rounds, gain
        self._current = Head(0, path)
        self._last_number = 0
        self._trial: _Trial | None = None
        self._seen: dict[str, float] = {}
        self._began = time.monotonic()
        self._decisions: deque[Decision] = deque(maxlen=MOST_DECISIONS)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Called by Ray Serve with `user_config`: {"path": …, "canary": …}; see `propose`.

        What is wrong with it is logged and shown, but does not end the desk.
        """
        path = user_config.get("path")
        if path in (None, self._current.path) or (self._trial and path == self._trial.head.path):
            return
        try:
            await self.propose(str(path), user_config.get("canary"))
        except (ConfigError, InputError) as error:
            logger.error("user_config of the draft heads: %s", error)
            self._decide(Decision(Head(self._next_number(), str(path)), "refused", str(error)))

    async def propose(self, path: str, share: float | None = None) -> Head:
        """Try a head.

        Args:
            path: its folder, as every node finds it.
            share: of the requests that go to it until it is promoted or rolled back; None
                promotes it as soon as every replica has loaded it.
        Raises:
            InputError: a path that depends on where one stands, a share that is none, or a decoder
                that cannot change its head.
            ConfigError: another head is on trial.
        """
        if self._fixed is not None:
            raise InputError(self._fixed)
        if not path.startswith(PACKAGE_SCHEME) and not Path(path).is_absolute():
            raise InputError(f"path={path[:200]}: give the full path, or one of a package (pkg://)")
        if share is not None and not 0 < share < 1:
            raise InputError(f"canary={share}: give a share of the requests between 0 and 1")
        if self._trial is not None:
            raise ConfigError(
                f"{self._trial.head.path} is on trial; wait until that is decided "
                "(GET /admin/draft), or end it (DELETE /admin/draft)"
            )
        head = Head(self._next_number(), path)
        self._trial = _Trial(head, share)
        logger.warning("draft head %d, %s: being loaded", head.number, path)
        return head

    async def abort(self) -> Decision:
        """End the trial, or a head's loading: the head in use gets all requests again.

        Raises:
            ConfigError: there is none.
        """
        trial = self._trial
        if trial is None:
            raise ConfigError("no draft head is on trial; see GET /admin/draft")
        decision = Decision(trial.head, "aborted", "as was asked for", *_sums(trial))
        self._end(decision)
        return decision

    async def report(self, report: Report) -> Order:
        """Take a replica's report; what it is to do."""
        if report.origin != self._origin:
            # Of another configuration: the one or the other is about to be replaced.
            return Order(report.current)
        if report.current.number > self._current.number:
            self._learn(report.current)
        self._seen[report.replica] = time.monotonic()
        if self._trial is not None:
            self._trial.reports[report.replica] = report
            self._consider(self._trial)
        trial = self._trial
        if trial is None:
            return Order(self._current)
        return Order(self._current, trial.head, (trial.share or 0.0) if trial.ready else 0.0)

    async def settled(self, number: int, timeout_s: float) -> Decision | None:
        """Wait until a head is on its way to the requests, or refused; the decision, if it fell."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            trial = self._trial
            if trial is None or trial.head.number != number or trial.ready or self._alone:
                break
            await asyncio.sleep(REPORT_EVERY_S / 10)
        return next((one for one in self._decisions if one.head.number == number), None)

    @property
    def _alone(self) -> bool:
        """Whether there is no replica, which a service may do without until a request comes."""
        last = max(self._seen.values(), default=self._began)
        return time.monotonic() - last > GONE_AFTER_S

    async def status(self) -> dict[str, Any]:
        """Everything, for people."""
        trial = self._trial
        shown = None
        if trial is not None:
            old, new = _sums(trial)
            shown = {
                **asdict(trial.head),
                "state": "canary" if trial.ready else "loading",
                "share": trial.share,
                "current": _figures(old),
                "new": _figures(new),
            }
        return {
            "current": asdict(self._current),
            "trial": shown,
            "decisions": [shown_decision(one) for one in reversed(self._decisions)],
        }

    def _learn(self, current: Head) -> None:
        """What is in use, of a replica: this desk has started again."""
        self._current = current
        self._last_number = max(self._last_number, current.number)
        if self._trial is not None and self._trial.head.path == current.path:
            # `user_config`, which came before, had its way in the desk's earlier life.
            self._trial = None

    def _consider(self, trial: _Trial) -> None:
        old, new = _sums(trial)
        outcome: Outcome
        for report in trial.reports.values():
            if report.refused is not None and report.refused[0] == trial.head.number:
                outcome = "rolled back" if trial.ready else "refused"
                self._end(Decision(trial.head, outcome, report.refused[1], old, new))
                return
        if not trial.ready:
            trial.ready = self._all_ready(trial)
            if trial.ready and trial.share is None:
                self._end(Decision(trial.head, "promoted", "every replica has loaded it"))
            return
        verdict = judge(old, new, rounds=self._rounds, gain=self._gain)
        if verdict is not None:
            outcome = "promoted" if verdict.keep else "rolled back"
            self._end(Decision(trial.head, outcome, verdict.reason, old, new))

    def _all_ready(self, trial: _Trial) -> bool:
        now = time.monotonic()
        there = [name for name, seen in self._seen.items() if now - seen < GONE_AFTER_S]
        self._seen = {name: self._seen[name] for name in there}
        reports = [trial.reports.get(name) for name in there]
        return all(one is not None and one.ready == trial.head.number for one in reports)

    def _end(self, decision: Decision) -> None:
        if decision.outcome == "promoted":
            self._current = decision.head
        self._trial = None
        self._decide(decision)

    def _decide(self, decision: Decision) -> None:
        self._decisions.append(decision)
        head = decision.head
        logger.warning(
            "draft head %d, %s: %s, %s", head.number, head.path, decision.outcome, decision.reason
        )

    def _next_number(self) -> int:
        # A desk that starts again does not count anew: replicas know earlier numbers.
        self._last_number = max(self._last_number + 1, time.time_ns() // 10**6)
        return self._last_number


def _sums(trial: _Trial) -> tuple[Tally, Tally]:
    old, new = Tally(), Tally()
    for report in trial.reports.values():
        old, new = old + report.old, new + report.new
    return old, new


def _figures(tally: Tally) -> dict[str, Any]:
    return {
        "rounds": tally.rounds,
        "accepted_length": round(tally.accepted_length, 4),
        "failures": tally.failures,
    }


def shown_decision(decision: Decision) -> dict[str, Any]:
    """A decision as JSON."""
    return {
        **asdict(decision.head),
        "outcome": decision.outcome,
        "reason": decision.reason,
        "current": _figures(decision.old),
        "new": _figures(decision.new),
    }
