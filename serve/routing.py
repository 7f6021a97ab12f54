"""Which replica gets a request: the one that has read what its prompt begins with, if it has room.

A replica keeps what it computed for an answer (`decode.reuse_prefixes`), so the next turn of a
conversation is read faster where the last one was. A conversation's home follows from its first
question and the replicas there are (rendezvous hashing), so nothing is remembered and nothing goes
out of date; when a replica comes or goes, only the conversations move whose home it is.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serve.generation import Conversation, Generation

# Of a text or its tokens.
PREFIX = 256


def beginning(request: object) -> str | None:
    """What all turns of a conversation begin with; None of what is no generation.

    Messages count up to the user's first one: a system prompt alone, which all conversations may
    share, would send them all to one replica.
    """
    if not isinstance(request, Generation):
        return None
    prompt = request.prompts[0]
    if not isinstance(prompt, Conversation):
        return repr(prompt[:PREFIX])
    roles = [role for role, _ in prompt.messages]
    first = roles.index("user") + 1 if "user" in roles else len(roles)
    return repr(prompt.messages[:first])


def home(key: str, replicas: Sequence[str]) -> int:
    """The place of the replica, by their names, at which a conversation is at home."""
    scores = [
        hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=8).digest() for name in replicas
    ]
    return max(range(len(replicas)), key=scores.__getitem__)


class PrefixRouter(FIFOMixin, RequestRouter):
    """Ray Serve's choice of the less busy one of two, with a conversation's home going first.

    In the ingress's process; its requests come one after the other (FIFO).
    """

    def initialize_state(self, most_ahead: int) -> None:
        """Called by Ray Serve.

        Args:
            most_ahead: requests that the home may have more than another replica.
        """
        self._most_ahead = most_ahead

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, of which Serve takes the least busy of the first that has room."""
        if not candidate_replicas:
            return []
        others = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        arguments = pending_request.args if pending_request is not None else ()
        key = beginning(arguments[0]) if arguments else None
        if key is None:
            return [others]
        names = [replica.replica_id.unique_id for replica in candidate_replicas]
        chosen = candidate_replicas[home(key, names)]
        if self._busy(chosen) - min(map(self._busy, others)) > self._most_ahead:
            return [others]
        return [[chosen], others]

    def _busy(self, replica: RunningReplica) -> int:
        """Requests that it has, as far as is known here."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
