"""A figure that is slow to get and asked for often, such as by health checks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

EVERY_S = 1.0
TIMEOUT_S = 3.0


class Recent:
    """Its latest value; one thread at most is out for it, however many ask and however long."""

    def __init__(self, ask: Callable[[], int], *, timeout_s: float = TIMEOUT_S) -> None:
        """Remember how to get it.

        Args:
            ask: gets it; may block.
            timeout_s: for which anybody waits.
        """
        self._ask, self._timeout_s = ask, timeout_s
        self._asked: asyncio.Task[int] | None = None
        self._at = 0.0

    async def get(self) -> int:
        """The value, `EVERY_S` old at most.

        Raises:
            TimeoutError: it does not come.
            Exception: whatever `ask` raises.
        """
        now = asyncio.get_running_loop().time()
        if self._asked is None or (self._asked.done() and now - self._at >= EVERY_S):
            self._asked, self._at = asyncio.create_task(asyncio.to_thread(self._ask)), now
        async with asyncio.timeout(self._timeout_s):
            # Others wait for the same.
            return await asyncio.shield(self._asked)
