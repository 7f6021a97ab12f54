"""Which conversations are taken, in which order, and which are held out: all by content.

Nothing depends on the order of the input, and adding conversations moves none of the others
between train and held-out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
from collections.abc import Iterator

from core.data.conversations import Conversation

ID_SUFFIX_LENGTH = 8


def content_hash(conversation: Conversation) -> str:
    """SHA-256 of the roles and texts alone; neither id nor source counts."""
    turns = [[message.role, message.content] for message in conversation.messages]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()


def text_key(text: str) -> bytes:
    """Stands for a text in sets of millions."""
    return hashlib.sha256(text.encode()).digest()[:16]


def is_held_out(content: str, share: float, seed: int) -> bool:
    """Whether the conversation of this content hash is kept out of training."""
    return int(_mixed("held_out", seed, content), 16) < share * 2**256


class Selection:
    """Exact duplicates removed, and at most `limit` conversations, those of lowest key.

    The key is a hash of the seed and the content. At most `limit` conversations are kept in
    memory, besides 32 bytes of hash for each that was ever seen.
    """

    def __init__(self, limit: int | None, seed: int) -> None:
        self.limit, self.seed = limit, seed
        self.num_duplicates = 0
        self._seen: set[bytes] = set()
        # Keys negated, so that the heap's first is the one to give up.
        self._heap: list[tuple[int, str]] = []
        self._kept: dict[str, Conversation] = {}

    def add(self, conversation: Conversation) -> None:
        """Offer a conversation."""
        content = content_hash(conversation)
        if bytes.fromhex(content) in self._seen:
            self.num_duplicates += 1
            twin = self._kept.get(content)
            # Of twins, the one that stays must not depend on which came first.
            if twin is not None and _rank(conversation) < _rank(twin):
                self._kept[content] = conversation
            return
        self._seen.add(bytes.fromhex(content))
        self._kept[content] = conversation
        heapq.heappush(self._heap, (-int(_mixed("take", self.seed, content), 16), content))
        if self.limit is not None and len(self._heap) > self.limit:
            del self._kept[heapq.heappop(self._heap)[1]]

    def __len__(self) -> int:
        return len(self._heap)

    def ordered(self) -> Iterator[tuple[str, Conversation]]:
        """Content hash and conversation, by ascending key; with an id, and each id but once."""
        taken: set[str] = set()
        for _, content in sorted(self._heap, reverse=True):
            conversation = self._kept[content]
            own_id = conversation.id or content
            if own_id in taken:
                own_id = f"{own_id}-{content[:ID_SUFFIX_LENGTH]}"
            taken.add(own_id)
            yield content, dataclasses.replace(conversation, id=own_id)


def _mixed(use: str, seed: int, content: str) -> str:
    """Independent hashes for independent decisions."""
    return hashlib.sha256(f"{use}/{seed}/{content}".encode()).hexdigest()


def _rank(conversation: Conversation) -> tuple[bool, str, str]:
    return (not conversation.id, conversation.id, conversation.source)
