"""Fields of every draft algorithm."""

from __future__ import annotations

from typing import ClassVar

from core.config.base import Section, field, setting


class DraftConfig(Section):
    """Base of the draft algorithms' configurations."""

    implementation: ClassVar[str] = ""
    """`module:Class` of the draft head, imported only where torch is wanted."""

    num_aux_layers: ClassVar[int] = 0
    """States of the target that the head reads besides the final feature."""

    architecture: ClassVar[tuple[str, ...]] = ()
    """Fields that say what the head computes; the others say how it is trained."""

    kind: str
    path: str | None = setting(
        None,
        "folder of a trained draft head; train_draft goes on from it, with its vocabulary (which "
        "vocab_size may add to where the head guesses with the target's own output head)",
    )
    vocab_size: int = field(
        8192,
        "tokens that the head may propose: the most frequent of the training data; "
        "0 means the target's whole vocabulary",
        ge=0,
    )
    intermediate_size: int = field(
        0, "width of the head's dense feed-forward; 0 takes the target's (one expert's)", ge=0
    )
