"""How often one client may ask: a bucket of requests that fills up again by and by."""

from __future__ import annotations

from collections import OrderedDict

# Clients that are remembered; of more, the one that asked longest ago begins anew.
MOST_CLIENTS = 100_000


class RateLimit:
    """Requests a minute of each client, of which it may save up a minute's."""

    def __init__(self, per_minute: int) -> None:
        """Begin with everybody's bucket full."""
        self._most, self._per_second = float(per_minute), per_minute / 60
        # Of each client, what is in its bucket, and when that was so.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, client: str, now: float) -> float:
        """Take a request out of the client's bucket; 0, or in how many seconds there will be one.

        Args:
            client: whatever tells it from others.
            now: a clock that does not go back.
        """
        left, then = self._buckets.pop(client, (self._most, now))
        left = min(self._most, left + (now - then) * self._per_second)
        allowed = left >= 1
        self._buckets[client] = (left - allowed, now)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._per_second
