"""Logit bias and penalties of one request, along each path of a draft tree.

Shapes: N tree nodes, V target vocabulary, S tokens whose logits change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.decode.sampling import SamplingSettings
from core.decode.tree import DraftTree


class Penalties:
    """Changes the logits of the tokens that a request's text has, or that it has a bias for.

    A node's text is prompt, output, and the path that leads to the node: what plain decoding
    would have seen there, which is what makes speculation lossless under penalties.
    """

    def __init__(self, settings: SamplingSettings, prompt_ids: Sequence[int]) -> None:
        """Begin after a prompt."""
        self.settings = settings
        repeats = settings.repetition_penalty != 1
        self._counts_output = repeats or bool(
            settings.presence_penalty or settings.frequency_penalty
        )
        # How often the output has each token; the prompt's, which count as repeated, from 0 on.
        self._counts: dict[int, int] = dict.fromkeys(prompt_ids, 0) if repeats else {}

    def append(self, token_ids: Sequence[int]) -> None:
        """Further tokens of the output."""
        if self._counts_output:
            for token in token_ids:
                self._counts[token] = self._counts.get(token, 0) + 1

    def apply(self, tree: DraftTree, logits_NV: Tensor) -> Tensor:
        """Logits with bias and penalties, float32 [N, V]; `logits_NV` stays as it was.

        Args:
            tree: its root is the last token appended.
            logits_NV: [N, V]; row i scores the token after node i.
        """
        settings = self.settings
        drafted = tree.token_ids_N[1:].tolist() if self._counts_output else []
        tokens = dict.fromkeys((*self._counts, *drafted, *settings.logit_bias))
        if not tokens:
            return logits_NV
        device, size = logits_NV.device, tree.size
        ids_S = torch.tensor(list(tokens), device=device)
        counts_S = torch.tensor([self._counts.get(token, 0) for token in tokens])
        bias_S = torch.tensor([settings.logit_bias.get(token, 0.0) for token in tokens])
        known_S = torch.tensor([token in self._counts for token in tokens])
        places = {token: place for place, token in enumerate(tokens)}
        drafted_NS = torch.zeros(size, len(tokens))
        columns = torch.tensor([places[token] for token in drafted], dtype=torch.int64)
        drafted_NS[torch.arange(1, 1 + len(drafted)), columns] = 1
        counts_NS = (counts_S + tree.sees_NN.float() @ drafted_NS).to(device)
        output_NS = counts_NS > 0
        values_NS = logits_NV[:, ids_S].float() + bias_S.to(device)
        penalty = settings.repetition_penalty
        repeated_NS = torch.where(values_NS > 0, values_NS / penalty, values_NS * penalty)
        values_NS = torch.where(output_NS | known_S.to(device), repeated_NS, values_NS)
        values_NS -= settings.frequency_penalty * counts_NS
        values_NS -= settings.presence_penalty * output_NS
        logits_NV = logits_NV.to(torch.float32, copy=True)
        logits_NV[:, ids_S] = values_NS
        return logits_NV
