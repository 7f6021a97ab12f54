"""What one request brings to the choice of its tokens: settings, randomness, and its text so far.

Shapes: N tree nodes, V target vocabulary, P nodes of the accepted path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.decode.grammar import Constraint
from core.decode.penalties import Penalties
from core.decode.sampling import SamplingSettings
from core.decode.tree import DraftTree
from core.decode.verify import Verification, verify_greedy, verify_sampling


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place of the output, as OpenAI's `logprobs` has them.

    They are the target's own, before bias, penalties and temperature, as vLLM reports them.

    Attributes:
        token_id: the token chosen.
        logprob: its log-probability.
        top: tokens and log-probabilities of the likeliest, best first, as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Settings, randomness and token history of one request.

    Each token of the output takes one random number, the n-th token the n-th. So the output of
    a seed is that of plain decoding, whatever trees are verified.

    Attributes:
        logprobs: one for each token of the output so far; empty unless they are asked for.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        seed: int | None,
        prompt_ids: Sequence[int],
        constraint: Constraint | None = None,
    ) -> None:
        """Begin after a prompt.

        Args:
            settings: the distribution that is asked for.
            seed: makes sampling repeatable; None draws one.
            prompt_ids: at least one token.
            constraint: that the output must follow.
        """
        self.settings, self._constraint = settings, constraint
        self.logprobs: list[TokenLogprobs] = []
        self._before_output = DraftTree.root_only(prompt_ids[-1])
        self._penalties = Penalties(settings, prompt_ids)
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def first(self, logits_V: Tensor) -> int:
        """The token after the prompt; it becomes history."""
        return self.verify(self._before_output, logits_V[None]).bonus_id

    def verify(self, tree: DraftTree, logits_NV: Tensor) -> Verification:
        """Greedy or sampling verification of a tree [N]; the committed tokens become history."""
        processed_NV = self._penalties.apply(tree, logits_NV)
        if self._constraint is not None:
            processed_NV = self._constraint.apply(tree, processed_NV)
        if self.settings.greedy:
            found = verify_greedy(tree, processed_NV)
        else:
            found = verify_sampling(tree, processed_NV, self.settings, self._generator)
        tokens = (*(int(tree.token_ids_N[node]) for node in found.path[1:]), found.bonus_id)
        self._penalties.append(tokens)
        if self._constraint is not None:
            self._constraint.append(tokens)
        if self.settings.logprobs is not None:
            chosen_PV = logits_NV[list(found.path)]
            self.logprobs += _token_logprobs(tokens, chosen_PV, self.settings.logprobs)
        return found


def _token_logprobs(tokens: Sequence[int], logits_PV: Tensor, count: int) -> list[TokenLogprobs]:
    """Of each token in its row of the target's logits."""
    logprobs_PV = logits_PV.float().log_softmax(-1)
    chosen_P1 = torch.tensor(tokens, device=logits_PV.device)[:, None]
    best = logprobs_PV.topk(count, dim=-1)
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens,
            logprobs_PV.gather(-1, chosen_P1)[:, 0].tolist(),
            best.indices.tolist(),
            best.values.tolist(),
            strict=True,
        )
    ]
