"""Where a request's time goes; without torch, so that who shows it needs none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PhaseSeconds:
    """Seconds of the rounds that a request was part of, each shared with who else was in it.

    Attributes:
        prefill: passes that read its prompt.
        draft: growing the trees.
        verify: the target's passes over the trees, and committing what was accepted.
    """

    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0

    def __add__(self, other: PhaseSeconds) -> PhaseSeconds:
        return PhaseSeconds(
            self.prefill + other.prefill, self.draft + other.draft, self.verify + other.verify
        )

    def __sub__(self, other: PhaseSeconds) -> PhaseSeconds:
        return PhaseSeconds(
            self.prefill - other.prefill, self.draft - other.draft, self.verify - other.verify
        )


NO_SECONDS = PhaseSeconds()
