"""What decides about a conversation: hashes of its content, never its place in the input.

Adding conversations moves none of the others between train and held-out.
"""

from __future__ import annotations

import hashlib
import json

from core.data.conversations import Conversation


def content_hash(conversation: Conversation) -> str:
    """SHA-256 of the kind, the roles and the texts alone; neither id nor source counts."""
    turns: list[object] = [[message.role, message.content] for message in conversation.messages]
    if conversation.kind != "chat":
        turns.append(conversation.kind)
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()


def text_key(text: str) -> bytes:
    """Stands for a text in sets of millions."""
    return hashlib.sha256(text.encode()).digest()[:16]


def is_held_out(content: str, share: float, seed: int) -> bool:
    """Whether the conversation of this content hash is kept out of training."""
    return int(_mixed("held_out", seed, content), 16) < share * 2**256


def order_key(content: str, seed: int) -> int:
    """64 bits that say when the conversation's turn comes, and whether it is among the first n."""
    return int(_mixed("take", seed, content)[:16], 16)


def _mixed(use: str, seed: int, content: str) -> str:
    """Independent hashes for independent decisions."""
    return hashlib.sha256(f"{use}/{seed}/{content}".encode()).hexdigest()
