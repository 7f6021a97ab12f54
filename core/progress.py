"""Live progress that reads well on a terminal and in a job's log.

A log that is followed from afar shows no carriage returns, so progress is a line every few
seconds rather than a bar that is redrawn.
"""

from __future__ import annotations

import time
from types import TracebackType

SECONDS_BETWEEN_LINES = 5.0


def say(stage: str, message: str) -> None:
    """Print one line of a stage at once (Ray buffers standard output otherwise)."""
    print(f"[{stage}] {message}", flush=True)


def format_seconds(seconds: float) -> str:
    """`75.2` → `1:15`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes}:{rest:02d}"


class Progress:
    """Counts units of work and says where it stands, how fast, and how long it will take.

    Use as a context manager::

        with Progress("extract_features", total=12, unit="shards") as progress:
            for shard in shards:
                progress.advance(1, tokens=shard.num_tokens)

    `skipped` units were finished by an earlier run and do not count towards the rate.
    """

    def __init__(self, stage: str, total: int, unit: str, skipped: int = 0) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self.skipped = skipped
        self.amounts: dict[str, float] = {}
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self.skipped:
            say(self.stage, f"{self.skipped} of {self.total} {self.unit} were finished before")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._print_line()

    def advance(self, count: int = 1, note: str = "", **amounts: float) -> None:
        """Count finished units; `amounts` (tokens=…) are summed and shown as rates a second."""
        self.done += count
        for name, amount in amounts.items():
            self.amounts[name] = self.amounts.get(name, 0.0) + amount
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self._print_line(note)

    def _print_line(self, note: str = "") -> None:
        self._last_line = time.monotonic()
        elapsed = max(self._last_line - self._started, 1e-9)
        fresh = self.done - self.skipped
        parts = [f"{self.done}/{self.total} {self.unit}"]
        parts += [f"{total / elapsed:,.0f} {name}/s" for name, total in self.amounts.items()]
        if self.done < self.total and fresh:
            parts.append(f"left {format_seconds(elapsed / fresh * (self.total - self.done))}")
        else:
            parts.append(f"took {format_seconds(elapsed)}")
        if note:
            parts.append(note)
        share = self.done / self.total if self.total else 1.0
        say(self.stage, f"{share:4.0%} " + "  ".join(parts))
