"""What one request brings to the choice of its tokens: settings, randomness, and its text so far.

Shapes: N tree nodes, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.decode.sampling import SamplingSettings, draw, target_probs
from core.decode.tree import DraftTree
from core.decode.verify import Verification, verify_greedy, verify_sampling


class Sampler:
    """Settings, randomness and token history of one request."""

    def __init__(
        self, settings: SamplingSettings, seed: int | None, prompt_ids: Sequence[int]
    ) -> None:
        """Begin after a prompt.

        Args:
            settings: the distribution that is asked for.
            seed: makes sampling repeatable; None draws one.
            prompt_ids: the prompt's tokens.
        """
        self.settings = settings
        self.history = list(prompt_ids)
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def first(self, logits_V: Tensor) -> int:
        """The token after the prompt; it becomes history."""
        if self.settings.greedy:
            token = int(logits_V.argmax())
        else:
            token = draw(target_probs(logits_V.cpu(), self.settings), self.generator)
        self.history.append(token)
        return token

    def verify(self, tree: DraftTree, logits_NV: Tensor) -> Verification:
        """Greedy or sampling verification of a tree [N]; the committed tokens become history."""
        if self.settings.greedy:
            found = verify_greedy(tree, logits_NV)
        else:
            found = verify_sampling(tree, logits_NV, self.settings, self.generator)
        self.history += (int(tree.token_ids_N[node]) for node in found.path[1:])
        self.history.append(found.bonus_id)
        return found
