"""How many requests an ingress has at work, and whether it takes new ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serve.errors import ApiError

RETRY_AFTER_S = 1
# Another server may have taken over by then.
RETRY_DRAINED_AFTER_S = 5


class Traffic:
    """Requests on their way through one ingress.

    Attributes:
        at_work: those that were let in and have not ended.
        draining: whether the application is being stopped.
    """

    def __init__(self, most: int) -> None:
        """Begin with none.

        Args:
            most: that may be at work at a time.
        """
        self._most = most
        self.at_work = 0
        self.draining = False

    def drain(self) -> int:
        """Take no new requests from now on; how many have not ended."""
        self.draining = True
        return self.at_work

    def refusal(self) -> ApiError | None:
        """Why a new request is not let in; None if it is."""
        if self.draining:
            return ApiError(
                503,
                "this server is being stopped and takes no new requests; ask again later",
                code="shutting_down",
                retry_after_s=RETRY_DRAINED_AFTER_S,
            )
        if self.at_work >= self._most:
            return ApiError(
                429,
                f"{self.at_work} requests are at work, which is serve.max_requests; "
                "try again later",
                code="queue_full",
                retry_after_s=RETRY_AFTER_S,
            )
        return None

    @contextmanager
    def one(self) -> Iterator[None]:
        """While a request that was let in is at work."""
        self.at_work += 1
        try:
            yield
        finally:
            self.at_work -= 1
